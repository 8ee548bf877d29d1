"""Tables and plots show the figures of carved runs."""

import json
import pathlib

import numpy as np
import pytest

from edl_jax.analysis.carve import report
from edl_jax.config import Experiment, flatten

KEEPS = (2, 4)
DOMAINS = ("a", "b")


def result_of(seed, weight, rise, draws=2):
  """A run whose loss rises by `rise` with four experts, by twice with two."""
  experiment = Experiment(seed=seed)
  experiment.losses.divergence_weight = weight
  experiment.model.num_experts = 8
  points = []
  for number, domain in enumerate(DOMAINS):
    for keep in KEEPS:
      more = rise * (4 / keep) + number
      points.append(
        {
          "domain": domain,
          "keep": keep,
          "experts": [[0, 1]],
          "loss": 3 + seed + more,
          "others_loss": 4 + 2 * more,
          "most_used_loss": 3 + seed + 3 * more,
          "random_losses": [3 + seed + (4 + d) * more for d in range(draws)],
        }
      )
  cost = {"parameters": 1000, "share": 0.5, "bytes": 4000}
  cost["active_parameters"] = 100
  return {
    "workdir": f"runs/{weight}_{seed}",
    "step": 5,
    "experiment": flatten(experiment),
    "score": "assignments",
    "greedy": False,
    "draws": draws,
    "most_used": [],
    "costs": [{"keep": keep, **cost} for keep in (2, 4, 8)],
    "whole": {
      domain: {
        "loss": 3.0 + seed,
        "others_loss": 4.0,
        "tokens": 10,
        "calibration_tokens": 100,
      }
      for domain in DOMAINS
    },
    "points": points,
    "calibration": [
      {"domain": domain, "keep": 2, "tokens": 64, "loss": 3.5 + seed}
      for domain in DOMAINS
    ],
  }


def table(text, heading):
  """Returns the rows of the table under a heading, as lists of cells."""
  lines = text.split(heading)[1].strip().splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith("|"))
  rows = []
  for line in lines[start:]:
    if not line.startswith("|"):
      break
    rows.append([cell.strip() for cell in line.strip("|").split("|")])
  return [rows[0], *rows[2:]]


def test_tables_of_one_run():
  text = report.tables_of([result_of(0, 0.0, 0.5)])
  assert "chosen by assignments on 100 tokens of each" in text
  heading, *rows = table(text, "its rise with fewer")
  assert heading == ["run", "experts", "all", "4", "2", "mean rise"]
  # Rises of 0.5 and 1.5, then 1 and 2; the area by hand.
  rise = ((1.5 + 1) / 2 * 2 + (1 + 0) / 2 * 4) / 6
  assert rows[0] == [
    *("0.0_0", "its own experts", "3.000", "+1.000", "+1.500"),
    f"{rise:+.3f}",
  ]
  assert rows[1][1:5] == [
    *("most used over all domains", ""),
    "+3.000",
    "+4.500",
  ]
  # Draws of 4 and 5 times the rise.
  assert rows[2][3:5] == ["+4.500 ± 0.707", "+6.750 ± 1.061"]
  assert rows[3][3:5] == ["+2.000", "+3.000"]
  heading, *rows = table(text, "by domain")
  assert heading == ["domain", "run", "all", "4", "2"]
  assert rows == [
    ["a", "0.0_0", "3.000", "+0.500", "+1.000"],
    ["b", "0.0_0", "3.000", "+1.500", "+2.000"],
  ]
  assert table(text, "by calibration tokens") == [
    ["run", "64"],
    ["0.0_0", "+0.500"],
  ]
  heading, *rows = table(text, "The cut model")
  assert [row[0] for row in rows] == ["8", "4", "2"]
  assert rows[0][1:] == ["1,000", "50%", "0.0", "100"]
  assert "paired" not in text


def test_runs_are_paired_by_domain_and_seed():
  results = [
    result_of(seed, weight, rise)
    for weight, rise in ((0.0, 0.5), (0.1, 0.25))
    for seed in (0, 1)
  ]
  text = report.tables_of([*results, result_of(7, 0.1, 9.0)])
  heading, *rows = table(text, "paired by domain and seed")
  assert heading == ["run", "pairs", "all", "4", "2"]
  # Seed 7 has no partner.
  assert rows == [
    [
      *("divergence_weight=0.1", "4", "+0.000 ± 0.000"),
      *("-0.250 ± 0.000", "-0.500 ± 0.000"),
    ]
  ]
  _, *rows = table(text, "its rise with fewer")
  labels = [row[0] for row in rows if row[0]]
  assert labels == ["divergence_weight=0", "divergence_weight=0.1"]
  assert rows[0][2:4] == ["3.500 ± 0.707", "+1.000 ± 0.000"]


def test_no_draws_and_no_other_domain_leave_rows_out():
  result = result_of(0, 0.0, 0.5, draws=0)
  for point in result["points"]:
    point["others_loss"] = None
  _, *rows = table(report.tables_of([result]), "its rise with fewer")
  assert [row[1] for row in rows] == [
    "its own experts",
    "most used over all domains",
  ]
  assert len(report.draw([result]).axes[0].lines) == 2


def test_area_of_straight_lines():
  assert report.area({4: 0.0}, 8) == 0
  assert report.area({8: 0.0}, 8) == 0
  # A triangle of height 1, and the same with a point on its edge.
  assert report.area({4: 1.0}, 8) == pytest.approx(0.5)
  assert report.area({4: 1.0, 6: 0.5}, 8) == pytest.approx(0.5)


def test_every_domain_has_a_panel_with_a_line_for_each_choice():
  results = [result_of(0, 0.0, 0.5), result_of(0, 0.1, 0.25)]
  figure = report.draw(results)
  assert [axes.get_title(loc="left") for axes in figure.axes] == [
    "mean over domains",
    *DOMAINS,
  ]
  for axes, offset in zip(figure.axes, (0.5, 0.0, 1.0)):
    own, _, random, *_ = axes.lines
    assert len(axes.lines) == 6 and len(axes.collections) == 2
    np.testing.assert_allclose(
      own.get_xydata(),
      [[2, 4 + offset], [4, 3.5 + offset], [8, 3]],
    )
    assert len(random.get_xydata()) == 2
  many = [result_of(0, 0.0, 0.5)]
  many[0]["whole"] = {f"d{n}": many[0]["whole"]["a"] for n in range(20)}
  many[0]["points"] = [
    {**point, "domain": f"d{n}"}
    for n in range(20)
    for point in many[0]["points"][:2]
  ]
  assert len(report.draw(many).axes) == 1


def test_files_are_written(tmp_path):
  results = [result_of(0, 0.0, 0.5)]
  text = report.write(results, str(tmp_path / "out"))
  assert (tmp_path / "out/carve.md").read_text() == f"{text}\n"
  assert json.loads((tmp_path / "out/carve.json").read_text()) == (
    json.loads(json.dumps(results))
  )
  assert (tmp_path / "out/carve.png").read_bytes().startswith(b"\x89PNG")


def test_published_tables_are_made_from_the_published_results():
  folder = pathlib.Path(__file__).parents[3] / "docs" / "study"
  results = json.loads((folder / "carve.json").read_text())
  _, _, tables = report.tables_of(results).partition("\n\n")
  assert len(results) == 9 and len(tables) > 1000
  assert tables in (folder / "carving.md").read_text()
