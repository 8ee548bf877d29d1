"""Copies what finished runs of the study found into small files.

  python -m docs.study.collect --runs=runs/study

Each folder of --runs is a sweep, as run.sh makes it; its runs become the rows
of docs/study/results/<folder>.csv. Started again, it writes the same files, so
that parts of the study can be added as they finish. Runs on text of Markov
sources also get the best loss that their held-out text allows.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edl_jax import storage
from edl_jax.analysis import run_text, sweep_report
from edl_jax.checkpoint import checkpoint_provenance
from edl_jax.command import Command
from edl_jax.config import UserError
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
  "train.num_steps",
  "train.accumulation",
  "data.files",
  "data.granularity",
)
_TEXTS = os.path.join("text", "*.jsonl.gz")


def rows_of(sweep: str) -> list[dict[str, Any]]:
  """Returns a row for each finished run of a sweep's folder.

  Raises:
    UserError: no run is finished, or a file of one is damaged.
  """
  rows = []
  for run in sweep_report.read_runs(sweep):
    experiment = run.result["experiment"]
    missing = [key for key in SETTINGS if key not in experiment]
    if missing:
      raise UserError(
        f"{sweep}/{run.name}: made by a version without {missing[0]}; run it"
        " again"
      )
    rows.append(
      {key: experiment[key] for key in SETTINGS}
      | {
        "parameters/active": run.result["parameters"]["active"],
        "tokens": run.result["step"]
        * experiment["train.batch_size"]
        * experiment["train.sequence_length"],
      }
      | sweep_report.figures(run.result)
      | _best_losses(os.path.join(sweep, run.name), experiment)
    )
  return rows


_known: dict[str, dict[str, float]] = {}


def _best_losses(
  workdir: str, experiment: Mapping[str, Any]
) -> dict[str, float]:
  """Returns the best losses of a run's held-out text; none without a manifest.

  They are means over sources: of the best predictor that infers the source,
  and of one that knows it.
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
    best: dict[str, list[float]] = {"inferred": [], "known": []}
    for name, own in zip(corpus.taxonomy.fine, rows):
      known_D = np.eye(mixture.num_sources)[int(name.removeprefix("source_"))]
      uniform_D = np.full_like(known_D, 1 / len(known_D))
      best["inferred"].append(mixture.best_loss(own, start, uniform_D))
      best["known"].append(mixture.best_loss(own, start, known_D))
    _known[known] = {
      f"best_loss/{name}": float(np.mean(losses))
      for name, losses in best.items()
    }
  return _known[known]


@COMMAND.main
def main() -> None:
  """Writes a CSV file for each sweep that has a finished run."""
  sweeps = sorted(Path(_RUNS.value).glob("*"))
  finished = [path for path in sweeps if any(path.glob("*/result.json"))]
  if not finished:
    raise UserError(f"--runs={_RUNS.value}: no run in it is finished")
  storage.make_folder(_OUT.value)
  for sweep in finished:
    rows = rows_of(str(sweep))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = os.path.join(_OUT.value, f"{sweep.name}.csv")
    storage.write_bytes(path, file.getvalue().encode())
    print(f"{path}: {len(rows)} runs")


if __name__ == "__main__":
  sys.exit(main())
