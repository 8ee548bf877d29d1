"""Measures how much of the study's differences is noise of its held-out text.

  python -m docs.study.noise --runs=runs/study

Each folder of --runs is a sweep, as run.sh makes it. The command evaluates the
checkpoints that the questions of the page compare, row by row: on the held-out
rows that training evaluated, and on all there are. For each condition it
writes to docs/study/results/noise.csv how its losses differ from those of its
base, and the standard error that the choice of rows gives this difference. The
losses of a run's rows stay in its folder, so that the command goes on where it
was stopped.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from docs.study.collect import rows_of, write_rows
from docs.study.questions import QUESTIONS, Question
from docs.study.runs import runs_of
from edl_jax import runtime, sharding, storage
from edl_jax.analysis import run_text, sweep_report
from edl_jax.analysis.carve.runs import choose_mesh
from edl_jax.checkpoint import checkpoint_provenance, load
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch, padded_batches
from edl_jax.text.input_pipeline import held_out_rows

COMMAND = Command(__doc__)
_RUNS = COMMAND.flag("runs", "", "Folder of sweeps.", required=True)
_OUT = COMMAND.flag(
  "out",
  str(Path(__file__).parent / "results" / "noise.csv"),
  "CSV file to write.",
)

# What tells the rows of the file apart.
KEY = ("question", "condition", "which")
# Neighbouring rows can be parts of one document, whose losses go together. So
# a source's rows are taken in so many blocks of neighbours, if it has as many
# rows. A document that is longer than a block makes the error too small.
_BLOCKS = 16

# Nats and counted tokens of each row, float64 (rows, 2), by source.
RowLosses = list[np.ndarray]


class Pairs(NamedTuple):
  """Runs of a condition and of its base, by seed."""

  question: str
  condition: str
  before: list[str]
  after: list[str]


@jax.jit
def _row_sums(model: Model, batch: Batch) -> jax.Array:
  _, nats_BT = model.batch_sums(batch, 1)
  return jnp.stack([nats_BT, batch.target_weights_BT], -1).sum(1)


def row_losses(workdir: str, which: str) -> RowLosses:
  """Returns the losses of a run's held-out rows; reads them if they are known.

  Args:
    workdir: of a finished run.
    which: "evaluated" for the rows that training evaluated, or "all".

  Returns:
    Those of each source that has held-out text.

  Raises:
    UserError: the run has no checkpoint, or its text is gone or has changed.
  """
  result = Path(workdir, "result.json")
  path = Path(workdir, f"row_losses_{which}.npz")
  # Losses of an earlier training in this folder do not count.
  if path.exists() and path.stat().st_mtime > result.stat().st_mtime:
    with np.load(path) as file:
      return [file[name] for name in file.files]
  provenance = checkpoint_provenance(workdir)
  experiment = provenance.experiment
  if which == "all":
    train = dataclasses.replace(experiment.train, eval_rows=-1)
    experiment = dataclasses.replace(experiment, train=train)
  corpus = run_text.read_corpus(provenance, workdir)
  every = held_out_rows(corpus, provenance.tokenizer, experiment)
  by_source = [own for own in every if own]
  rows = [row for own in by_source for row in own]
  mesh = choose_mesh(experiment)
  with jax.set_mesh(mesh):
    model = load(workdir, mesh=mesh).model
    sums = [
      jax.device_get(_row_sums(model, sharding.put_batch(batch, mesh)))
      for batch in padded_batches(rows, experiment.train.batch_size)
    ]
  flat = np.concatenate(sums, dtype=np.float64)[: len(rows)]
  found = np.split(flat, np.cumsum([len(own) for own in by_source])[:-1])
  file = io.BytesIO()
  np.savez(file, *found)
  storage.write_bytes(path, file.getvalue())
  return found


def mean_losses(workdirs: Sequence[str], which: str) -> RowLosses:
  """Returns `row_losses`, averaged over runs."""
  each = [row_losses(workdir, which) for workdir in workdirs]
  return [np.mean(own, 0) for own in zip(*each, strict=True)]


def difference(before: RowLosses, after: RowLosses) -> tuple[float, float]:
  """Returns how losses of the same rows differ, and the noise of that.

  Returns:
    The mean over sources of the nats per token after minus before, and its
    standard error. The error takes runs and sources as fixed and rows as a
    sample: it is that of a ratio of sums over blocks of neighbouring rows
    (Cochran, Sampling Techniques, 1977, section 6.4).

  Raises:
    UserError: the rows are not the same, or a source has one alone.
  """
  means, variances = [], []
  for first, second in zip(before, after, strict=True):
    tokens = first[:, 1]
    if not np.array_equal(tokens, second[:, 1]):
      raise UserError("two runs that are compared have other held-out rows")
    if len(tokens) < 2:
      raise UserError("a source has one held-out row, which has no spread")
    changes = second[:, 0] - first[:, 0]
    mean = changes.sum() / tokens.sum()
    blocks = np.array_split(changes - mean * tokens, min(_BLOCKS, len(tokens)))
    sums = np.array([block.sum() for block in blocks])
    count = len(sums)
    variances.append(
      count / (count - 1) * np.square(sums).sum() / tokens.sum() ** 2
    )
    means.append(mean)
  return float(np.mean(means)), float(np.sqrt(np.sum(variances))) / len(means)


def pairs(question: Question, sweeps: Path) -> Iterator[Pairs]:
  """Yields the finished runs that a question's differences are of."""
  rows = []
  for name in question.files:
    sweep = sweeps / name
    if any(sweep.glob("*/result.json")):
      finished = sweep_report.read_runs(str(sweep))
      for run, row in zip(finished, rows_of(str(sweep)), strict=True):
        text = {key: str(value) for key, value in row.items()}
        place = {"sweep": name, "workdir": str(sweep / run.name)}
        rows.append(text | place)
  by_label = {
    condition.label: runs_of(rows, condition)
    for condition in question.conditions
  }
  for condition in question.conditions:
    before, after = by_label.get(condition.base, {}), by_label[condition.label]
    seeds = [
      seed
      for seed in sorted(before.keys() & after.keys())
      if before[seed]["text"] == after[seed]["text"]
    ]
    if seeds:
      yield Pairs(
        question.name,
        condition.label,
        [before[seed]["workdir"] for seed in seeds],
        [after[seed]["workdir"] for seed in seeds],
      )


@COMMAND.main
def main() -> None:
  """Adds the differences of finished runs to the file.

  Raises:
    UserError: no two finished runs are a pair, or the text or the checkpoint of
      one is gone.
  """
  runtime.configure()
  found = [
    each
    for question in QUESTIONS
    if question.noise
    for each in pairs(question, Path(_RUNS.value))
  ]
  if not found:
    raise UserError(
      f"--runs={_RUNS.value}: no two finished runs are a pair of conditions,"
      " with the settings and the text that docs/study/questions.py names"
    )
  rows = []
  for each in found:
    for which in ("evaluated", "all"):
      before = mean_losses(each.before, which)
      mean, error = difference(before, mean_losses(each.after, which))
      rows.append(
        {
          "question": each.question,
          "condition": each.condition,
          "which": which,
          "seeds": len(each.before),
          "rows": sum(map(len, before)),
          "difference": mean,
          "standard_error": error,
        }
      )
      print(f"{each.condition}, {which} rows: {mean:+.4f}, noise {error:.4f}")
  storage.make_folder(str(Path(_OUT.value).parent))
  write_rows(_OUT.value, rows, KEY)
  print(f"written to {_OUT.value}")


if __name__ == "__main__":
  sys.exit(main())
