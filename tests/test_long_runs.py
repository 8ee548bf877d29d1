"""What shows after hundreds of steps alone."""

import os
import subprocess
import sys

import pytest

import edl_jax
from tests.test_train import ROOT, Runs, result, steps

BIAS = (
  "--experiment.model.balancing=bias",
  "--experiment.optimizer.bias_rate=0.01",
  "--experiment.optimizer.bias_schedule=learning_rate",
)


@pytest.mark.slow
def test_biases_balance_the_load_without_a_loss(tmp_path):
  workdir = tmp_path / "run"
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.main"),
      "--experiment=experiments/demo.py",
      *(f"--workdir={workdir}", "--experiment.seed=1"),
      *("--experiment.losses.divergence_weight=0", *BIAS),
    ],
    cwd=ROOT,
    # Optimised machine code: the run has 300 steps.
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  # 0.283 to 0.288 with three seeds (docs/method.md).
  assert result(workdir)["routing"]["max_violation"] < 0.3


@pytest.mark.slow
def test_a_rate_that_grows_beyond_all_bounds_leaves_a_checkpoint(tmp_path):
  ended = Runs(tmp_path)(
    "run",
    "--experiment.optimizer.learning_rate=40",
    "--experiment.optimizer.final_fraction=1",
    "--experiment.train.num_steps=2000",
    "--experiment.train.eval_every=500",
  )
  assert ended.returncode == 1
  assert ": train/" in ended.stderr.splitlines()[-1]
  last = steps(tmp_path / "run")[-1]
  assert f"the checkpoint of step {last} is intact" in ended.stderr
  assert edl_jax.load(str(tmp_path / "run")).step == last
