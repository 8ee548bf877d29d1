"""Saving on one mesh, restoring on another, loading from a folder alone."""

import pathlib

import jax
import pytest

import edl_jax
from edl_jax import storage
from edl_jax.checkpoint import (
  Checkpointer,
  checkpoint_steps,
)
from edl_jax.config import (
  MeshConfig,
)
from edl_jax.step import state_bytes
from tests.checkpoint.small_run import (
  DATA_STATE,
  EXPERIMENT,
  PROVENANCE,
  abstract,
  assert_equal,
  state,
  write,
)

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  write(workdir)
  return workdir


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


def test_a_checkpoint_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
  folder, found = tmp_path / "checkpoints", []

  def flush(path):
    files = [each for each in pathlib.Path(path).rglob("*") if each.is_file()]
    found.append((checkpoint_steps(str(folder)), path, len(files)))

  monkeypatch.setattr(storage, "flush_folder", flush)
  checkpointer = Checkpointer(str(tmp_path), keep=2)
  checkpointer.save(5, state(), DATA_STATE, PROVENANCE)
  checkpointer.wait()
  ((steps, path, count),) = found
  assert steps == [] and path.startswith(f"{folder}/5.")
  assert checkpoint_steps(str(folder)) == [5]
  # Orbax may merge or add a small file of its own later.
  files = [each for each in (folder / "5").rglob("*") if each.is_file()]
  assert 0 < count <= len(files) + 1
  checkpointer.close()


def test_state_bytes_is_the_size_of_the_arrays():
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state()))
  assert state_bytes(EXPERIMENT) == size
