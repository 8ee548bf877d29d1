"""A run that becomes longer on resume is the longer run."""

import pytest

from tests.test_train import Runs, assert_bitwise_equal, result, steps

WSD = (
  "--experiment.optimizer.schedule=wsd",
  "--experiment.optimizer.decay_fraction=0.25",
  "--experiment.train.checkpoint_every=5",
)


@pytest.mark.slow
def test_a_longer_run_equals_one_that_was_so_long_from_the_start(tmp_path):
  runs = Runs(tmp_path, "--xla_backend_optimization_level=0")

  def length(count):
    return f"--experiment.train.num_steps={count}"

  whole = runs.finish("whole", *WSD, length(20))
  # Killed after the checkpoint of step 10, before the decay of 12 steps.
  killed = runs("longer", *WSD, length(14), strike=("saved", 10, 9))
  assert killed.returncode == -9
  assert steps(tmp_path / "longer")[-1] == 10
  longer = runs.finish("longer", *WSD, length(20))
  (longer / "run.json").write_text((whole / "run.json").read_text())
  assert_bitwise_equal(longer, whole)
  # Its decay has been: it cannot become longer now.
  refused = runs("longer", *WSD, length(30))
  assert refused.returncode == 2
  assert "num_steps: 20 -> 30; " in refused.stderr
  assert result(longer)["step"] == 20
