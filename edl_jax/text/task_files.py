"""Benchmark tasks as files: one question a line, in JSON.

`python -m data.benchmarks` writes such files, and users write their own. The
shortest line is

  {"context": "2 + 2 =", "continuations": [" 4", " 5"], "gold": 0}

and these are all the keys:

  context        the text before the answer, shots included; a list, with one
                 text for each continuation, where the choices differ in it
  continuations  the possible answers, as they follow the context: most begin
                 with a space
  gold           index of the right continuation, from 0
  id             name of the document, unique in the file; its number, from 1
  unconditioned  what stands before a continuation where PMI normalisation
                 scores it without the question, such as "Answer:"; null
  task           name of the task; the file's name up to its first dot
  form           "rc" (the choices' texts are scored), "mc" (their letters) or
                 "bpb" (a single continuation, the gold answer); "bpb" where
                 there is one continuation, else "rc"
  group          tasks of one group are averaged; the task's name
  shots          number of solved examples in the context; 0
  licence        what the data's publisher says; "not stated"

The first three are required; the rest have the defaults that come after the
semicolon. The last five are the same on every line. Other keys are ignored.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from edl_jax.config import UserError
from edl_jax.text.readers import Record, SeenIds, read_json_lines

FORMS = ("rc", "mc", "bpb")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class TaskDocument:
  """A question and its possible answers."""

  id: str
  # One for each continuation; equal strings unless the choices differ in it.
  contexts: tuple[str, ...]
  continuations: tuple[str, ...]
  # Index of the right continuation.
  gold: int
  # The context that PMI normalisation scores continuations after.
  unconditioned: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
  """The documents of one task in one form."""

  name: str
  # One of FORMS.
  form: str
  group: str
  # Solved examples in each context.
  shots: int
  licence: str
  documents: tuple[TaskDocument, ...]


def task_files(folder: str) -> dict[str, str]:
  """Returns the paths of a folder's task files by name, such as "piqa.rc".

  Raises:
    UserError: there are none.
  """
  names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  found = {
    name.split(".jsonl")[0]: os.path.join(folder, name)
    for name in names
    if name.endswith(_SUFFIXES) and not name.startswith(".")
  }
  if not found:
    raise UserError(
      f"{folder}: no task files (NAME.jsonl); python -m data.benchmarks"
      f" --out={folder} writes some"
    )
  return found


def read_task(path: str, most: int | None = None) -> Task:
  """Reads a task file.

  Args:
    path: of the file.
    most: number of documents after which reading ends; None reads all.

  Raises:
    UserError: the file cannot be read, or a line is wrong; names the line.
  """
  first: dict[str, Any] = {}
  documents, seen = [], SeenIds()
  lines = itertools.islice(read_json_lines(path), most)
  for number, (where, record) in enumerate(lines, 1):
    if isinstance(record, UserError):
      raise record
    document = _document(record, where, str(number))
    if problem := seen.problem({"id": document.id}, where):
      raise problem
    documents.append(document)
    common = _common(record, where, path, len(document.continuations))
    first = first or common
    for key, value in common.items():
      if value != first[key]:
        raise UserError(
          f"{where}: {key} is {value!r}, but {first[key]!r} on the first line"
        )
  if not documents:
    raise UserError(f"{path}: empty file")
  return Task(name=first.pop("task"), **first, documents=tuple(documents))


def task_lines(task: Task) -> Iterator[bytes]:
  """Yields the lines of a task's file, each with its line end."""
  for document in task.documents:
    shared = len(set(document.contexts)) == 1
    record = {
      "task": task.name,
      "form": task.form,
      "group": task.group,
      "id": document.id,
      "context": document.contexts[0] if shared else document.contexts,
      "continuations": document.continuations,
      "gold": document.gold,
      "unconditioned": document.unconditioned,
      "shots": task.shots,
      "licence": task.licence,
    }
    yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def task_texts(task: Task) -> Iterator[str]:
  """Yields the text of each document, its right answer included.

  What all contexts begin with, the shots, comes once, as the first text.
  """
  contexts = [document.contexts[document.gold] for document in task.documents]
  # All contexts lie between these two in order, so that what these two begin
  # with, all begin with.
  first, last = min(contexts), max(contexts)
  size = next(
    (n for n, pair in enumerate(zip(first, last)) if len(set(pair)) > 1),
    min(len(first), len(last)),
  )
  # Whole lines, so that every later text begins with a line.
  shared = first[: first.rfind("\n", 0, size) + 1]
  yield shared
  for context, document in zip(contexts, task.documents):
    yield context[len(shared) :] + document.continuations[document.gold]


