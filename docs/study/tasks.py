"""Writes the table of benchmark tasks of a run without and one with divergence.

  python -m docs.study.tasks --runs=runs/web3/baseline,runs/web3/fine
  python -m docs.study.tasks

The first keeps the groups' figures of the two runs' tasks.json in
docs/study/tasks.json. Both put the table that follows from this file between
the marks of docs/study/tasks.md. The text around it is written by hand.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.study.page import filled
from edl_jax import storage, tables
from edl_jax.analysis.task_comparison import (
  ACCURACY,
  Tasks,
  mean_difference,
  paired_difference,
  read_tasks,
)
from edl_jax.command import Command
from edl_jax.config import UserError

COMMAND = Command(__doc__)
_RUNS = COMMAND.flag(
  "runs", (), "Folders of the two runs to read, the one without the loss first."
)
_FOLDER = COMMAND.flag(
  "folder", str(Path(__file__).parent), "Folder of tasks.json and the page."
)


def collected(first: Tasks, second: Tasks) -> dict[str, Any]:
  """Returns the figures of groups, and how the second run differs.

  Of each figure both runs' means with their standard errors, and the difference
  paired by document, second less first.

  Args:
    first, second: tasks.json of two runs on the same documents.

  Raises:
    UserError: they differ in files, documents or the tokens read.
  """
  groups = {}
  for group, row in first["groups"].items():
    names = [
      name
      for name, task in first["tasks"].items()
      if f"{task['group']}.{task['form']}" == group
    ]
    figures = {}
    for figure in ("bits_per_byte", ACCURACY.get(group.rpartition(".")[2], "")):
      if figure not in row["figures"]:
        continue
      differences = [
        found
        for name in names
        if (found := paired_difference([(first, second)], name, figure))
      ]
      documents = sum(each.documents for each in differences)
      if documents != sum(first["tasks"][name]["documents"] for name in names):
        raise UserError(f"{group}: the runs were evaluated on other documents")
      difference = mean_difference(differences)
      figures[figure] = {
        "runs": [
          run["groups"][group]["figures"][figure] for run in (first, second)
        ],
        "difference": {
          "mean": difference.mean,
          "standard_error": difference.document_error,
        },
      }
    groups[group] = {
      "tasks": len(names),
      "documents": sum(first["tasks"][name]["documents"] for name in names),
      "chance": row["chance"],
      "figures": figures,
    }
  return {"max_length": first["max_length"], "groups": groups}


def _cells(
  figure: Mapping[str, Any] | None, scale: float, number: str
) -> list[str]:
  """Returns both runs' cells and that of the difference."""
  if figure is None:
    return ["-"] * 3

  def cell(value: Mapping[str, Any], number: str) -> str:
    text = format(scale * value["mean"], number)
    if value["standard_error"] is None:
      return text
    return f"{text} ± {scale * value['standard_error']:{number.lstrip('+')}}"

  return [
    *(cell(each, number) for each in figure["runs"]),
    cell(figure["difference"], f"+{number}"),
  ]


def table(results: Mapping[str, Any]) -> str:
  """Returns the table as Markdown, a row for each group and form."""
  rows: list[Sequence[str]] = []
  for name, group in results["groups"].items():
    figures, chance = group["figures"], group["chance"]
    accuracy = figures.get(ACCURACY.get(name.rpartition(".")[2], ""))
    rows.append(
      [
        f"`{name}`",
        f"{group['tasks']}, {group['documents']:,}",
        *_cells(figures["bits_per_byte"], 1, ".3f"),
        *_cells(accuracy, 100, ".1f"),
        "-" if chance is None or accuracy is None else f"{100 * chance:.1f}",
      ]
    )
  headings = ["group", "tasks, documents"]
  for figure in ("bits/byte", "accuracy"):
    headings += [f"{figure}, baseline", "EDL", "difference"]
  return tables.markdown([*headings, "chance"], rows)


@COMMAND.main
def main() -> None:
  """Collects two runs' figures, if they are named, and writes the table."""
  folder = Path(_FOLDER.value)
  path, page = folder / "tasks.json", folder / "tasks.md"
  folders: tuple[str, ...] = _RUNS.value
  if folders:
    runs = [read_tasks(each) for each in folders]
    if len(runs) != 2 or runs[0] is None or runs[1] is None:
      raise UserError("--runs needs two runs that have a tasks.json")
    storage.write_json(str(path), collected(runs[0], runs[1]), indent=1)
  results = json.loads(path.read_text())
  text = filled(page.read_text(), {"tasks": table(results)})
  storage.write_bytes(page, text.encode())
  print(f"written to {page}: {len(results['groups'])} groups")


if __name__ == "__main__":
  sys.exit(main())
