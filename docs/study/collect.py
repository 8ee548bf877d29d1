"""Copies what finished runs of the study found into small files.

  python -m docs.study.collect --runs=runs/study

Each folder of --runs is a sweep, as run.sh makes it; its runs become the rows
of docs/study/results/<folder>.csv. Rows of other runs stay, so that parts of
the study can be made at different times and on different machines. A row has
the run's settings and figures; by tokens, its held-out loss, `lm_loss@TOKENS`,
and that of single training batches, `train_loss@TOKENS`; what its loss rises by
with K experts in each layer, `carved/K`; what docs.study.adapt found,
`adapted/...`; and on text of Markov sources, the best loss that the held-out
text allows.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from docs.study import adapt
from edl_jax import config, storage
from edl_jax.analysis import run_text, sweep_report
from edl_jax.analysis.carve import report as carve_report
from edl_jax.analysis.carve import swept
from edl_jax.checkpoint import checkpoint_provenance
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.metrics import read_metrics
from edl_jax.text.input_pipeline import held_out_rows
from edl_jax.text.markov import MarkovMixture

COMMAND = Command(__doc__)
_RUNS = COMMAND.flag("runs", "", "Folder of sweeps.", required=True)
_OUT = COMMAND.flag(
  "out", str(Path(__file__).parent / "results"), "Folder to write."
)

# What tells the runs of the study apart.
SETTINGS = (
  "name",
  "seed",
  "model.num_experts",
  "model.num_active_experts",
  "model.expert_width",
  "model.router",
  "model.balancing",
  "model.pool_min",
  "model.pool_max",
  "losses.balance_scope",
  "losses.divergence_weight",
  "losses.divergence_schedule",
  "train.num_steps",
  "train.accumulation",
  "data.files",
  "data.granularity",
)
# Columns of the training loss after so many tokens, of one batch each.
PREFIX = "train_loss@"
_TEXTS = os.path.join("text", "*.jsonl.gz")


def read_rows(path: str) -> list[dict[str, str]]:
  """Returns the rows of a file of results; none if it is missing."""
  if not os.path.exists(path):
    return []
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


_DEFAULTS = config.flatten(config.Experiment())


def value_of(row: Mapping[str, Any], name: str) -> str:
  """Returns what a row has in a column; "" for nothing.

  Rows of older versions may lack settings, which then had their defaults.
  """
  return str(row.get(name, "")) or str(_DEFAULTS.get(name, ""))


def write_rows(
  path: str, rows: Iterable[Mapping[str, Any]], key: Sequence[str]
) -> int:
  """Adds rows to a file of results, in place of those with the same key.

  A row that has nothing in a column of the key gives way to one that has.

  Returns:
    How many rows the file has now.
  """
  by_key: dict[tuple[str, ...], Mapping[str, Any]] = {}
  for row in [*read_rows(path), *rows]:
    own = tuple(value_of(row, name) for name in key)
    for other in [*by_key]:
      if other != own and all(x in ("", y) for x, y in zip(other, own)):
        del by_key[other]
    by_key[own] = row
  columns = dict.fromkeys(name for row in by_key.values() for name in row)
  file = io.StringIO(newline="")
  writer = csv.DictWriter(file, list(columns), lineterminator="\n")
  writer.writeheader()
  writer.writerows(by_key.values())
  storage.write_bytes(path, file.getvalue().encode())
  return len(by_key)


def rows_of(sweep: str) -> list[dict[str, Any]]:
  """Returns a row for each finished run of a sweep's folder.

  Raises:
    UserError: no run is finished, or a file of one is damaged.
  """
  runs = sweep_report.read_runs(sweep)
  rows = []
  for run, carved in zip(runs, swept.read(sweep, runs)):
    experiment = run.result["experiment"]
    workdir = os.path.join(sweep, run.name)
    tokens = (
      experiment["train.batch_size"] * experiment["train.sequence_length"]
    )
    rows.append(
      {key: experiment[key] for key in SETTINGS}
      | {
        # Which text: runs of different text cannot be paired.
        "text": run.result.get("content_hash", "")[:12],
        "parameters/active": run.result["parameters"]["active"],
        "tokens": run.result["step"] * tokens,
        # Runs of older versions lack it.
        "cpu_seconds": run.result["time"].get("cpu_seconds", ""),
      }
      | sweep_report.figures(run.result)
      | {
        f"lm_loss@{line['step'] * tokens}": line["eval/lm_loss"]
        for line in read_metrics(workdir)
        if "eval/lm_loss" in line
      }
      | {
        f"{PREFIX}{line['step'] * tokens}": line["train/lm_loss"]
        for line in read_metrics(workdir)
        if "train/lm_loss" in line
      }
      | _rises(carved)
      | _adapted(sweep, run.name)
      | _best_losses(workdir, experiment)
    )
  return rows


def _rises(carved: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns the rise of a carved run's loss by experts, mean over domains."""
  if carved is None:
    return {}
  rises = carve_report.mean_rises(carved, carve_report.OWN)
  return {f"carved/{keep}": rises[keep] for keep in sorted(rises)}