def _document(record: Record, where: str, number: str) -> TaskDocument:
  """Returns the document of a line; `number` is its id without one."""
  continuations = _texts(record, "continuations", list, where)
  if not continuations or not all(continuations):
    raise UserError(f"{where}: continuations must hold texts, none empty")
  context = _texts(record, "context", (str, list), where)
  if isinstance(record["context"], str):
    context *= len(continuations)
  if len(context) != len(continuations):
    raise UserError(
      f"{where}: {len(context)} contexts for {len(continuations)} continuations"
    )
  gold = _value(record, "gold", int, where)
  if not 0 <= gold < len(continuations):
    raise UserError(
      f"{where}: gold={gold} is not the index of one of"
      f" {len(continuations)} continuations, counted from 0"
    )
  unconditioned = _texts(record, "unconditioned", str, where, None)
  return TaskDocument(
    id=str(_value(record, "id", (str, int), where, number)),
    contexts=context,
    continuations=continuations,
    gold=gold,
    unconditioned=unconditioned[0] if unconditioned else None,
  )


def _common(
  record: Record, where: str, path: str, num_continuations: int
) -> dict[str, Any]:
  """Returns the keys that are the same on every line of a file."""
  name = _value(
    record, "task", str, where, os.path.basename(path).split(".")[0]
  )
  natural = "bpb" if num_continuations == 1 else "rc"
  form = _value(record, "form", str, where, natural)
  if form not in FORMS:
    raise UserError(f"{where}: form {form!r} is none of {', '.join(FORMS)}")
  if (form == "bpb") != (num_continuations == 1):
    needed = "one continuation" if form == "bpb" else "several continuations"
    raise UserError(
      f"{where}: form {form!r} needs {needed}, not {num_continuations}"
    )
  return {
    "task": name,
    "form": form,
    "group": _value(record, "group", str, where, name),
    "shots": _value(record, "shots", int, where, 0),
    "licence": _value(record, "licence", str, where, NOT_STATED),
  }


_REQUIRED = object()
_KINDS = {str: "a string", int: "an integer", list: "a list"}


def _value(
  record: Record,
  key: str,
  kinds: type | tuple[type, ...],
  where: str,
  default: Any = _REQUIRED,
) -> Any:
  """Returns a value of one of `kinds`; null is the same as no such key."""
  value = record.get(key)
  if value is None:
    if default is _REQUIRED:
      raise UserError(f"{where}: key {key!r} is missing")
    return default
  kinds = kinds if isinstance(kinds, tuple) else (kinds,)
  # In Python, a truth value is an integer.
  if not isinstance(value, kinds) or isinstance(value, bool):
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    raise UserError(
      f"{where}: {key} must be {wanted}, not {type(value).__name__}"
    )
  return value


def _texts(
  record: Record,
  key: str,
  kinds: type | tuple[type, ...],
  where: str,
  default: Any = _REQUIRED,
) -> tuple[str, ...]:
  """Returns the texts of a value, a string or a list of strings."""
  value = _value(record, key, kinds, where, default)
  if value is None:
    return ()
  texts = [value] if isinstance(value, str) else value
  for text in texts:
    if not isinstance(text, str):
      raise UserError(
        f"{where}: {key} must hold strings, not {type(text).__name__}"
      )
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(f"{where}: {key} holds half a surrogate pair") from error
  return tuple(texts)
