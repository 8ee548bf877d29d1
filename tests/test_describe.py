"""The listing of settings and the reference page show every field once."""

import pathlib
import re
import subprocess
import sys

import pytest

from edl_jax import config, config_files, describe
from edl_jax.config import Experiment, LossesConfig, UserError

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


def cells(line: str) -> list[str]:
  return re.split(r" {2,}", line.strip())


def test_one_group(monkeypatch):
  monkeypatch.setenv("COLUMNS", "90")
  experiment = Experiment(losses=LossesConfig(divergence_weight=0.5))
  lines = describe.describe(experiment, "losses")
  assert lines[1].startswith("losses: Weights of L = ")
  assert max(map(len, lines)) <= 90
  start = next(i for i, line in enumerate(lines) if "divergence_weight" in line)
  # One wrapped entry, joined again: key, value, help, bounds, default.
  assert lines[start].startswith("* losses.divergence_weight     0.5  ")
  text = " ".join([cells(lines[start])[-1], lines[start + 1].strip()])
  assert text == (
    "Weight of the expert divergence loss L_ED, beta. At least 0. Default: 0.0."
  )
  # Continuation lines begin in the column of the first.
  column = lines[start].index("Weight of")
  assert len(lines[start + 1]) - len(lines[start + 1].lstrip()) == column
  assert [line[0] for line in lines if line].count("*") == 2
  assert lines[-1] == "* differs from the default"


@pytest.mark.parametrize("columns", ["20", "80", "133"])
def test_everything_is_listed_once_and_fits(monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", columns)
  experiment = config_files.load(TINY)
  lines = describe.describe(experiment)
  assert max(map(len, lines)) <= max(80, int(columns))
  rows = [cells(line.removeprefix("* ")) for line in lines if line]
  listed = [row for row in rows if row[0] in config.FIELDS]
  assert [row[0] for row in listed] == list(config.FIELDS)
  flat = config.flatten(experiment)
  for key, value, *_ in listed:
    assert value in (str(flat[key]), repr(flat[key]))
  starred = {cells(line)[0] for line in lines if line.startswith("* ")}
  defaults = config.flatten(Experiment())
  assert starred == {
    f"* {key}" for key in flat if flat[key] != defaults[key]
  } | {"* differs from the default"}


def test_long_values_are_cut_unless_alone():
  names = tuple(f"coarse/domain{i}" for i in range(49))
  experiment = config_files.load(TINY, {"data.domains": repr(names)})
  group = describe.describe(experiment, "data")
  assert any(line.split()[:1] == ["..."] for line in group)
  assert not any("domain48" in line for line in group)
  alone = describe.describe(experiment, "data.domains")
  assert any("domain48" in line for line in alone)


def test_choices_are_listed():
  text = " ".join(describe.describe(Experiment(), "model.remat"))
  words = " ".join(text.split())
  assert "One of none, full, attention, experts, auto." in words


@pytest.mark.parametrize(
  ("part", "nearest"),
  [
    ("loses", "losses"),
    ("losses.divergence_wieght", "losses.divergence_weight"),
    ("num_experts", "model.num_experts"),
  ],
)
def test_unknown_part_names_the_nearest(part, nearest):
  with pytest.raises(UserError) as caught:
    describe.describe(Experiment(), part)
  assert str(caught.value) == (
    f"--describe={part}: no group or key of that name; did you mean {nearest}?"
  )


def test_reference_has_a_row_for_every_field():
  page = describe.reference_markdown()
  titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
  assert titles == ["Experiment", *(f"`{group}`" for group in config.GROUPS)]
  rows = re.findall(r"^\| `(.*?)` +\| (.*) \|$", page, re.MULTILINE)
  assert [key for key, _ in rows] == list(config.FIELDS)
  assert "Where text comes from, and how its domains are named" in page
  by_key = {key: [c.strip() for c in row.split("|")] for key, row in rows}
  assert all(len(row) == 4 for row in by_key.values())
  assert by_key["optimizer.beta2"] == [
    "float",
    "`0.95`",
    "at least 0 and below 1",
    "Decay of Adam's second moment, per step.",
  ]
  assert by_key["mesh.fsdp"][2] == "at least 1, or -1"
  assert by_key["mesh.fsdp"][3].endswith("May change when a run resumes.")
  assert "resumes" not in by_key["data.weights"][3]
  assert by_key["data.weight_phases"][0] == "tuple of tuples of float"


def test_needs_no_jax():
  code = (
    "import sys; from edl_jax import config, describe;"
    "describe.describe(config.Experiment()); describe.reference_markdown();"
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
