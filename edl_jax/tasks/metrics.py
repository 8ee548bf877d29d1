"""What log-likelihoods of answers say about a task: figures and their errors.

This module imports no JAX: reports read its figures without a device.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edl_jax.text.task_files import Task

LN_2 = math.log(2.0)

# The figures of a task, in the order of tables: name and heading.
HEADINGS = {
  "bits_per_byte": "bits/byte",
  "accuracy": "accuracy",
  "accuracy_per_byte": "per byte",
  "accuracy_pmi": "PMI",
}


class Answers(NamedTuple):
  """How likely a model finds the possible answers of a document."""

  # Log-likelihood of each answer after its context, in nats, (I,).
  nats_I: np.ndarray
  # The same after the context without the question, (I,); None if unknown.
  unconditioned_I: np.ndarray | None
  # UTF-8 bytes of each answer, as its task file writes it, (I,).
  bytes_I: np.ndarray
  # Index of the right answer.
  gold: int


class Estimate(NamedTuple):
  """The mean of a figure over documents."""

  mean: float
  # Standard error of the mean; None for a single document.
  standard_error: float | None


def document_figures(
  form: str, answers: Sequence[Answers]
) -> dict[str, np.ndarray]:
  """Computes the figures of a task for each of its N documents.

  Args:
    form: of the task: "rc", "mc" or "bpb".
    answers: of each document.

  Returns:
    Arrays, float64 (N,), by name:
      bits_per_byte: -log2 p(right answer | context) over its UTF-8 bytes.
      accuracy: 1 where the right answer is the likeliest, else 0.
      accuracy_per_byte: the same by log-likelihood over UTF-8 bytes.
      accuracy_pmi: the same by log p(answer | context) less log p(answer |
        context without the question), pointwise mutual information.
    "bpb" has the first alone, "mc" the first two, since letters are equally
    long. The last needs the unconditioned log-likelihood of every document. Of
    equally likely answers, the first counts.
  """
  figures = {
    "bits_per_byte": [
      -each.nats_I[each.gold] / LN_2 / each.bytes_I[each.gold]
      for each in answers
    ]
  }

  def right(score_I: np.ndarray, each: Answers) -> bool:
    return int(np.argmax(score_I)) == each.gold

  if form != "bpb":
    figures["accuracy"] = [right(each.nats_I, each) for each in answers]
  if form == "rc":
    figures["accuracy_per_byte"] = [
      right(each.nats_I / each.bytes_I, each) for each in answers
    ]
    if all(each.unconditioned_I is not None for each in answers):
      figures["accuracy_pmi"] = [
        right(each.nats_I - each.unconditioned_I, each) for each in answers
      ]
  return {name: np.array(x, np.float64) for name, x in figures.items()}


def chance(task: Task) -> float | None:
  """Returns the accuracy of guessing; None if there is nothing to choose."""
  if task.form == "bpb":
    return None
  return float(np.mean([1 / len(d.continuations) for d in task.documents]))


def estimate(values: Iterable[float]) -> Estimate:
  """Returns a mean with its standard error, s / sqrt(N).

  s is the sample standard deviation. For values 0 and 1 this is the binomial
  error sqrt(p (1 - p) / (N - 1)).
  """
  values_N = np.array(list(values), np.float64)
  mean = float(values_N.mean())
  if len(values_N) < 2:
    return Estimate(mean, None)
  return Estimate(mean, float(values_N.std(ddof=1) / math.sqrt(len(values_N))))


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
  """Returns the unweighted mean over tasks.

  Its standard error, sqrt(sum of squared errors) / tasks, is that over the
  documents of these very tasks.
  """
  mean = float(np.mean([each.mean for each in estimates]))
  errors = [
    each.standard_error for each in estimates if each.standard_error is not None
  ]
  if len(errors) < len(estimates):
    return Estimate(mean, None)
  return Estimate(mean, math.hypot(*errors) / len(errors))


def group_figures(
  tasks: Mapping[str, Mapping[str, Estimate]], groups: Mapping[str, str]
) -> dict[str, dict[str, Estimate]]:
  """Returns macro averages by group, of the figures that all its tasks have.

  Args:
    tasks: the figures of each task by name.
    groups: the group of each task, in the same order.
  """
  members: dict[str, list[Mapping[str, Estimate]]] = {}
  for name, figures in tasks.items():
    members.setdefault(groups[name], []).append(figures)
  return {
    group: {
      figure: macro_average([each[figure] for each in some])
      for figure in some[0]
      if all(figure in each for each in some)
    }
    for group, some in members.items()
  }
