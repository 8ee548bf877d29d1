"""Chooses tasks out of a folder of task files, and documents out of them.

This module imports no JAX: a wrong name or file is refused before a device is
in use.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from edl_jax.config import UserError
from edl_jax.text.task_files import Task, read_task, task_files


@dataclasses.dataclass(frozen=True)
class Selected:
  """A task file, and the documents of it to evaluate."""

  # Its documents are those chosen.
  task: Task
  # Documents of the whole file.
  num_documents: int
  # Of the file, in hexadecimal.
  sha256: str


def select_tasks(
  folder: str, names: Sequence[str] = (), most: int = 0
) -> dict[str, Selected]:
  """Reads the task files that `names` choose.

  Args:
    folder: of the task files, on this machine.
    names: names of tasks, groups, or files without their ending, as "piqa",
      "commonsense" or "piqa.rc". Empty: every file.
    most: most documents of a file, taken evenly from it; 0 takes all.

  Returns:
    What was chosen by the file's name without its ending, sorted.

  Raises:
    UserError: there are no task files, an unknown name (the nearest is named),
      a damaged file (its line is named), or a file that is not the one that the
      folder's manifest.json describes.
  """
  paths = task_files(folder)
  heads = {name: read_task(path, 1) for name, path in paths.items()}
  known: dict[str, set[str]] = {}
  for name, head in heads.items():
    for each in (name, head.name, head.group):
      known.setdefault(each, set()).add(name)
  for each in names:
    if each not in known:
      near = difflib.get_close_matches(each, known, n=1)
      groups = sorted({head.group for head in heads.values()})
      hint = (
        f"did you mean {near[0]}?" if near else f"groups: {', '.join(groups)}"
      )
      raise UserError(f"unknown task {each!r} in {folder}; {hint}")
  chosen = set().union(*(known[each] for each in names)) or set(paths)
  expected = _expected_digests(folder)
  return {
    name: _read(paths[name], expected.get(os.path.basename(paths[name])), most)
    for name in sorted(chosen)
  }


def _read(path: str, expected: str | None, most: int) -> Selected:
  """Reads a task file; `expected` is its digest by the manifest."""
  # The lines first: their errors say more.
  task = read_task(path)
  with open(path, "rb") as file:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  if expected not in (None, sha256):
    raise UserError(
      f"{path}: not the file that manifest.json describes; write it again with"
      f" python -m data.benchmarks --out={os.path.dirname(path)}"
    )
  documents, total = task.documents, len(task.documents)
  if 0 < most < total:
    documents = tuple(documents[i * total // most] for i in range(most))
  return Selected(dataclasses.replace(task, documents=documents), total, sha256)


def _expected_digests(folder: str) -> Mapping[str, str]:
  """Returns the SHA-256 of files by name, as far as a manifest has them."""
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    with open(os.path.join(folder, "manifest.json"), "rb") as file:
      rows = json.load(file)["tasks"].values()
    return {row["file"]: row["sha256"] for row in rows}
  return {}
