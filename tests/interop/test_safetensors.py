"""Safetensors files against the format's description."""

import json

import ml_dtypes
import numpy as np
import pytest

from edl_jax.interop import safetensors

RANDOM = np.random.default_rng(0)


def read(path):
  """Reads a file by the description of the format, byte by byte."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], "little")
  header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
  assert header.pop("__metadata__") == {"format": "pt"}
  dtypes = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
  assert size % 8 == 0
  end, tensors = 0, {}
  for name, entry in header.items():
    start, stop = entry["data_offsets"]
    # Without holes.
    assert start == end
    end = stop
    tensors[name] = np.frombuffer(
      body[start:stop], dtypes[entry["dtype"]]
    ).reshape(entry["shape"])
  assert end == len(body)
  return tensors


def tensors():
  big = RANDOM.normal(size=(3, 4, 2, 5)).astype(np.float32)
  return {"whole": big, "view": big[1, :, 1].T, "vector": big[0, 0, 0]}


def test_float32_keeps_every_bit(tmp_path):
  wanted = tensors()
  safetensors.write(str(tmp_path / "x"), wanted, "float32")
  found = read(tmp_path / "x")
  assert list(found) == list(wanted)
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_bfloat16_rounds_to_nearest_even(tmp_path):
  # Between 1 and the next bfloat16, 1 + 2^-7: the middle goes to the even one.
  values = np.array(
    [1, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -1 - 2**-8], np.float32
  )
  safetensors.write(str(tmp_path / "x"), {"x": values}, "bfloat16")
  np.testing.assert_array_equal(
    read(tmp_path / "x")["x"].astype(np.float64),
    [1, 1, 1 + 2**-7, 1 + 2**-6, -1],
  )


@pytest.mark.parametrize(
  "max_bytes, shards",
  [
    (1, [["whole"], ["view"], ["vector"]]),
    (500, [["whole"], ["view", "vector"]]),
    (560, [["whole", "view"], ["vector"]]),
    (580, [["whole", "view", "vector"]]),
  ],
)
def test_shards_are_no_larger_than_asked(tmp_path, max_bytes, shards):
  """The tensors have 480, 80 and 20 bytes."""
  wanted = tensors()
  files = safetensors.write_sharded(str(tmp_path), wanted, "float32", max_bytes)
  assert files == [
    f"model-0000{n + 1}-of-0000{len(shards)}.safetensors"
    for n in range(len(shards))
  ]
  assert [list(read(tmp_path / file)) for file in files] == shards
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index == {
    "metadata": {"total_size": 580},
    "weight_map": {
      name: file for file, names in zip(files, shards) for name in names
    },
  }
