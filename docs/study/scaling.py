"""Fits the study's losses against compute, with their uncertainty."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from docs.study.questions import Question
from docs.study.runs import figures_of, runs_of


class Line(NamedTuple):
  """A straight line through points, by least squares."""

  intercept: float
  slope: float
  # Half the width of the slope's 95% interval, by Student's t.
  reach: float


def compute_of(row: Mapping[str, str]) -> float:
  """Returns the FLOPs of a run's training, 6 for a token and parameter.

  Only active parameters count (Kaplan et al., arXiv:2001.08361, section 2.1).
  """
  return 6 * float(row["parameters/active"]) * float(row["tokens"])


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
  """Returns the line of least squares through three points or more."""
  found = stats.linregress(x, y)
  reach = stats.t.ppf(0.975, len(x) - 2) * found.stderr
  return Line(found.intercept, found.slope, reach)


def series(
  question: Question, rows: Sequence[Mapping[str, str]]
) -> dict[str, dict[tuple[float, int], float]]:
  """Returns losses by compute and seed, by what follows the size in a label.

  A condition's label is "SIZE: WHAT"; the first is what others are paired with.
  """
  _, name, _ = question.columns[0]
  found: dict[str, dict[tuple[float, int], float]] = {}
  for condition in question.conditions:
    runs = runs_of(rows, condition)
    _, _, what = condition.label.partition(": ")
    own = found.setdefault(what, {})
    for seed, loss in figures_of(runs, name).items():
      own[compute_of(runs[seed]), seed] = loss
  return found


def differences(
  before: Mapping[tuple[float, int], float],
  after: Mapping[tuple[float, int], float],
) -> list[tuple[float, float]]:
  """Returns compute and difference of losses, paired by compute and seed."""
  return [
    (compute, loss - before[compute, seed])
    for (compute, seed), loss in after.items()
    if (compute, seed) in before
  ]


def table(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns the fits as Markdown; "" of fewer than three sizes.

  ln L = a - alpha ln C is a power law without an irreducible loss, which so few
  sizes cannot tell. The difference of paired losses is fitted by log10(C).
  """
  before, *others = series(question, rows).values()
  if len({compute for compute, _ in before}) < 3:
    return ""
  lines = [
    "| fit | runs | value | 95% interval |",
    "| --- | ---: | ---: | ---: |",
  ]
  for what, losses in series(question, rows).items():
    computes = [math.log(compute) for compute, _ in losses]
    line = fit(computes, [math.log(loss) for loss in losses.values()])
    lines.append(
      f"| {what}: exponent of the loss | {len(losses)} | {line.slope:.4f} |"
      f" {line.slope - line.reach:.4f} to {line.slope + line.reach:.4f} |"
    )
  for after in others:
    computes, changes = zip(*differences(before, after))
    line = fit(np.log10(computes).tolist(), changes)
    lines.append(
      "| difference, its change in nats for ten times the compute |"
      f" {len(changes)} | {line.slope:+.4f} |"
      f" {line.slope - line.reach:+.4f} to {line.slope + line.reach:+.4f} |"
    )
  return "\n".join(lines)


def draw(question: Question, rows: Sequence[Mapping[str, str]]) -> Figure:
  """Draws losses against compute with their fits, and paired differences."""
  figure = Figure(figsize=(8, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  before, *others = series(question, rows).values()
  for what, losses in series(question, rows).items():
    computes = [compute for compute, _ in losses]
    (drawn,) = left.plot(
      computes, list(losses.values()), "o", alpha=0.6, label=what
    )
    if len(set(computes)) > 2:
      logarithms = [math.log(loss) for loss in losses.values()]
      line = fit(np.log(computes).tolist(), logarithms)
      ends = np.array([min(computes), max(computes)])
      fitted = np.exp(line.intercept + line.slope * np.log(ends))
      left.plot(ends, fitted, color=drawn.get_color())
  for after in others:
    changes: dict[float, list[float]] = {}
    for compute, change in differences(before, after):
      changes.setdefault(compute, []).append(change)
    for compute, values in changes.items():
      right.plot([compute] * len(values), values, "o", color="tab:orange")
      right.plot(compute, statistics.fmean(values), "_", color="black", ms=14)
  right.axhline(0, color="black", lw=0.8)
  for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xlabel("training compute in FLOPs")
    axes.grid(alpha=0.3)
  left.set_yscale("log")
  left.set_ylabel(question.columns[0][0])
  right.set_ylabel("difference, paired by seed")
  left.legend()
  return figure
