"""Fits of the study's losses against compute."""

import math

import numpy as np
import pytest

from docs.study import scaling
from docs.study.questions import Condition, Question

QUESTION = Question(
  "scale",
  ("runs",),
  [
    condition
    for size in ("1", "2", "4")
    for condition in (
      Condition(f"{size}M: none", {"name": size, "edl": "0"}),
      Condition(f"{size}M: some", {"name": size, "edl": "1"}, f"{size}M: none"),
    )
  ],
  (("LM loss", "lm_loss", ".4f"),),
  by_compute=True,
)


def rows_of(loss):
  return [
    {
      "name": size,
      "edl": edl,
      "seed": str(seed),
      "parameters/active": str(float(size) * 1e6),
      "tokens": str(float(size) * 2e6),
      "lm_loss": str(loss(12e12 * float(size) ** 2, edl == "1", seed)),
    }
    for size in ("1", "2", "4")
    for edl in ("0", "1")
    for seed in range(3)
  ]


def power_law(compute, divergence, seed):
  """Losses fall with exponent 0.1, differences by 0.02 in ten times as much."""
  base = 50 * compute**-0.1 * math.exp(0.01 * (seed - 1))
  return base - divergence * 0.02 * math.log10(compute / 12e12)


def test_fits_find_the_law():
  lines = scaling.table(QUESTION, rows_of(power_law)).splitlines()
  cells = [[cell.strip() for cell in line.split("|")] for line in lines]
  assert cells[2][1:4] == ["none: exponent of the loss", "9", "-0.1000"]
  assert cells[4][2:4] == ["9", "-0.0200"]
  assert cells[4][4] == "-0.0200 to -0.0200"
  # By hand: the standard error of the slope of nine points on three places,
  # each 0.01 apart from its line, -0.01, 0 and 0.01; Student's t for 7.
  x = np.log([12e12, 12e12 * 4, 12e12 * 16])
  error = math.sqrt(6e-4 / 7 / (3 * np.square(x - x.mean()).sum()))
  reach = 2.364624251592785 * error
  assert cells[2][4] == f"{-0.1 - reach:.4f} to {-0.1 + reach:.4f}"


@pytest.mark.parametrize("edl", ["0", "1"])
def test_two_sizes_have_no_fit(edl):
  rows = [
    row for row in rows_of(power_law) if (row["name"], row["edl"]) != ("4", edl)
  ]
  assert scaling.table(QUESTION, rows) == ""
  assert len(scaling.draw(QUESTION, rows).axes) == 2


def test_runs_without_a_partner_do_not_count():
  rows = rows_of(power_law)
  alone = [row | {"seed": "7", "lm_loss": "9"} for row in rows[:1]]
  assert scaling.table(QUESTION, rows + alone) == scaling.table(QUESTION, rows)
  assert scaling.table(QUESTION, []) == ""


def test_figure_has_each_pair():
  _, right = scaling.draw(QUESTION, rows_of(power_law)).axes
  drawn = [
    float(y)
    for line in right.get_lines()
    if line.get_marker() == "o"
    for y in line.get_ydata()
  ]
  expected = [-0.02 * math.log10(n**2) for n in (1, 2, 4) for _ in range(3)]
  assert drawn == pytest.approx(expected)
