"""Cut models of the study that train on."""

import json

import numpy as np
import pytest

from docs.study import adapt, collect
from edl_jax import sweep
from tests.test_sweep import TINY


def losses_of(path):
  domains = json.loads(path.read_text())["eval"]["domains"]
  return {name: each["lm_loss"] for name, each in domains.items()}


def test_without_runs_it_says_so(tmp_path, capsys):
  assert adapt.main([f"--sweep={tmp_path}"]) == 2
  assert "no folder in it has a result.json yet" in capsys.readouterr().err


@pytest.mark.slow
def test_losses_are_those_of_the_runs(tmp_path, capsys, monkeypatch):
  folder = tmp_path / "runs" / "seeds"
  domains = "code/c_headers,code/python_source,prose/legal"
  flags = [f"--experiment={TINY}", f"--experiment.data.domains={domains}"]
  steps = [f"--experiment.train.{key}=6" for key in ("num_steps", "eval_every")]
  grid = "--grid=seed=3"
  assert not sweep.main([*flags, *steps, grid, f"--workdir={folder}"])
  command = [f"--sweep={folder}", "--keep=2", "--steps=4"]
  # Other text than the run's: the command that fails is named.
  assert adapt.main([*command, f"--experiment={TINY}"]) == 2
  assert "edl_jax.main ended with 2: error: " in capsys.readouterr().err
  # As if it had been killed while it wrote the other domain's cut model.
  (folder / "adapted" / "seed=3,keep=2,steps=4" / "prose" / "part").mkdir(
    parents=True
  )
  (tmp_path / "own.py").write_text(
    "import edl_jax.config_files\n"
    "def get_config(variant=''):\n"
    f"  return edl_jax.config_files.load({TINY!r},"
    f" {{'data.domains': {domains!r}}})\n"
  )
  command.append(f"--experiment={tmp_path / 'own.py'}")
  assert not adapt.main(command)
  path = folder / "adapted" / "seed=3.json"
  made = json.loads(path.read_text())
  assert (made["keep"], made["steps"]) == (2, 4)
  found = made["losses"]
  before = losses_of(folder / "seed=3" / "result.json")
  for coarse, sources in (
    ("code", ("c_headers", "python_source")),
    ("prose", ("legal",)),
  ):
    place = folder / "adapted" / "seed=3,keep=2,steps=4" / coarse
    record = json.loads((place / "cut" / "cut.json").read_text())
    expected = {
      "whole": before,
      "cut": {name: each["cut"] for name, each in record["losses"].items()},
      "whole_adapted": losses_of(place / "whole_adapted" / "result.json"),
      "cut_adapted": losses_of(place / "cut_adapted" / "result.json"),
    }
    for which, losses in expected.items():
      mean = np.mean([losses[name] for name in sources])
      assert found[coarse][which] == pytest.approx(mean, rel=1e-5)
    assert found[coarse]["whole_adapted"] < found[coarse]["whole"]
    cut = json.loads((place / "cut_adapted" / "result.json").read_text())
    assert cut["experiment"]["model.num_experts"] == 2
    assert cut["experiment"]["seed"] == 3
    weights = [float(name in sources) for name in before]
    assert cut["experiment"]["data.weights"] == weights
  assert not [*folder.rglob("adapted/**/checkpoints")]
  # What is done is not done again, and is not taken for something else.
  monkeypatch.setattr(adapt, "commands", None)
  assert not adapt.main(command)
  assert adapt.main([*command, "--keep=3"]) == 2
  assert "is of other flags" in capsys.readouterr().err
  assert adapt.main([*command, "--run=seed=4"]) == 2
  assert "--run=seed=4: no finished run of" in capsys.readouterr().err
  assert not collect.main(
    [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
  )
  (row,) = collect.read_rows(str(tmp_path / "out" / "seeds.csv"))
  rises = [
    each["cut_adapted"] - each["whole_adapted"] for each in found.values()
  ]
  assert float(row["adapted/after"]) == pytest.approx(np.mean(rises))
