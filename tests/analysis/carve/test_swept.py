"""What a sweep reads of carving."""

import json

import pytest

from edl_jax import config
from edl_jax.analysis.carve import __main__ as carve
from edl_jax.analysis.carve import swept
from edl_jax.analysis.sweep_report import Run
from edl_jax.config import UserError


def run_of(name, weight=0.0, step=5):
  experiment = config.flatten(config.Experiment())
  experiment["losses.divergence_weight"] = weight
  return Run(name, {"experiment": experiment, "step": step})


def result_of(run, keep=(2, 4)):
  return {
    "workdir": f"sweep/{run.name}",
    "step": run.result["step"],
    "experiment": run.result["experiment"],
    "points": [{"keep": each} for each in keep],
  }


def write(workdir, content):
  (workdir / "carve").mkdir(exist_ok=True)
  (workdir / "carve" / "carve.json").write_text(content)


def test_the_command_is_one_of_carve():
  _, dash_m, module, *flags = swept.command("sweep", ["a=0", "a=1"], [2, 4])
  assert (dash_m, module) == ("-m", "edl_jax.analysis.carve")
  carve.COMMAND.parse(flags)
  assert carve._WORKDIR.value == ["sweep/a=0", "sweep/a=1"]
  assert carve._KEEP.value == ("2", "4")
  assert carve._OUT.value == "sweep/carve"


def test_results_are_found_by_run(tmp_path):
  first, second = run_of("a"), run_of("b", 0.5)
  assert swept.read(str(tmp_path), [first]) == [None]
  results = [result_of(second), result_of(first)]
  write(tmp_path, json.dumps(results))
  found = swept.read(str(tmp_path), [first, second])
  assert found == json.loads(json.dumps(results[::-1]))
  # Of another experiment, of an earlier step, and of none.
  others = [run_of("a", 0.5), run_of("b", 0.5, 6), run_of("c")]
  assert swept.read(str(tmp_path), others) == [None] * 3


def test_runs_are_carved_once(tmp_path):
  first, second = run_of("a"), run_of("b", 0.5)
  assert not swept.is_carved(str(tmp_path), [first], [2, 4])
  write(tmp_path, json.dumps([result_of(first)]))
  assert swept.is_carved(str(tmp_path), [first], [4, 2])
  assert not swept.is_carved(str(tmp_path), [first], [2])
  assert not swept.is_carved(str(tmp_path), [first], [2, 4, 8])
  assert not swept.is_carved(str(tmp_path), [first, second], [2, 4])


@pytest.mark.parametrize("content", ["{", "[1]", "[{}]"])
def test_a_damaged_file_is_named(tmp_path, content):
  write(tmp_path, content)
  with pytest.raises(UserError, match=r"carve\.json: not what carving wrote"):
    swept.read(str(tmp_path), [run_of("a")])
