"""Loading a model from a folder alone."""

import dataclasses
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
from edl_jax import sharding
from edl_jax.config import (
  MeshConfig,
  UserError,
)
from tests.checkpoint.small_run import (
  EXPERIMENT,
  PROVENANCE,
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


def test_generation_casts_the_parameters_once(workdir):
  loaded = edl_jax.load(workdir)
  in_bfloat16 = dataclasses.replace(loaded.model.config, dtype="bfloat16")
  loaded.model.config = in_bfloat16
  first = loaded.generate(["a"], num_tokens=2)
  cast = loaded._in_compute_dtype
  assert {leaf.dtype.name for leaf in jax.tree.leaves(cast)} == {
    *("bfloat16", "float32")
  }
  assert loaded.generate(["a"], num_tokens=2)[0].tokens == first[0].tokens
  assert loaded._in_compute_dtype is cast
  # What is loaded stays as it was saved, and still is a tuple.
  model, *_ = loaded
  assert_equal(model, state().model)


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
