"""Fits the study's losses against compute, with their uncertainty."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats

from docs.study.questions import Question
from docs.study.runs import figures_of, pairs_of, runs_of


class Line(NamedTuple):
  """A straight line through points, by least squares."""

  intercept: float
  slope: float
  # Half the width of the slope's 95% interval, by Student's t.
  reach: float


def compute_of(row: Mapping[str, str]) -> float:
  """Returns the FLOPs of a run's training: 6 for a token and active parameter.

  The head's parameters count, and the embedding's do not. Attention's scores,
  a few percent, are left out.
  """
  return 6 * float(row["parameters/active"]) * float(row["tokens"])


def fit(x: np.ndarray, y: np.ndarray) -> Line:
  """Returns the line of least squares through three points or more."""
  found = stats.linregress(x, y)
  reach = stats.t.ppf(0.975, len(x) - 2) * found.stderr
  return Line(found.intercept, found.slope, reach)


class Series(NamedTuple):
  """Losses of two conditions in several sizes, paired by size and seed."""

  # What follows the size in their labels.
  names: tuple[str, str]
  # FLOPs, (runs,).
  compute: np.ndarray
  # Nats per token, (runs,) each.
  before: np.ndarray
  after: np.ndarray


def series(question: Question, rows: Sequence[Mapping[str, str]]) -> Series:
  """Returns the pairs of a question whose labels are "SIZE: WHAT"."""
  _, name, _ = question.columns[0]
  by_label = {each.label: each for each in question.conditions}
  names, pairs = ("", ""), []
  for condition in question.conditions:
    if not condition.base:
      continue
    first = runs_of(rows, by_label[condition.base])
    second = runs_of(rows, condition)
    before, after = figures_of(first, name), figures_of(second, name)
    names = tuple(
      label.partition(": ")[2] for label in (condition.base, condition.label)
    )
    pairs += [
      (compute_of(first[seed]), before[seed], after[seed])
      for seed in sorted(pairs_of(first, second, name))
    ]
  return Series(names, *np.reshape(pairs, (-1, 3)).T)


def table(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns the fits as Markdown; "" of fewer than three sizes.

  ln L = a - alpha ln C is a power law without an irreducible loss, which so few
  sizes cannot tell. The difference of paired losses is fitted by log10(C).
  """
  found = series(question, rows)
  if len(set(found.compute)) < 3:
    return ""
  logarithms = np.log(found.compute)
  lines = [
    "| fit | runs | value | 95% interval |",
    "| --- | ---: | ---: | ---: |",
  ]
  for what, x, y, form in (
    *(
      (f"{name}: exponent of the loss", logarithms, np.log(losses), ".4f")
      for name, losses in zip(found.names, (found.before, found.after))
    ),
    (
      "difference, its change in nats for ten times the compute",
      logarithms / np.log(10),
      found.after - found.before,
      "+.4f",
    ),
  ):
    line = fit(x, y)
    low, high = line.slope - line.reach, line.slope + line.reach
    lines.append(
      f"| {what} | {len(x)} | {line.slope:{form}} | {low:{form}} to"
      f" {high:{form}} |"
    )
  return "\n".join(lines)


def draw(question: Question, rows: Sequence[Mapping[str, str]]) -> Figure:
  """Draws losses against compute with their fits, and paired differences."""
  found = series(question, rows)
  sizes = np.unique(found.compute)
  figure = Figure(figsize=(8, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  for name, losses in zip(found.names, (found.before, found.after)):
    (drawn,) = left.plot(found.compute, losses, "o", alpha=0.6, label=name)
    if len(sizes) > 2:
      line = fit(np.log(found.compute), np.log(losses))
      fitted = np.exp(line.intercept + line.slope * np.log(sizes))
      left.plot(sizes, fitted, color=drawn.get_color())
  changes = found.after - found.before
  right.plot(found.compute, changes, "o", color="tab:orange")
  means = [changes[found.compute == size].mean() for size in sizes]
  right.plot(sizes, means, "_", color="black", ms=14)
  right.axhline(0, color="black", lw=0.8)
  for axes in (left, right):
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training compute in FLOPs")
    axes.grid(alpha=0.3)
  left.set_yscale("log")
  left.yaxis.set_major_formatter("{x:.1f}")
  left.yaxis.set_minor_formatter("{x:.1f}")
  left.set_ylabel(question.columns[0][0])
  right.set_ylabel("difference, paired by seed")
  left.legend()
  return figure
