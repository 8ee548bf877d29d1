"""Saving on one mesh, restoring on another, loading from a folder alone."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import sharding, train
from edl_jax.checkpoint import (
  Checkpointer,
  Provenance,
  checkpoint_steps,
  initial_tokenizer,
)
from edl_jax.config import (
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  UserError,
)
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = Experiment(
  name="small",
  model=ModelConfig(
    vocabulary_size=264,
    num_layers=2,
    width=16,
    num_heads=2,
    head_width=8,
    num_experts=4,
    expert_width=8,
    num_dense_layers=1,
    num_shared_experts=1,
    dense_width=16,
  ),
  # Its value is found in training, and so part of the state.
  losses=LossesConfig(variance_weight="auto:1e-3"),
)
PROVENANCE = Provenance(
  EXPERIMENT,
  Taxonomy.from_names(["code/c", "code/python", "law"]),
  byte_tokenizer(),
  "hash of the text",
)
OPTIMIZER = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.num_steps)
ON_EIGHT = MeshConfig(1, 2, 2, 2)
DATA_STATE = {"next_index": 7, "inner": {"epoch": 0}}


def abstract(config, devices=8):
  mesh = sharding.make_mesh(config, jax.devices()[:devices])
  return abstract_state(EXPERIMENT, OPTIMIZER, mesh)


@functools.cache
def state():
  """Random numbers in every leaf, moments included, on eight devices."""
  random = np.random.default_rng(0)

  def draw(leaf):
    if leaf.dtype == np.int32:
      values = np.full(leaf.shape, 4, np.int32)
    else:
      values = random.standard_normal(leaf.shape, np.float32)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map(draw, abstract(ON_EIGHT))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Holds steps 3 and 4, of which the older has other parameters."""
  workdir = str(tmp_path_factory.mktemp("run"))
  checkpointer = Checkpointer(workdir, keep=2)
  other = state()._replace(model=jax.tree.map(np.zeros_like, state().model))
  checkpointer.save(3, other, DATA_STATE, PROVENANCE)
  checkpointer.save(4, state(), DATA_STATE, PROVENANCE)
  checkpointer.close()
  return workdir


def assert_equal(tree, other):
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  assert len(leaves) == len(others) > 0
  for leaf, other_leaf in zip(leaves, others):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other_leaf))


@pytest.mark.parametrize(
  ("config", "devices"),
  [(MeshConfig(1, 2, 1, 1), 2), (MeshConfig(), 1), (MeshConfig(2, 1, 2, 2), 8)],
)
def test_restores_on_another_mesh(workdir, config, devices):
  checkpointer = Checkpointer(workdir, keep=2)
  assert checkpointer.latest_step() == 4
  target = abstract(config, devices)
  restored, data_state = checkpointer.restore(4, target)
  checkpointer.close()
  assert data_state == DATA_STATE
  assert jax.tree.structure(restored) == jax.tree.structure(state())
  assert_equal(restored, state())
  for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
    assert leaf.sharding == wanted.sharding
    assert leaf.dtype == wanted.dtype


def test_fewer_devices_and_smaller_expert_axes_one_after_another(tmp_path):
  """Bit for bit, moments and position in the data too, each time written anew.

  From eight devices, four along `expert`, to four and to two, two of them.
  """
  meshes = ((MeshConfig(1, 2, 4, 1), 8), (MeshConfig(1, 2, 2, 1), 4))
  saved = jax.device_put(
    state(), jax.tree.map(lambda leaf: leaf.sharding, abstract(*meshes[0]))
  )
  for number, mesh in enumerate((*meshes[1:], (MeshConfig(1, 1, 2, 1), 2))):
    checkpointer = Checkpointer(str(tmp_path / str(number)), keep=1)
    checkpointer.save(4, saved, DATA_STATE, PROVENANCE)
    checkpointer.wait()
    saved, data_state = checkpointer.restore(4, abstract(*mesh))
    checkpointer.close()
    assert data_state == DATA_STATE
    assert_equal(saved, state())
    placed = saved.model.blocks.moe.gate_up_EM2F[...].sharding
    assert placed.mesh.size == mesh[1] and placed.mesh.shape["expert"] == 2


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/4"])
def test_load_from_any_of_the_folders(workdir, below):
  loaded = edl_jax.load(os.path.join(workdir, below))
  assert_equal(loaded.model, state().model)
  assert loaded.step == 4
  assert loaded.experiment == EXPERIMENT
  assert loaded.taxonomy == PROVENANCE.taxonomy
  assert loaded.content_hash == PROVENANCE.content_hash
  assert loaded.tokenizer.to_json() == PROVENANCE.tokenizer.to_json()
  assert {leaf.sharding for leaf in jax.tree.leaves(loaded.model)} == {
    jax.sharding.SingleDeviceSharding(jax.devices()[0])
  }


