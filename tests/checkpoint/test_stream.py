"""Checkpoints written block by block are those that Orbax writes whole."""

import os

import ml_dtypes
import numpy as np
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Provenance, save_streamed, stream
from edl_jax.checkpoint.digest import StreamedDigest, array_digests
from edl_jax.checkpoint.stream import _chunks
from edl_jax.checkpoint.verify import verify_run
from edl_jax.config import Experiment, MeshConfig, ModelConfig
from edl_jax.interop.tensors import parameters
from edl_jax.model.transformer import abstract_model
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

MODEL = ModelConfig(
  vocabulary_size=300, num_layers=3, num_dense_layers=1, width=8, num_experts=4
)
PROVENANCE = Provenance(
  experiment=Experiment(model=MODEL),
  taxonomy=Taxonomy.from_names([]),
  tokenizer=byte_tokenizer(),
  content_hash="",
  source={"name": "elsewhere"},
)


def test_blocks_in_any_order_have_the_digest_of_the_whole():
  array = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
  digest = StreamedDigest(array.shape, array.dtype)
  for start, end in ((3, 5), (0, 1), (1, 3)):
    digest.add((start,), array[start:end])
  assert {"x": digest.text()} == array_digests({"x": array})
  swapped = StreamedDigest(array.shape, array.dtype)
  for start, place in ((0, 1), (1, 0), (2, 2), (3, 3), (4, 4)):
    swapped.add((place,), array[start : start + 1])
  assert swapped.text() != digest.text()
  parts = StreamedDigest(array.shape, array.dtype)
  for row in range(5):
    for first, end in ((2, 3), (0, 2)):
      parts.add((row, first), array[row : row + 1, first:end])
  assert parts.text() == digest.text()


def test_weights_that_came_in_bfloat16_take_less_than_it(tmp_path):
  random = np.random.default_rng(3)
  values = random.normal(size=(4, 64, 2048)).astype(ml_dtypes.bfloat16)
  shapes = {"x": values.shape}
  float32 = values.astype(np.float32)
  rows = (("x", (i,), float32[i : i + 1]) for i in range(4))
  stream._fill(str(tmp_path), shapes, rows)
  written = sum(
    path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()
  )
  assert written < values.nbytes


def test_chunks_are_small_and_never_of_two_layers():
  assert _chunks((7,)) == [7]
  assert _chunks((40, 2048)) == [40, 2048]
  assert _chunks((150_000, 2048)) == [8192, 2048]
  assert _chunks((48, 128, 2048, 2, 768)) == [1, 5, 2048, 2, 768]
  assert _chunks((2, 10**9)) == [1, 2**24]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder, and the arrays that it should hold."""
  folder = str(tmp_path_factory.mktemp("run"))
  random = np.random.default_rng(1)
  arrays = {
    path: random.normal(size=leaf.shape).astype(np.float32)
    for path, leaf in parameters(abstract_model(MODEL)).items()
  }
  shapes = {path: array.shape for path, array in arrays.items()}

  def blocks():
    for path, array in arrays.items():
      if path.startswith(("blocks", "dense_blocks")):
        for layer in range(len(array)):
          if path.endswith("EFM"):
            for expert in range(MODEL.num_experts):
              block = array[layer : layer + 1, expert : expert + 1]
              yield path, (layer, expert), block.copy()
          else:
            yield path, (layer,), array[layer : layer + 1].copy()
      else:
        yield path, (0,), array

  save_streamed(folder, shapes, blocks(), PROVENANCE)
  return folder, arrays


def test_it_loads_on_one_device_and_on_a_mesh(saved):
  folder, arrays = saved
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  for loaded in (edl_jax.load(folder), edl_jax.load(folder, mesh=mesh)):
    assert loaded.step == 0
    assert loaded.experiment.model == MODEL
    found = parameters(loaded.model)
    assert found.keys() == arrays.keys()
    for path, array in arrays.items():
      np.testing.assert_array_equal(found[path], array)


def test_it_verifies(saved):
  folder, arrays = saved
  (line,) = verify_run(folder)
  assert line == (
    f"step 0: {len(arrays)} arrays and the position in the data are intact"
  )
  assert os.listdir(folder) == ["checkpoints"]
