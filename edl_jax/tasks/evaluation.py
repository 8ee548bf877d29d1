"""Evaluates a model on tasks: from documents to the content of tasks.json."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from edl_jax import tables
from edl_jax.config import UserError
from edl_jax.model.transformer import Model
from edl_jax.tasks import metrics
from edl_jax.tasks.metrics import Answers, Estimate
from edl_jax.tasks.routing import (
  DomainRouting,
  nearest_domain,
  routing_by_task,
)
from edl_jax.tasks.scoring import Score, score_texts
from edl_jax.tasks.selection import Selected
from edl_jax.tasks.windows import Window, encode_pairs, windows_of
from edl_jax.text.task_files import Task, TaskDocument
from edl_jax.text.tokenizer import Tokenizer


class _Texts(NamedTuple):
  """Where the texts of a document are among all texts."""

  # Of each continuation after its context.
  answers: Sequence[int]
  # Of each continuation without the question; None where that is not asked.
  unconditioned: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class EncodedTasks:
  """Tasks as tokens, which any model of the tokenizer can score."""

  selected: Mapping[str, Selected]
  # Most tokens that the model reads at a time.
  max_length: int
  # The windows of each text, and the label of its routing: the index of the
  # task for a context with the right answer, else -1.
  windows: list[list[Window]]
  labels: list[int]
  # Of each document of each task.
  texts: dict[str, list[_Texts]]


def encode_tasks(
  selected: Mapping[str, Selected], tokenizer: Tokenizer, max_length: int
) -> EncodedTasks:
  """Tokenises the documents of tasks.

  Raises:
    UserError: the tokenizer cannot encode a text; names task and document.
  """
  encoded = EncodedTasks(selected, max_length, [], [], {})
  for label, (name, each) in enumerate(selected.items()):
    pairs, owners, texts = _pairs(each.task, len(encoded.windows))
    tokens = encode_pairs(
      tokenizer,
      pairs,
      lambda i, name=name, owners=owners: (
        f"{name}, document {owners[i - 1].id!r}"
      ),
    )
    encoded.windows.extend(
      windows_of(*one, max_length=max_length) for one in tokens
    )
    gold = {
      text.answers[document.gold]
      for text, document in zip(texts, each.task.documents)
    }
    first = len(encoded.labels)
    encoded.labels.extend(
      label if first + i in gold else -1 for i in range(len(pairs))
    )
    encoded.texts[name] = texts
  return encoded


def _pairs(
  task: Task, start: int
) -> tuple[list[tuple[str, str]], list[TaskDocument], list[_Texts]]:
  """Returns the texts to score, each one's document, and where they are.

  Args:
    task: its documents.
    start: number of the first text.
  """
  pairs: list[tuple[str, str]] = []
  owners: list[TaskDocument] = []
  texts = []
  # Many documents share the texts without the question, which is scored once.
  known: dict[tuple[str, str], int] = {}

  def add(pair: tuple[str, str], document: TaskDocument) -> int:
    pairs.append(pair)
    owners.append(document)
    return start + len(pairs) - 1

  asks_pmi = task.form == "rc" and all(
    document.unconditioned is not None for document in task.documents
  )
  for document in task.documents:
    answers = [
      add(pair, document)
      for pair in zip(document.contexts, document.continuations)
    ]
    unconditioned = None
    if asks_pmi:
      unconditioned = []
      for continuation in document.continuations:
        pair = (document.unconditioned or "", continuation)
        if pair not in known:
          known[pair] = add(pair, document)
        unconditioned.append(known[pair])
    texts.append(_Texts(answers, unconditioned))
  return pairs, owners, texts


def evaluate_tasks(
  model: Model,
  encoded: EncodedTasks,
  mesh: Mesh,
  batch_tokens: int = 8192,
  domains: DomainRouting | None = None,
  say: Callable[[str], object] = warnings.warn,
) -> dict[str, Any]:
  """Evaluates a model on tasks.

  With several processes, all must call this with the same tasks.

  Args:
    model: laid out on `mesh`.
    encoded: from `encode_tasks`, with the model's tokenizer.
    mesh, batch_tokens, say: see `scoring.score_texts`.
    domains: how the model routes its training domains, if that is known.

  Returns:
    What docs/benchmarks.md says of tasks.json, apart from the run.

  Raises:
    UserError: the devices have too little memory for one row, or the model's
      likelihoods are not finite.
  """
  names = list(encoded.selected)
  scores, routing = score_texts(
    *(model, encoded.windows, encoded.max_length, mesh, batch_tokens),
    *(encoded.labels, len(names), say),
  )
  if not np.isfinite([each.log_likelihood for each in scores]).all():
    raise UserError("the model is damaged: its likelihoods are not finite")
  estimates: dict[str, dict[str, Estimate]] = {}
  tasks: dict[str, Any] = {}
  for name, each in encoded.selected.items():
    figures = metrics.document_figures(
      each.task.form, _answers(each.task, encoded.texts[name], scores)
    )
    estimates[name] = {
      figure: metrics.estimate(values) for figure, values in figures.items()
    }
    tasks[name] = {
      **_described(each),
      "truncated": sum(
        any(scores[i].truncated for i in text.answers)
        for text in encoded.texts[name]
      ),
      "figures": _as_json(estimates[name]),
      "by_document": {
        "id": [document.id for document in each.task.documents],
        **{figure: values.tolist() for figure, values in figures.items()},
      },
    }
  return {
    "max_length": encoded.max_length,
    "tasks": tasks,
    "groups": _groups(tasks, estimates),
    "routing": routing_by_task(
      names, routing, domains, model.config.num_dense_layers
    ),
  }


def _described(selected: Selected) -> dict[str, Any]:
  """Returns what tasks.json says about a task apart from the model."""
  task = selected.task
  return {
    "task": task.name,
    "form": task.form,
    "group": task.group,
    "shots": task.shots,
    "sha256": selected.sha256,
    "documents": len(task.documents),
    "documents_of_file": selected.num_documents,
    "chance": metrics.chance(task),
  }


def _answers(
  task: Task, texts: Sequence[_Texts], scores: Sequence[Score]
) -> list[Answers]:
  def nats(indices: Sequence[int]) -> np.ndarray:
    return np.array([scores[i].log_likelihood for i in indices])

  return [
    Answers(
      nats_I=nats(text.answers),
      unconditioned_I=None
      if text.unconditioned is None
      else nats(text.unconditioned),
      bytes_I=np.array([len(c.encode()) for c in document.continuations]),
      gold=document.gold,
    )
    for text, document in zip(texts, task.documents)
  ]


def _as_json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
  return {name: value._asdict() for name, value in figures.items()}


def _groups(
  tasks: Mapping[str, Mapping[str, Any]],
  estimates: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, Any]:
  """Returns the macro averages of groups, each form by itself."""
  group_of = {
    name: f"{task['group']}.{task['form']}" for name, task in tasks.items()
  }
  groups = {}
  for group, figures in metrics.group_figures(estimates, group_of).items():
    members = [tasks[name] for name in tasks if group_of[name] == group]
    chances = [each["chance"] for each in members]
    groups[group] = {
      "tasks": len(members),
      "chance": None if None in chances else float(np.mean(chances)),
      "figures": _as_json(figures),
    }
  return groups


def table(result: Mapping[str, Any]) -> list[str]:
  """Returns the lines of a table: a row for each task and for each group.

  Accuracies are in percent. One of multiple choice by letters that is not three
  standard errors above chance says so: small models guess there.

  Args:
    result: from `evaluate_tasks`.
  """
  headings = ["task", "documents", "cut", *metrics.HEADINGS.values(), "chance"]
  rows = [[*headings, "nearest domain"]]
  for name, task in result["tasks"].items():
    counts = [f"{task['documents']:,}", f"{task['truncated']:,}"]
    nearest = nearest_domain(result["routing"], name) or "-"
    rows.append([name, *counts, *_cells(task, task["form"] == "mc"), nearest])
  for name, group in result["groups"].items():
    if group["tasks"] > 1:
      counts = [f"{group['tasks']:,} tasks", ""]
      is_mc = name.endswith(".mc")
      rows.append([f"mean of {name}", *counts, *_cells(group, is_mc), ""])
  return tables.aligned(rows, left=(0, len(rows[0]) - 1))


def _cells(row: Mapping[str, Any], letters: bool) -> list[str]:
  """Returns the cells of a row's figures, chance last."""
  chance = row["chance"]
  cells = []
  for name in metrics.HEADINGS:
    if name not in row["figures"]:
      cells.append("-")
      continue
    mean, error = row["figures"][name].values()
    if name == "bits_per_byte":
      cells.append(format_estimate(mean, error, ".4f"))
      continue
    cell = format_estimate(100 * mean, error and 100 * error, ".1f")
    if letters and (error is None or mean - chance < 3 * error):
      cell += " (chance)"
    cells.append(cell)
  return [*cells, "-" if chance is None else f"{100 * chance:.1f}"]


def format_estimate(mean: float, error: float | None, number: str) -> str:
  """Returns "mean ± standard error", as far as there is one."""
  text = format(mean, number)
  return text if error is None else f"{text} ± {error:{number.lstrip('+')}}"
