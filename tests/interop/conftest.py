"""A run that the real command made, and Transformers in its environment."""

import os
import pathlib
import subprocess

import pytest

from edl_jax import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
  """A run of four steps, with a dense layer and more rows than tokens."""
  folder = tmp_path_factory.mktemp("run") / "tiny"
  overrides = {
    "model.num_layers": 3,
    "model.num_dense_layers": 1,
    "model.vocabulary_size": 272,
    "train.num_steps": 4,
    "train.eval_every": 4,
    "train.eval_rows": 2,
    "train.checkpoint_every": 2,
    "optimizer.warmup_steps": 1,
    "optimizer.learning_rate": 0.01,
    "data.max_characters_per_domain": 20_000,
  }
  code = main.main(
    [
      f"--experiment={ROOT}/experiments/tiny.py",
      f"--workdir={folder}",
      *(f"--experiment.{key}={value}" for key, value in overrides.items()),
    ]
  )
  assert code == 0
  return folder


@pytest.fixture(scope="session")
def run_elsewhere():
  """Runs a program of this folder where torch and Transformers are.

  Tests that need it are skipped unless `make test-interop` runs them.
  """
  python = os.environ.get("EDL_JAX_INTEROP_PYTHON")
  if not python:
    pytest.skip("torch and Transformers: make test-interop installs them")

  def run(program, *arguments, path="", **variables):
    subprocess.run(
      # -P: the program's own folder is not searched for modules.
      [python, "-P", str(program), *map(str, arguments)],
      check=True,
      env={**os.environ, **variables, "PYTHONPATH": str(path)},
    )

  return run