def _adapted(sweep: str, name: str) -> dict[str, float]:
  """Returns what docs.study.adapt found of a run, means over coarse domains.

  "adapted/whole" is the loss of the whole model after training on one domain;
  "adapted/before" and "adapted/after" are by how much the cut one's is above
  the whole one's, before and after this training.
  """
  path = Path(sweep, adapt.FOLDER, f"{name}.json")
  if not path.exists():
    return {}
  found = json.loads(path.read_text())["losses"].values()
  mean = {
    which: float(np.mean([losses[which] for losses in found]))
    for which in ("whole", "cut", "whole_adapted", "cut_adapted")
  }
  return {
    "adapted/whole": mean["whole_adapted"],
    "adapted/before": mean["cut"] - mean["whole"],
    "adapted/after": mean["cut_adapted"] - mean["whole_adapted"],
  }


_known: dict[str, dict[str, float]] = {}


def _best_losses(
  workdir: str, experiment: Mapping[str, Any]
) -> dict[str, float]:
  """Returns the best losses of a run's held-out text; none without a manifest.

  They are of the best predictor that infers the source, and of one that knows
  it: means over sources, and by source.
  """
  files = experiment["data.files"]
  manifest = Path(files.removesuffix(_TEXTS), "manifest.json")
  if not files.endswith(_TEXTS) or not manifest.exists():
    return {}
  content = json.loads(manifest.read_text())
  if "mixture" not in content:
    return {}
  # Runs that differ in other settings have the same held-out rows.
  keys = ("data.", "train.eval_rows", "train.sequence_length")
  known = json.dumps([v for k, v in experiment.items() if k.startswith(keys)])
  if known not in _known:
    mixture = MarkovMixture(**content["mixture"])
    provenance = checkpoint_provenance(workdir)
    corpus = run_text.read_corpus(provenance, workdir)
    start = provenance.tokenizer.document_start_id
    rows = held_out_rows(corpus, provenance.tokenizer, provenance.experiment)
    best: dict[str, float] = {}
    for how in ("inferred", "known"):
      losses = {}
      for name, own in zip(corpus.taxonomy.fine, rows):
        source = int(name.removeprefix("source_"))
        prior_D = np.eye(mixture.num_sources)[source]
        if how == "inferred":
          prior_D = np.full_like(prior_D, 1 / len(prior_D))
        losses[f"best_loss/{how}/{name}"] = mixture.best_loss(
          own, start, prior_D
        )
      best[f"best_loss/{how}"] = float(np.mean(list(losses.values())))
      best |= losses
    _known[known] = best
  return _known[known]


@COMMAND.main
def main() -> None:
  """Writes a CSV file for each sweep that has a finished run.

  Raises:
    UserError: no run is finished, or a file of one is damaged.
  """
  sweeps = sorted(Path(_RUNS.value).glob("*"))
  finished = [path for path in sweeps if any(path.glob("*/result.json"))]
  if not finished:
    raise UserError(f"--runs={_RUNS.value}: no run in it is finished")
  storage.make_folder(_OUT.value)
  for sweep in finished:
    path = os.path.join(_OUT.value, f"{sweep.name}.csv")
    count = write_rows(path, rows_of(str(sweep)), (*SETTINGS, "text"))
    print(f"{path}: {count} runs")


if __name__ == "__main__":
  sys.exit(main())
