"""Compares runs on tasks: tables over seeds, differences paired by document.

It reads tasks.json of the runs' folders alone, which `python -m edl_jax.tasks`
and training write. This module imports no JAX.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edl_jax import tables
from edl_jax.config import UserError

Tasks = Mapping[str, Any]

# The accuracy that tables show, by form: OLMES (arXiv:2406.08446) normalises
# the cloze form by bytes.
ACCURACY = {"rc": "accuracy_per_byte", "mc": "accuracy"}


class Difference(NamedTuple):
  """How a figure differs between pairs of runs, second less first."""

  mean: float
  # Standard error of the mean over documents, each averaged over the pairs; and
  # over the pairs, each averaged over documents. None for one of either.
  document_error: float | None
  pair_error: float | None
  documents: int
  # Mean over documents of each pair.
  by_pair: tuple[float, ...]


def read_tasks(folder: str, step: int | None = None) -> Tasks | None:
  """Reads `folder`/tasks.json; None without one, or if it is of another step.

  Raises:
    UserError: the file is damaged.
  """
  path = os.path.join(folder, "tasks.json")
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
    is_wanted = step in (None, found["step"]) and bool(found["tasks"])
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path}: not the figures of a run; delete it, or write it again with"
      " python -m edl_jax.tasks"
    ) from error
  return found if is_wanted else None


def paired_difference(
  pairs: Sequence[tuple[Tasks, Tasks]], name: str, figure: str
) -> Difference | None:
  """Compares a figure of a task, document by document.

  Runs are comparable if they read the same file, as many tokens in a row, and
  some of the same documents.

  Args:
    pairs: tasks.json of two runs each, which share a seed.
    name: of the task's file, a key of "tasks".
    figure: such as "bits_per_byte".

  Returns:
    The difference; None unless all runs have the figure and are comparable.
  """
  runs = [run for pair in pairs for run in pair]
  tasks = [run["tasks"].get(name) for run in runs]
  if not tasks or not all(
    task
    and figure in task["by_document"]
    and task["sha256"] == tasks[0]["sha256"]
    and run["max_length"] == runs[0]["max_length"]
    for task, run in zip(tasks, runs)
  ):
    return None
  values = [
    dict(zip(task["by_document"]["id"], task["by_document"][figure]))
    for task in tasks
  ]
  shared = [i for i in values[0] if all(i in each for each in values)]
  if not shared:
    return None
  of_runs = np.array([[each[i] for i in shared] for each in values])
  # Axes: pairs, documents.
  differences = of_runs[1::2] - of_runs[::2]
  return Difference(
    mean=float(differences.mean()),
    document_error=_error(differences.mean(0)),
    pair_error=_error(differences.mean(1)),
    documents=len(shared),
    by_pair=tuple(differences.mean(1).tolist()),
  )


def mean_difference(differences: Sequence[Difference]) -> Difference:
  """Returns the unweighted mean over tasks, whose documents are independent."""
  by_pair = np.mean([each.by_pair for each in differences], axis=0)
  errors = [each.document_error for each in differences]
  known = [error for error in errors if error is not None]
  return Difference(
    mean=float(by_pair.mean()),
    document_error=math.hypot(*known) / len(known)
    if len(known) == len(errors)
    else None,
    pair_error=_error(by_pair),
    documents=sum(each.documents for each in differences),
    by_pair=tuple(by_pair.tolist()),
  )


def _error(values: np.ndarray) -> float | None:
  """Returns the standard error of a mean; None for a single value."""
  if len(values) < 2:
    return None
  return float(values.std(ddof=1) / math.sqrt(len(values)))


def flat_figures(tasks: Tasks) -> dict[str, float]:
  """Returns the means of tasks and groups by a flat name."""
  return {
    f"{kind}/{name}/{figure}": value["mean"]
    for kind, rows in (("task", tasks["tasks"]), ("group", tasks["groups"]))
    for name, row in rows.items()
    for figure, value in row["figures"].items()
  }


class RunsOfGroup(NamedTuple):
  """The runs of a sweep that differ in the seed alone."""

  label: str
  # tasks.json by seed.
  by_seed: Mapping[int, Tasks]


def sections(groups: Sequence[RunsOfGroup]) -> list[str]:
  """Returns the sections of a sweep's report on tasks; none without tasks.

  Args:
    groups: the first one is what the others are compared with.
  """
  groups = [group for group in groups if group.by_seed]
  if not groups:
    return []
  parts = ["## Tasks"]
  for heading, figures, scale, number in (
    ("Bits per byte of right answers", dict.fromkeys(_FORMS, _BPB), 1, ".4f"),
    ("Accuracy in percent (rc: per byte)", ACCURACY, 100, ".1f"),
  ):
    rows = _means(groups, figures, scale, number)
    if not rows:
      continue
    parts += [
      f"{heading}, mean ± sample standard deviation over seeds",
      tables.markdown(
        ["task", *(group.label for group in groups), "chance"], rows
      ),
    ]
    rows = _differences(groups, figures, scale, number)
    if rows:
      others = [group.label for group in groups[1:]]
      parts += [
        f"{heading}: difference from {groups[0].label}, paired by document and"
        " seed, ± standard error over documents / over seeds",
        tables.markdown(["task", *others], rows),
      ]
  return parts


_FORMS, _BPB = ("rc", "mc", "bpb"), "bits_per_byte"


def _rows_of(
  groups: Sequence[RunsOfGroup], kind: str, figures: Mapping[str, str]
) -> dict[str, str]:
  """Returns the tasks or groups of tasks that all runs have.

  Args:
    groups: of runs.
    kind: "tasks" or "groups".
    figures: by form, the figure that they must have.

  Returns:
    The figure of each by name.
  """
  runs = [run for group in groups for run in group.by_seed.values()]
  found = {}
  for name, row in runs[0][kind].items():
    form = row["form"] if kind == "tasks" else name.rpartition(".")[2]
    figure = figures.get(form)
    if (kind == "tasks" or row["tasks"] > 1) and all(
      figure in run[kind].get(name, {"figures": ()})["figures"] for run in runs
    ):
      found[name] = figure
  return found


def _means(
  groups: Sequence[RunsOfGroup],
  figures: Mapping[str, str],
  scale: float,
  number: str,
) -> list[list[str]]:
  rows = []
  for kind, title in (("tasks", "{}"), ("groups", "mean of {}")):
    for name, figure in _rows_of(groups, kind, figures).items():
      cells = [title.format(name)]
      for group in groups:
        values = scale * np.array(
          [
            run[kind][name]["figures"][figure]["mean"]
            for run in group.by_seed.values()
          ]
        )
        cells.append(format(values.mean(), number))
        if len(values) > 1:
          cells[-1] += f" ± {values.std(ddof=1):{number}}"
      chance = next(iter(groups[0].by_seed.values()))[kind][name]["chance"]
      is_known = figure != _BPB and chance is not None
      cells.append(f"{scale * (chance or 0):.1f}" if is_known else "-")
      rows.append(cells)
  return rows


def _differences(
  groups: Sequence[RunsOfGroup],
  figures: Mapping[str, str],
  scale: float,
  number: str,
) -> list[list[str]]:
  base, *others = groups
  rows: dict[str, list[str]] = {}
  for other in others:
    pairs = [
      (run, other.by_seed[seed])
      for seed, run in base.by_seed.items()
      if seed in other.by_seed
    ]
    of_group: dict[str, list[Difference]] = {}
    for name, figure in _rows_of(groups, "tasks", figures).items():
      difference = paired_difference(pairs, name, figure)
      cells = rows.setdefault(name, [name])
      cells.append(_cell(difference, scale, number))
      if difference:
        task = pairs[0][0]["tasks"][name]
        group = f"{task['group']}.{task['form']}"
        of_group.setdefault(group, []).append(difference)
    for group in _rows_of(groups, "groups", figures):
      members = of_group.get(group)
      mean = mean_difference(members) if members else None
      title = f"mean of {group}"
      rows.setdefault(title, [title]).append(_cell(mean, scale, number))
  return list(rows.values())


def _cell(difference: Difference | None, scale: float, number: str) -> str:
  if difference is None:
    return "-"
  text = format(scale * difference.mean, f"+{number}")
  if difference.document_error is not None:
    text += f" ± {scale * difference.document_error:{number}}"
  if difference.pair_error is not None:
    text += f" / {scale * difference.pair_error:{number}}"
  return text
