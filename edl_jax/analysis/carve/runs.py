"""The runs to carve: their checkpoints, their text, what they must share."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.analysis import run_text
from edl_jax.analysis.carve.keep import check_router
from edl_jax.checkpoint import (
  Provenance,
  checkpoint_steps,
  load,
  saved_provenance,
)
from edl_jax.config import Experiment, MeshConfig, UserError
from edl_jax.fields import nearest
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch, padded_batches
from edl_jax.text.input_pipeline import calibration_rows, held_out_rows
from edl_jax.text.mixture import Corpus
from edl_jax.text.prepared import PreparedCorpus
from edl_jax.text.taxonomy import fine_name


class Run(NamedTuple):
  """A run with checkpoints, before any of them is loaded."""

  workdir: str
  # The step of the newest checkpoint.
  step: int
  provenance: Provenance

  @property
  def experiment(self) -> Experiment:
    return self.provenance.experiment


class Rows(NamedTuple):
  """A run's text by fine domain, as Batches that lack the axis B."""

  held_out: list[list[Batch]]
  # Training text, to choose experts on.
  calibration: list[list[Batch]]


def find_runs(workdirs: Sequence[str]) -> list[Run]:
  """Finds the newest checkpoint of every run; loads no parameters.

  Raises:
    UserError: a folder has no checkpoint, its model has fixed experts, or two
      runs cannot be compared.
  """
  runs = [_find_run(workdir) for workdir in workdirs]
  first, *others = runs
  for other in others:
    both = f"--workdir={first.workdir} and --workdir={other.workdir}"
    own, theirs = first.provenance.taxonomy, other.provenance.taxonomy
    if own.names != theirs.names:
      raise UserError(
        f"{both} have different taxonomies ({', '.join(own.names)} and"
        f" {', '.join(theirs.names)}); carve them one by one"
      )
    if len({run.provenance.tokenizer.to_json() for run in (first, other)}) > 1:
      raise UserError(
        f"{both} have different tokenizers, whose losses per token do not"
        " compare; carve them one by one"
      )
  return runs


def _find_run(workdir: str) -> Run:
  steps = checkpoint_steps(os.path.join(workdir, "checkpoints"))
  saved = saved_provenance(workdir) if steps else None
  if saved is None:
    raise UserError(
      f"--workdir={workdir} has no checkpoint to carve; train first"
    )
  run = Run(workdir, steps[-1], Provenance.from_dict(saved))
  check_router(run.experiment.model, f"--workdir={workdir}")
  return run


def domain_indices(run: Run, names: Sequence[str], flag: str) -> list[int]:
  """Returns the labels of fine domains; those of all domains without names.

  Args:
    run: whose taxonomy is meant.
    names: "fine" or "coarse/fine" each.
    flag: the flag that holds the names, for messages.

  Raises:
    UserError: a domain is unknown; names the nearest.
  """
  known = run.provenance.taxonomy.fine
  for name in names:
    if fine_name(name) not in known:
      raise UserError(
        f"--{flag}={name}: no such domain in {run.workdir};"
        f" {nearest(fine_name(name), known)}"
      )
  fine = dict.fromkeys(map(fine_name, names or known))
  return [known.index(name) for name in fine]


def read_corpus(run: Run) -> Corpus | PreparedCorpus:
  """Reads the text of a run; see `run_text.read_corpus`."""
  return run_text.read_corpus(run.provenance, run.workdir)


def choose_rows(
  run: Run,
  corpus: Corpus | PreparedCorpus,
  domains: Sequence[int],
  calibration_tokens: int,
) -> Rows:
  """Returns the held-out rows and the calibration rows of a run.

  Args:
    run: whose tokenizer and row length are used.
    corpus: its text.
    domains: which must have text.
    calibration_tokens: of each domain, rounded up to rows.

  Raises:
    UserError: one of `domains` has no training or no held-out text.
  """
  experiment, tokenizer = run.experiment, run.provenance.tokenizer
  count = math.ceil(calibration_tokens / experiment.train.sequence_length)
  rows = Rows(
    held_out=held_out_rows(corpus, tokenizer, experiment),
    calibration=calibration_rows(corpus, tokenizer, experiment, count),
  )
  for domain in domains:
    for own, what in (
      (rows.calibration, "training text to choose experts on"),
      (rows.held_out, "held-out text to evaluate on"),
    ):
      if not own[domain]:
        name = corpus.taxonomy.fine[domain]
        raise UserError(f"domain {name!r} of {run.workdir} has no {what}")
  return rows


def choose_mesh(experiment: Experiment) -> Mesh:
  """Returns the run's own mesh, or all devices along `data` if it does not fit.

  Raises:
    UserError: the batch does not divide over the devices.
  """
  try:
    mesh = sharding.make_mesh(experiment.mesh)
  except UserError:
    # The run trained on other devices than there are here.
    mesh = sharding.make_mesh(MeshConfig())
  sharding.check_divisible(experiment, mesh)
  return mesh


def load_model(run: Run, mesh: Mesh) -> Model:
  """Loads the parameters of a run's newest checkpoint."""
  return load(run.workdir, run.step, mesh).model


def to_batches(
  rows: Sequence[Batch], longest: int, experiment: Experiment, mesh: Mesh
) -> list[Batch]:
  """Puts rows on the devices, in batches of one size for all domains.

  Args:
    rows: at most `longest`.
    longest: the rows of the domain that has the most.
    experiment: whose `train.batch_size` is the most rows of a batch.
    mesh: the devices.
  """
  shards = math.prod(mesh.shape[axis] for axis in sharding.ROW_AXES)
  count = math.ceil(longest / experiment.train.batch_size)
  size = math.ceil(longest / count / shards) * shards
  return [sharding.put_batch(b, mesh) for b in padded_batches(rows, size)]
