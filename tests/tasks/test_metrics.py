"""Figures of tasks against loops in plain Python."""

import math
import random
import statistics

import numpy as np
import pytest

from edl_jax.tasks.metrics import (
  Answers,
  Estimate,
  chance,
  document_figures,
  estimate,
  group_figures,
  macro_average,
)
from edl_jax.text.task_files import Task, TaskDocument


def answers(count=40):
  """Returns documents of two to five answers, as lists of plain numbers."""
  rng = random.Random(0)
  made = []
  for _ in range(count):
    size = rng.randint(2, 5)
    made.append(
      (
        [-rng.uniform(1, 30) for _ in range(size)],
        [-rng.uniform(1, 30) for _ in range(size)],
        [rng.randint(1, 40) for _ in range(size)],
        rng.randrange(size),
      )
    )
  return made


def as_arrays(documents, unconditioned=True):
  return [
    Answers(
      np.array(nats), np.array(alone) if unconditioned else None, size, gold
    )
    for nats, alone, size, gold in (
      (nats, alone, np.array(size), gold)
      for nats, alone, size, gold in documents
    )
  ]


def test_figures_are_those_of_plain_loops():
  documents = answers()
  figures = document_figures("rc", as_arrays(documents))
  assert list(figures) == [
    "bits_per_byte",
    "accuracy",
    "accuracy_per_byte",
    "accuracy_pmi",
  ]
  for i, (nats, alone, size, gold) in enumerate(documents):
    bits = -math.log2(math.exp(nats[gold]))
    assert figures["bits_per_byte"][i] == pytest.approx(bits / size[gold])
    scores = {
      "accuracy": nats,
      "accuracy_per_byte": [n / s for n, s in zip(nats, size)],
      "accuracy_pmi": [n - a for n, a in zip(nats, alone)],
    }
    for name, values in scores.items():
      assert figures[name][i] == (max(values) == values[gold])
  # The three disagree somewhere, or this test would not tell them apart.
  assert len({tuple(x) for x in figures.values()}) == 4


def test_forms_have_the_figures_that_they_allow():
  both = ["bits_per_byte", "accuracy"]
  documents = answers(5)
  assert list(document_figures("mc", as_arrays(documents))) == both
  unknown = as_arrays(documents, unconditioned=False)
  assert list(document_figures("rc", unknown)) == [*both, "accuracy_per_byte"]
  mixed = [*unknown, *as_arrays(documents)]
  assert "accuracy_pmi" not in document_figures("rc", mixed)
  assert list(document_figures("bpb", unknown)) == both[:1]


def test_of_equal_answers_the_first_counts():
  equal = [
    Answers(np.array([-1.0, -1.0]), None, np.array([1, 1]), gold)
    for gold in (0, 1)
  ]
  assert document_figures("mc", equal)["accuracy"].tolist() == [1, 0]


def test_chance_is_the_mean_over_documents():
  def task(form, *sizes):
    documents = tuple(
      TaskDocument(str(i), ("c",) * size, ("x",) * size, 0)
      for i, size in enumerate(sizes)
    )
    return Task("t", form, "g", 0, "none", documents)

  assert chance(task("rc", 2, 4, 4)) == pytest.approx((0.5 + 0.25 + 0.25) / 3)
  assert chance(task("bpb", 1, 1)) is None


def test_standard_errors():
  values = [random.Random(1).gauss(0, 1) for _ in range(30)]
  mean, error = estimate(values)
  assert mean == pytest.approx(statistics.fmean(values))
  assert error == pytest.approx(statistics.stdev(values) / math.sqrt(30))
  # Of zeros and ones it is the binomial error.
  _, error = estimate([1] * 30 + [0] * 70)
  assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
  assert estimate([0.5]) == (0.5, None)


def test_the_error_of_a_macro_average_is_that_of_resampled_documents():
  rng = np.random.default_rng(0)
  tasks = [rng.normal(size=size) for size in (20, 50, 400)]
  mean, error = macro_average([estimate(values) for values in tasks])
  assert mean == pytest.approx(np.mean([values.mean() for values in tasks]))
  resampled = [
    np.mean([rng.choice(values, len(values)).mean() for values in tasks])
    for _ in range(4000)
  ]
  assert error == pytest.approx(np.std(resampled), rel=0.06)
  assert macro_average([estimate([1, 2]), estimate([3])]) == (2.25, None)


def test_groups_have_the_figures_that_all_members_have():
  one, two = Estimate(1.0, 0.3), Estimate(3.0, 0.4)
  groups = group_figures(
    {
      "a": {"bits_per_byte": one, "accuracy": one},
      "b": {"bits_per_byte": two},
      "c": {"accuracy": two},
    },
    {"a": "g", "b": "g", "c": "h"},
  )
  assert groups == {
    "g": {"bits_per_byte": (2.0, pytest.approx(0.25))},
    "h": {"accuracy": two},
  }