def test_load_of_a_step_and_onto_a_mesh(workdir):
  older = edl_jax.load(workdir, step=3)
  assert older.step == 3
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(older.model))
  mesh = sharding.make_mesh(MeshConfig(2, 2, 1, 2))
  loaded = edl_jax.load(workdir, mesh=mesh)
  assert_equal(loaded.model, state().model)
  assert loaded.model.head_MV[...].sharding.mesh == mesh


def test_load_says_what_is_missing(workdir, tmp_path):
  with pytest.raises(UserError, match=r"no checkpoint of step 5 .*: 3, 4"):
    edl_jax.load(workdir, step=5)
  for path in (tmp_path, tmp_path / "none"):
    with pytest.raises(UserError, match="no checkpoint in"):
      edl_jax.load(str(path))
  assert list(tmp_path.iterdir()) == []


def fingerprint(model):
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(model):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def test_load_in_a_process_that_has_only_the_folder(workdir, tmp_path):
  shutil.copytree(os.path.join(workdir, "checkpoints"), tmp_path / "elsewhere")
  program = """
import hashlib, sys, jax, numpy as np, edl_jax
loaded = edl_jax.load(sys.argv[1])
digest = hashlib.sha256()
for leaf in jax.tree.leaves(loaded.model):
  digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest(), loaded.experiment.name, loaded.taxonomy.fine)
"""
  ended = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "elsewhere")],
    cwd=tmp_path,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert ended.stdout.split(maxsplit=2) == [
    fingerprint(state().model),
    "small",
    "('c', 'python', 'law')\n",
  ]


def test_tokenizer_of_the_checkpoint_to_start_from(workdir, tmp_path):
  def starting_from(path, **sizes):
    return dataclasses.replace(
      EXPERIMENT,
      model=dataclasses.replace(EXPERIMENT.model, **sizes),
      train=TrainConfig(initial_checkpoint=str(path)),
    )

  new = str(tmp_path / "new")
  assert initial_tokenizer(EXPERIMENT, new) is None
  found = initial_tokenizer(starting_from(workdir, dtype="bfloat16"), new)
  assert found.to_json() == PROVENANCE.tokenizer.to_json()
  with pytest.raises(UserError, match=r"initial_checkpoint: no checkpoint"):
    initial_tokenizer(starting_from(tmp_path), new)
  with pytest.raises(UserError, match=r"num_experts: 4 -> 8; set"):
    initial_tokenizer(starting_from(workdir, num_experts=8), new)
  # A run with a checkpoint of its own no longer needs the initial one.
  found = initial_tokenizer(starting_from(tmp_path), workdir)
  assert found.to_json() == PROVENANCE.tokenizer.to_json()


def test_keeps_the_newest(tmp_path):
  folder = tmp_path / "checkpoints"
  checkpointer = Checkpointer(str(tmp_path), keep=2)
  assert checkpointer.latest_step() is None
  assert checkpoint_steps(str(folder)) == []
  for step in (2, 10, 11):
    checkpointer.save(step, state(), DATA_STATE, PROVENANCE)
  checkpointer.wait()
  assert checkpoint_steps(str(folder)) == [10, 11]
  checkpointer.close()
  # A killed run leaves an incomplete folder, which is no checkpoint.
  (folder / "12.orbax-checkpoint-tmp-0").mkdir()
  assert checkpoint_steps(str(folder)) == [10, 11]
  assert edl_jax.load(str(tmp_path)).step == 11


def test_state_bytes_is_the_size_of_the_arrays():
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state()))
  counters = sum(
    leaf.nbytes for leaf in jax.tree.leaves(state()) if not leaf.ndim
  )
  assert train.state_bytes(EXPERIMENT) == size - counters
