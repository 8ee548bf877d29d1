"""The noise of held-out rows in the study's differences."""

import csv
import json
import pathlib

import numpy as np
import pytest

from docs.study import noise, page
from docs.study.questions import Condition, Question
from edl_jax import sweep
from edl_jax.config import UserError
from tests.test_sweep import TINY

WEIGHT = "losses.divergence_weight"
QUESTION = Question(
  "example",
  ("weights",),
  [
    Condition("none", {WEIGHT: "0.0"}),
    Condition("some", {WEIGHT: "0.3"}, "none"),
  ],
  (("LM loss", "lm_loss", ".3f"),),
  noise=True,
)


def drawn(rng, sources, rows, length):
  """Returns two runs' rows; `length` neighbours are parts of one document."""
  before, after = [], []
  for source in range(sources):
    tokens = rng.integers(50, 128, rows).astype(float)
    first = 3 * tokens + rng.normal(0, 20, rows)
    own = np.repeat(rng.normal(0, 0.05, rows // length), length)
    before.append(np.stack([first, tokens], -1))
    after.append(np.stack([first + (0.01 * source + own) * tokens, tokens], -1))
  return before, after


def test_noise_is_the_spread_over_draws_of_rows():
  rng = np.random.default_rng(0)
  found = np.array(
    [noise.difference(*drawn(rng, 3, 320, 10)) for _ in range(400)]
  )
  spread = found[:, 0].std()
  # Without blocks it would be sqrt(10) times too small.
  assert np.sqrt(np.square(found[:, 1]).mean()) == pytest.approx(
    spread, rel=0.1
  )
  assert found[:, 0].mean() == pytest.approx(0.01, abs=4 * spread / 20)


def test_difference_of_equal_runs_is_zero():
  before, _ = drawn(np.random.default_rng(1), 2, 40, 1)
  assert noise.difference(before, before) == (0, 0)


def test_rows_that_cannot_be_compared_are_refused():
  before, after = drawn(np.random.default_rng(1), 2, 40, 1)
  with pytest.raises(UserError, match="one held-out row"):
    noise.difference([before[0][:1]], [after[0][:1]])
  after[1][3, 1] += 1
  with pytest.raises(UserError, match="other held-out rows"):
    noise.difference(before, after)


def test_table_has_a_line_for_each_row():
  rows = [
    {
      "question": name,
      "condition": label,
      "seeds": "3",
      "rows": rows,
      "difference": "-0.01234",
      "standard_error": "0.00126",
    }
    for name, label, rows in (
      ("example", "some", "1248"),
      ("example", "some", "10771"),
      ("other", "some", "7"),
    )
  ]
  assert page.noise_table(QUESTION, rows).splitlines()[2:] == [
    "| some | 3 | 1,248 | -0.0123 | 0.0013 |",
    "| some | 3 | 10,771 | -0.0123 | 0.0013 |",
  ]


def test_without_pairs_it_says_so(tmp_path, capsys):
  assert noise.main([f"--runs={tmp_path}", f"--out={tmp_path / 'x.csv'}"]) == 2
  assert "no two finished runs are a pair" in capsys.readouterr().err


@pytest.mark.slow
def test_differences_are_those_of_the_runs(tmp_path, monkeypatch):
  runs = tmp_path / "runs"
  assert not sweep.main(
    [
      f"--experiment={TINY}",
      f"--workdir={runs / 'weights'}",
      f"--grid={WEIGHT}=0,0.3",
      "--grid=seed=0,1",
      "--experiment.train.num_steps=6",
      "--experiment.train.eval_every=6",
    ]
  )
  monkeypatch.setattr(noise, "QUESTIONS", (QUESTION,))
  flags = [f"--runs={runs}", f"--out={tmp_path / 'noise.csv'}"]
  assert not noise.main(flags)
  with (tmp_path / "noise.csv").open(newline="") as file:
    evaluated, every = csv.DictReader(file)
  losses = {
    path.parent.name: json.loads(path.read_text())["eval"]["domains"]
    for path in runs.glob("*/*/result.json")
  }
  assert len(losses) == 4
  change = np.mean(
    [
      losses[f"divergence_weight=0.3,seed={seed}"][domain]["lm_loss"]
      - losses[f"divergence_weight=0,seed={seed}"][domain]["lm_loss"]
      for seed in (0, 1)
      for domain in losses["divergence_weight=0,seed=0"]
    ]
  )
  assert abs(change) > 1e-5
  assert float(evaluated["difference"]) == pytest.approx(change, rel=1e-3)
  assert evaluated["rows"] == str(4 * len(next(iter(losses.values()))))
  assert int(every["rows"]) > 5 * int(evaluated["rows"])
  assert float(every["standard_error"]) < float(evaluated["standard_error"])
  # Known losses are read again: the text and the checkpoints may be gone.
  before = pathlib.Path(tmp_path / "noise.csv").read_bytes()
  monkeypatch.setattr(noise, "load", None)
  assert not noise.main(flags)
  assert pathlib.Path(tmp_path / "noise.csv").read_bytes() == before
