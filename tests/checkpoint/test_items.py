"""Damaged files of checkpoints: refused in one line, or without effect."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax.checkpoint import Checkpointer, DamagedError, items
from edl_jax.checkpoint.digest import array_digests
from edl_jax.config import MeshConfig
from tests.checkpoint.small_run import (
  DATA_STATE,
  abstract,
  assert_equal,
  state,
  write,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  write(workdir)
  return workdir


def flip(path, bit):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def files(workdir):
  folder = pathlib.Path(workdir, "checkpoints", "4")
  found = [path for path in folder.rglob("*") if path.is_file()]
  return sorted(path for path in found if path.stat().st_size)


def sampled_bits(workdir, count):
  """Bits drawn in turn evenly over all files and evenly over all bytes."""
  random = np.random.default_rng(0)
  paths = files(workdir)
  sizes = np.array([path.stat().st_size for path in paths])
  for number in range(count):
    share = None if number % 2 else sizes / sizes.sum()
    path = paths[random.choice(len(paths), p=share)]
    yield path, int(random.integers(8 * path.stat().st_size))


def assert_flips_are_harmless_or_refused(workdir, count):
  target = abstract(MeshConfig(), 1)
  checkpointer = Checkpointer(workdir, keep=2)
  refused = 0
  for path, bit in sampled_bits(workdir, count):
    before = path.read_bytes()
    flip(path, bit)
    try:
      restored, data_state = checkpointer.restore(4, target)
    except DamagedError as error:
      refused += 1
      assert str(error).startswith("step 4: ") and "\n" not in str(error)
    else:
      assert data_state == DATA_STATE
      assert_equal(restored, state())
    finally:
      path.write_bytes(before)
  checkpointer.close()
  assert refused > count // 8


def test_flipped_bits(workdir):
  assert_flips_are_harmless_or_refused(workdir, 24)


@pytest.mark.slow
def test_five_hundred_flipped_bits(workdir):
  assert_flips_are_harmless_or_refused(workdir, 500)


@pytest.mark.parametrize(
  "damage",
  [
    lambda folder: shutil.rmtree(folder / "optimizer"),
    lambda folder: (folder / "data" / "metadata").unlink(),
    lambda folder: (folder / "data" / "metadata").write_bytes(b""),
    lambda folder: (folder / "provenance" / "metadata").write_bytes(b""),
    lambda folder: max(
      (folder / "parameters").rglob("*"), key=lambda p: p.stat().st_size
    ).write_bytes(b""),
  ],
)
def test_missing_and_cut_files_are_one_line(workdir, tmp_path, damage):
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / "checkpoints" / "4")
  checkpointer = Checkpointer(str(tmp_path), keep=2)
  with pytest.raises(DamagedError, match=r"^step 4: .*checkpoints/4") as caught:
    checkpointer.restore(4, abstract(MeshConfig(), 1))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
  # The older one serves, and nothing is deleted.
  lines = []
  found = checkpointer.restore_newest(
    abstract(MeshConfig(), 1), tell=lines.append
  )
  assert found is not None and found.step == 3
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.state.model))
  assert len(lines) == 1 and "going back to step 3" in lines[0]
  assert os.path.isdir(tmp_path / "damaged" / "4")
  assert checkpointer.latest_step() == 3
  checkpointer.close()


def test_an_array_that_differs_is_named(workdir):
  loaded = edl_jax.load(workdir)
  arrays = {"parameters": items.by_name(loaded.model)}
  saved = {
    f"parameters/{name}": text
    for name, text in array_digests(arrays["parameters"]).items()
  }
  folder = os.path.join(workdir, "checkpoints", "4")
  assert items.check_items(folder, arrays, saved, "full") == len(saved)
  sampled = items.check_items(folder, arrays, saved, "sampled")
  assert sampled == -(-len(saved) // 4)
  name = next(name for name in saved if name.endswith("head_MV"))
  saved[name] = "float32[1]:0"
  with pytest.raises(DamagedError, match=r"step 4: array head_MV in .*param"):
    items.check_items(folder, arrays, saved, "full")
  assert items.check_items(folder, arrays, saved, "off") == 0
