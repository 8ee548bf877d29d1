"""How the study's training losses differ, by quarters of the run."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from docs.study.collect import PREFIX
from docs.study.questions import Question
from docs.study.runs import Runs, runs_of


def differences(first: Runs, second: Runs) -> np.ndarray:
  """Returns second minus first by seed and quarter of the run, (seeds, 4).

  Runs of a seed see the same batches. A quarter's value is the mean over its
  logged batches in nats per token. Runs without logged losses are left out.
  """
  found = []
  for seed in sorted(first.keys() & second.keys()):
    before, after = first[seed], second[seed]
    columns = [
      name
      for name in before
      if name.startswith(PREFIX) and before[name] and after.get(name)
    ]
    columns.sort(key=lambda name: int(name.removeprefix(PREFIX)))
    if columns and before.get("text") == after.get("text"):
      changes = [float(after[name]) - float(before[name]) for name in columns]
      found.append([part.mean() for part in np.array_split(changes, 4)])
  return np.reshape(found, (-1, 4))


def table(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns a line for each compared condition; "" without any."""
  by_label = {
    condition.label: runs_of(rows, condition)
    for condition in question.conditions
  }
  lines = []
  for condition in question.conditions:
    if not condition.base:
      continue
    found = differences(by_label[condition.base], by_label[condition.label])
    if len(found) > 1:
      cells = [
        f"{statistics.fmean(quarter):+.3f} ± {statistics.stdev(quarter):.3f}"
        for quarter in found.T.tolist()
      ]
      lines.append([condition.label, str(len(found)), *cells])
  if not lines:
    return ""
  headings = ["condition", "seeds", "first quarter", "second", "third", "last"]
  lines = [headings, ["---", *["---:"] * 5], *lines]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
