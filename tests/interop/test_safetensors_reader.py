"""Safetensors files in every type that is read, and damaged ones."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from edl_jax.config import UserError
from edl_jax.interop import safetensors
from edl_jax.interop.safetensors_reader import Checkpoint

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
  "b": np.float32([[1e-30, -3e38]]),
}


@pytest.fixture
def folder(tmp_path):
  safetensors.write(str(tmp_path / "model.safetensors"), TENSORS, "float32")
  return tmp_path


def refused(folder):
  with pytest.raises(UserError) as caught:
    Checkpoint(str(folder))
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards(tmp_path, dtype):
  safetensors.write_sharded(str(tmp_path), TENSORS, dtype, 1)
  found = Checkpoint(str(tmp_path))
  assert found.num_bytes == (32 if dtype == "float32" else 16)
  numpy_dtype = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
  for name, tensor in TENSORS.items():
    assert found.read(name).dtype == numpy_dtype
    np.testing.assert_array_equal(found.read(name), tensor.astype(numpy_dtype))


def test_half_precision(tmp_path):
  header = {"x": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
  text = json.dumps(header).encode()
  (tmp_path / "model.safetensors").write_bytes(
    len(text).to_bytes(8, "little") + text + np.float16([1.5, -2]).tobytes()
  )
  assert Checkpoint(str(tmp_path)).read("x").tolist() == [1.5, -2]


def test_what_is_expected_is_what_will_be_read(folder, monkeypatch):
  asked = []

  def advise(number, start, size, advice):
    assert advice == os.POSIX_FADV_WILLNEED
    asked.append(os.pread(number, size, start))

  monkeypatch.setattr(os, "posix_fadvise", advise)
  found = Checkpoint(str(folder))
  found.expect(["b", "a"])
  assert asked == [TENSORS["b"].tobytes(), TENSORS["a"].tobytes()]
  # Elsewhere than on Linux it does nothing.
  monkeypatch.delattr(os, "posix_fadvise")
  found.expect(["b", "a"])
  assert len(asked) == 2


def test_a_missing_shard(tmp_path):
  safetensors.write_sharded(str(tmp_path), TENSORS, "float32", 1)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  said = refused(tmp_path)
  assert "model-00002-of-00002.safetensors of model.safetensors.index" in said
  (tmp_path / "model.safetensors.index.json").write_text("{}")
  assert "index.json is damaged" in refused(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 20, -1])
def test_a_truncated_file(folder, size):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  assert "model.safetensors is truncated" in refused(folder)


def test_damaged_headers(folder):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b"F32", b"F8_"[:3]))
  assert "is of type F8_; edl_jax reads F32, BF16, F16" in refused(folder)
  path.write_bytes(whole.replace(b"[2, 3]", b"[2, 4]"))
  assert "the bytes of a do not fit its shape" in refused(folder)
  path.write_bytes(whole.replace(b"{", b"!", 1))
  assert "is no safetensors file" in refused(folder)


def test_pickles_are_refused(tmp_path):
  assert "has neither model.safetensors nor" in refused(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  assert "pytorch_model.bin, which can run any code" in refused(tmp_path)
