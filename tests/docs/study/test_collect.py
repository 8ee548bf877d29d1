"""What is copied from the study's runs."""

import csv
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


def test_runs_become_rows(tmp_path, capsys):
  for seed in range(2):
    experiment = config_files.load(TINY, {"seed": str(seed)})
    folder = tmp_path / "runs" / "balance" / f"seed={seed}"
    folder.mkdir(parents=True)
    result = make_result(experiment, 3.0 + seed)
    (folder / "result.json").write_text(json.dumps(result))
  (tmp_path / "runs" / "begun").mkdir()
  flags = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
  assert not collect.main(flags)
  assert "balance.csv: 2 runs" in capsys.readouterr().out
  with (tmp_path / "out" / "balance.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["lm_loss"] for row in rows] == ["3.0", "4.0"]
  assert [row["tokens"] for row in rows] == [str(20 * 8 * 64)] * 2
  assert rows[0]["losses.divergence_weight"] == "0.01"
  assert rows[0]["lm_loss/legal"] == "6.0"


def test_without_finished_runs_it_says_so(tmp_path, capsys):
  assert collect.main([f"--runs={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
  assert "no run in it is finished" in capsys.readouterr().err


def test_settings_exist():
  assert set(collect.SETTINGS) <= set(config.flatten(config.Experiment()))
  for question in QUESTIONS:
    for condition in question.conditions:
      experiment = config.flatten(config.Experiment())
      for key, value in condition.where.items():
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
  with open("out/truth.csv", newline="") as file:
    (row,) = csv.DictReader(file)
  manifest = json.loads((tmp_path / "markov" / "manifest.json").read_text())
  mixture = MarkovMixture(**manifest["mixture"])
  known = float(row["best_loss/known"])
  # 48 rows of 64 tokens; each has a start or a cut document's first symbol.
  assert known == pytest.approx(mixture.entropy + 0.03, abs=0.06)
  assert known < float(row["best_loss/inferred"]) < known + 0.1
  assert float(row["lm_loss"]) > np.log(len(ALPHABET)) / 2
