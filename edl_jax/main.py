"""Train or evaluate an experiment.

  python -m edl_jax.main --experiment=experiments/demo.py --workdir=runs/demo

Any field of the experiment can be set by its dotted name:

  --experiment.losses.divergence_weight=0.01 --experiment.train.num_steps=500

The same command goes on from the newest checkpoint in --workdir. With
--mode=eval it evaluates that checkpoint instead of training.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from edl_jax import config_files
from edl_jax.config import Experiment, UserError

if TYPE_CHECKING:
  from edl_jax.checkpoint import Provenance

_EXPERIMENT = config_flags.DEFINE_config_file(
  "experiment", None, "Experiment file; a variant may follow after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run, or gs://BUCKET/FOLDER: metrics, checkpoints, pictures.",
)
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "eval"], "What to do with the experiment."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of a TPU pod or of a Slurm job, or those that"
  " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell of.",
)


def parse_flags(arguments: Sequence[str]) -> list[str]:
  """Parses the command line; exits with code 2 and one line if it is wrong."""
  try:
    path = None
    for argument, following in zip(arguments[1:], [*arguments[2:], ""]):
      name, equals, value = argument.partition("=")
      if name in ("--experiment", "-experiment"):
        path = value if equals else following
        config_files.check_experiment_file(path)
    config_files.check_override_keys(arguments[1:])
    with config_files.one_line_flag_errors(path):
      rest = flags.FLAGS(arguments)
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}; options start with --")
    return rest
  except UserError as error:
    _fail(error, 2)


def _fail(error: Exception, code: int) -> NoReturn:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(code)


def _join_processes(provenance: "Provenance") -> None:
  """Joins the run's other processes, which must have the same of everything."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  # JAX itself reads the address, and all that a cluster's launcher says.
  count, index = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
  try:
    jax.distributed.initialize(
      num_processes=int(count) if count else None,
      process_id=int(index) if index else None,
    )
  except (ValueError, RuntimeError) as error:
    reason = str(error).partition("\n")[0]
    raise UserError(
      f"--distributed: {reason}; outside of TPU pods and Slurm every process"
      " needs JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and, from 0,"
      " JAX_PROCESS_ID"
    ) from error
  digest = hashlib.sha256(json.dumps(provenance.to_dict()).encode()).digest()
  own = np.frombuffer(digest, np.uint8)
  if (multihost_utils.process_allgather(own) != own).any():
    raise UserError(
      "--distributed: the processes differ in experiment or text; give all the"
      " same command and files"
    )


def _run(experiment: Experiment, workdir: str, mode: str) -> None:
  """Everything that can be refused is refused before a device is used."""
  # Imported here: wrong flags and --help answer without loading JAX.
  from edl_jax import runtime, storage

  runtime.configure()
  from edl_jax.checkpoint import (
    Provenance,
    check_workdir,
    checkpoint_steps,
    initial_tokenizer,
  )
  from edl_jax.evaluate import evaluate_checkpoint
  from edl_jax.text.input_pipeline import train_dataset
  from edl_jax.text.mixture import load_corpus
  from edl_jax.text.prepared import load_prepared
  from edl_jax.text.tokenizer import load_tokenizer
  from edl_jax.train import (
    NonFiniteError,
    Preempted,
    describe,
    state_bytes,
    train,
  )

  storage.check_access(workdir, "--workdir=")
  if mode == "eval" and not checkpoint_steps(
    os.path.join(workdir, "checkpoints")
  ):
    raise UserError(
      f"--workdir={workdir} has no checkpoint to evaluate; train first"
    )
  tokenizer = initial_tokenizer(experiment, workdir)
  if experiment.data.prepared:
    corpus = load_prepared(experiment)
    if tokenizer and tokenizer.to_json() != corpus.tokenizer.to_json():
      raise UserError(
        f"data.prepared={experiment.data.prepared} has another tokenizer than"
        f" train.initial_checkpoint={experiment.train.initial_checkpoint}"
      )
    tokenizer = corpus.tokenizer
  else:
    corpus = load_corpus(experiment.data)
    tokenizer = tokenizer or load_tokenizer(experiment, corpus)
  rows = epochs = None
  if mode == "train":
    rows, epochs = train_dataset(corpus, tokenizer, experiment)
  provenance = Provenance(
    experiment, corpus.taxonomy, tokenizer, corpus.content_hash
  )
  written = state_bytes(experiment) if mode == "train" else 0
  check_workdir(workdir, provenance, written)

  import jax

  from edl_jax import sharding

  if _DISTRIBUTED.value:
    _join_processes(provenance)
  mesh = sharding.make_mesh(experiment.mesh)
  sharding.check_divisible(experiment, mesh)
  if jax.process_index() == 0:
    print("\n".join(describe(experiment, corpus, mesh)), flush=True)
  if mode == "eval":
    evaluate_checkpoint(corpus, provenance, mesh, workdir)
    return
  try:
    train(corpus, rows, epochs, provenance, mesh, workdir)
  except NonFiniteError as error:
    _fail(error, 1)
  except Preempted as error:
    # As a shell reports a process that the signal ended.
    _fail(error, 128 + error.signal)
  except (OSError, ValueError) as error:
    # Orbax reports a full disk as a ValueError of many lines.
    full = "No space left" in str(error)
    if not full and not isinstance(error, OSError):
      raise
    reason = "no space left on device" if full else error
    raise UserError(
      f"cannot write to --workdir={workdir}: {reason}; once it can, the same"
      " command goes on from the last checkpoint"
    ) from error


def main(arguments: Sequence[str]) -> None:
  """Runs the experiment; user errors become one line and exit code 2."""
  del arguments
  # Orbax and absl log every step of a save; warnings are enough.
  logging.set_verbosity(logging.WARNING)
  try:
    flag = flags.FLAGS["experiment"]
    path = flag.config_filename if flag.present else None
    config_files.check_experiment_file(path)
    experiment = config_files.check_experiment(_EXPERIMENT.value, path)
    if not _WORKDIR.value:
      raise UserError("--workdir is missing: name the folder of the run")
    _run(experiment, _WORKDIR.value, _MODE.value)
  except UserError as error:
    _fail(error, 2)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
