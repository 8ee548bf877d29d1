"""What is copied from the study's runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data import markov
from docs.study import collect
from docs.study.questions import QUESTIONS
from edl_jax import config, config_files
from edl_jax.text.markov import ALPHABET, MarkovMixture
from tests.test_sweep import ROOT, TINY, make_result


def make_run(folder, overrides, loss):
  """Writes what the study reads of a finished run; returns its result."""
  folder.mkdir(parents=True)
  result = make_result(config_files.load(TINY, overrides), loss)
  result["time"] = {"cpu_seconds": 60.0}
  result["content_hash"] = "0123456789abcdef"
  (folder / "result.json").write_text(json.dumps(result))
  lines = [
    {"step": 10, "eval/lm_loss": loss + 1.0},
    {"step": 15, "train/loss": 9.0},
    {"step": 20, "eval/lm_loss": loss},
  ]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return result


def carved(folder, result):
  """Returns what carving says of two domains with 4 experts."""
  return {
    "workdir": str(folder),
    "step": result["step"],
    "experiment": result["experiment"],
    "points": [
      {"domain": "a", "keep": 4, "loss": 3.5},
      {"domain": "b", "keep": 4, "loss": 2.25},
    ],
    "whole": {"a": {"loss": 3.0}, "b": {"loss": 2.0}},
  }


def test_runs_become_rows(tmp_path, capsys):
  sweep = tmp_path / "runs" / "balance"
  results = [
    make_run(sweep / f"seed={seed}", {"seed": str(seed)}, 3.0 + seed)
    for seed in range(2)
  ]
  (sweep / "carve").mkdir()
  (sweep / "carve" / "carve.json").write_text(
    json.dumps([carved(sweep / "seed=1", results[1])])
  )
  (tmp_path / "runs" / "begun").mkdir()
  flags = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
  assert not collect.main(flags)
  assert "balance.csv: 2 runs" in capsys.readouterr().out
  path = tmp_path / "out" / "balance.csv"
  rows = collect.read_rows(str(path))
  assert [row["lm_loss"] for row in rows] == ["3.0", "4.0"]
  assert [row["tokens"] for row in rows] == [str(20 * 8 * 64)] * 2
  assert rows[0]["losses.divergence_weight"] == "0.01"
  assert rows[0]["text"] == "0123456789ab"
  assert rows[0]["lm_loss/legal"] == "6.0"
  assert rows[1][f"lm_loss@{10 * 8 * 64}"] == "5.0"
  assert [row["carved/4"] for row in rows] == ["", "0.375"]
  # The same runs again change nothing.
  before = path.read_bytes()
  assert not collect.main(flags)
  assert path.read_bytes() == before


def test_rows_of_other_machines_stay(tmp_path):
  for machine, seed, loss in (("a", 0, 3.0), ("b", 0, 5.0), ("b", 1, 4.0)):
    folder = tmp_path / machine / "balance" / f"seed={seed}"
    make_run(folder, {"seed": str(seed)}, loss)
  out = f"--out={tmp_path / 'out'}"
  for machine, losses in (("a", ["3.0"]), ("b", ["5.0", "4.0"])):
    assert not collect.main([f"--runs={tmp_path / machine}", out])
    rows = collect.read_rows(str(tmp_path / "out" / "balance.csv"))
    assert [row["lm_loss"] for row in rows] == losses
  # Back to the first machine: its run of seed 0 replaces the other's.
  assert not collect.main([f"--runs={tmp_path / 'a'}", out])
  rows = collect.read_rows(str(tmp_path / "out" / "balance.csv"))
  assert [row["lm_loss"] for row in rows] == ["3.0", "4.0"]


def test_rows_of_other_texts_stay(tmp_path):
  folder = tmp_path / "runs" / "balance" / "seed=0"
  result = make_run(folder, {}, 3.0)
  flags = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
  assert not collect.main(flags)
  (folder / "result.json").write_text(
    json.dumps(result | {"content_hash": "other"})
  )
  assert not collect.main(flags)
  rows = collect.read_rows(str(tmp_path / "out" / "balance.csv"))
  assert [row["text"] for row in rows] == ["0123456789ab", "other"]


def test_settings_of_older_versions_have_their_defaults(tmp_path):
  old, new = {"seed": "0", "lm_loss": "3"}, {"seed": "0", "lm_loss": "4"}
  schedule = "losses.divergence_schedule"
  path = str(tmp_path / "rows.csv")
  for row, count in (
    (old, 1),
    (new | {schedule: "constant"}, 1),
    (old | {schedule: "decay"}, 2),
    (new, 2),
  ):
    assert collect.write_rows(path, [row], ("seed", schedule)) == count
  rows = collect.read_rows(path)
  assert [row["lm_loss"] for row in rows] == ["4", "3"]


def test_rows_without_a_text_give_way(tmp_path):
  path, key = str(tmp_path / "rows.csv"), ("seed", "text")
  rows = [{"seed": "0"}, {"seed": "1"}, {"seed": "2", "text": "first"}]
  assert collect.write_rows(path, rows, key) == 3
  new = [{"seed": seed, "text": "other"} for seed in ("0", "2")]
  assert collect.write_rows(path, new, key) == 4
  found = [(row["seed"], row["text"]) for row in collect.read_rows(path)]
  assert sorted(found) == [
    *(("0", "other"), ("1", ""), ("2", "first"), ("2", "other")),
  ]


def test_without_finished_runs_it_says_so(tmp_path, capsys):
  assert collect.main([f"--runs={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
  assert "no run in it is finished" in capsys.readouterr().err


def test_settings_exist():
  assert set(collect.SETTINGS) <= set(config.flatten(config.Experiment()))
  for question in QUESTIONS:
    for condition in question.conditions:
      experiment = config.flatten(config.Experiment())
      for key, value in condition.where.items():
        if key in ("text", "sweep"):
          continue
        # As text it must be what a CSV file has.
        parsed = type(experiment[key])(value)
        assert str(parsed) == value


@pytest.mark.slow
def test_best_loss_is_that_of_the_held_out_text(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert not markov.main(
    ["--out=markov", "--sources=3", "--symbols=8", "--characters=30000"]
  )
  subprocess.run(
    [
      sys.executable,
      "-m",
      "edl_jax.main",
      f"--experiment={TINY}",
      "--workdir=runs/truth/one",
      "--experiment.train.num_steps=6",
      "--experiment.train.eval_every=6",
      "--experiment.train.eval_rows=16",
      "--experiment.data.files=markov/text/*.jsonl.gz",
    ],
    check=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert not collect.main(["--runs=runs", "--out=out"])
  (row,) = collect.read_rows("out/truth.csv")
  manifest = json.loads((tmp_path / "markov" / "manifest.json").read_text())
  mixture = MarkovMixture(**manifest["mixture"])
  known = float(row["best_loss/known"])
  # 48 rows of 64 tokens; each has a start or a cut document's first symbol.
  assert known == pytest.approx(mixture.entropy + 0.03, abs=0.06)
  assert known < float(row["best_loss/inferred"]) < known + 0.1
  by_source = [float(row[f"best_loss/known/source_{n}"]) for n in range(3)]
  assert known == pytest.approx(np.mean(by_source))
  assert float(row["lm_loss"]) > np.log(len(ALPHABET)) / 2
