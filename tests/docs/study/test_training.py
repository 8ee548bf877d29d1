"""Differences of the study's training losses."""

import numpy as np

from docs.study import training
from docs.study.questions import Condition, Question

QUESTION = Question(
  "example",
  ("runs",),
  [
    Condition("none", {"edl": "0"}),
    Condition("some", {"edl": "1"}, "none"),
    Condition("never run", {"edl": "2"}, "none"),
  ],
  (("LM loss", "lm_loss", ".3f"),),
  by_quarter=True,
)


def row(edl, seed, losses, text="one"):
  # In the order of a CSV file's columns, which need not be that of the tokens.
  columns = {
    f"train_loss@{100 * step}": str(loss)
    for step, loss in reversed([*enumerate(losses, start=1)])
  }
  return {"edl": edl, "seed": str(seed), "text": text} | columns


def test_quarters_are_means_over_their_batches():
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(2, 20))
  first, second = {4: row("0", 4, before)}, {4: row("1", 4, after)}
  expected = [
    (after - before)[5 * quarter : 5 * quarter + 5].mean()
    for quarter in range(4)
  ]
  np.testing.assert_allclose(training.differences(first, second), [expected])


def test_table_pairs_runs_of_one_seed_and_text():
  rows = [
    row("0", 0, [4.0, 3.0, 2.0, 1.0]),
    row("1", 0, [3.9, 3.0, 2.0, 1.1]),
    row("0", 1, [4.0, 3.0, 2.0, 1.0]),
    row("1", 1, [3.7, 3.0, 2.0, 1.1]),
    # No pairs: another text, no partner, no logged losses.
    row("0", 2, [4.0, 3.0, 2.0, 1.0]),
    row("1", 2, [9.0, 9.0, 9.0, 9.0], text="other"),
    row("1", 3, [9.0, 9.0, 9.0, 9.0]),
    row("0", 5, []),
    row("1", 5, []),
  ]
  assert training.table(QUESTION, rows).splitlines() == [
    "| condition | seeds | first quarter | second | third | last |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
    "| some | 2 | -0.200 ± 0.141 | +0.000 ± 0.000 | +0.000 ± 0.000 |"
    " +0.100 ± 0.000 |",
  ]
  assert training.table(QUESTION, rows[:1]) == ""
