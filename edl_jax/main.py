"""Train or evaluate an experiment.

  python -m edl_jax.main --experiment=experiments/demo.py --workdir=runs/demo

Any field of the experiment can be set by its dotted name:

  --experiment.losses.divergence_weight=0.01 --experiment.train.num_steps=500

Started again, the same command resumes from the newest checkpoint in --workdir.
With --mode=eval it evaluates that checkpoint instead of training. --describe
lists every field of the experiment, and does nothing else.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from logging import LogRecord
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging
from absl.flags import FlagHolder

from edl_jax import output
from edl_jax.command import Command, print_error
from edl_jax.config import Experiment, UserError
from edl_jax.describe import describe

if TYPE_CHECKING:
  import grain
  from jax.sharding import Mesh

  from edl_jax.checkpoint import Provenance, Verify
  from edl_jax.tasks.evaluation import EncodedTasks
  from edl_jax.text.batch import Batch
  from edl_jax.text.mixture import Corpus, EpochCounter
  from edl_jax.text.prepared import PreparedCorpus
  from edl_jax.text.tokenizer import Tokenizer

COMMAND = Command(__doc__)
COMMAND.experiment()
_WORKDIR = COMMAND.flag(
  "workdir",
  "",
  "Folder of the run, or gs://BUCKET/FOLDER: metrics, checkpoints, plots.",
)
_MODE = COMMAND.flag(
  "mode", "train", "What to do with the experiment.", choices=["train", "eval"]
)
_DESCRIBE: FlagHolder[str | None] = COMMAND.flag(
  "describe",
  None,
  "List the settings with value, help and bounds, and do nothing else. Names a"
  " group, as --describe=losses, or one key.",
  kind=str,
  bare="",
)
_VERIFY = COMMAND.flag(
  "verify",
  "full",
  "How much of a checkpoint is compared with the digests saved in it: every"
  " array, a quarter of them, or none.",
  choices=["full", "sampled", "off"],
)
_DISTRIBUTED = COMMAND.flag(
  "distributed",
  False,
  "Join the other processes of a TPU pod or a Slurm job. Elsewhere, set"
  " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)


class Run(NamedTuple):
  """A run that passed every check that needs no device."""

  workdir: str
  provenance: "Provenance"
  corpus: "Corpus | PreparedCorpus"
  # Training rows and what counts their epochs; None to evaluate.
  training: "tuple[grain.MapDataset[Batch], EpochCounter] | None"
  # What to evaluate on in training, if anything.
  tasks: "EncodedTasks | None" = None
  # What rows leave out, a line each.
  notes: Sequence[str] = ()


def prepare(experiment: Experiment, workdir: str, mode: str) -> Run:
  """Checks the run and loads its text; uses no device and writes nothing.

  Args:
    experiment: validated settings.
    workdir: folder of the run.
    mode: "train" or "eval".

  Raises:
    UserError: the text, the tokenizer or `workdir` does not suit the run.
  """
  from edl_jax import storage
  from edl_jax.checkpoint import (
    Provenance,
    check_unlocked,
    check_workdir,
    checkpoint_steps,
  )
  from edl_jax.step import state_bytes
  from edl_jax.text.input_pipeline import (
    long_examples,
    short_documents,
    train_dataset,
  )

  storage.check_access(workdir, "--workdir=")
  if mode == "eval" and not checkpoint_steps(
    os.path.join(workdir, "checkpoints")
  ):
    raise UserError(
      f"--workdir={workdir} has no checkpoint to evaluate; train first"
    )
  if mode == "train":
    check_unlocked(workdir)
  corpus, tokenizer, source = _load_text(experiment, workdir)
  notes = long_examples(corpus, tokenizer, experiment)
  training = tasks = None
  if mode == "train":
    training = train_dataset(corpus, tokenizer, experiment)
    notes += short_documents(corpus, tokenizer, experiment)
    tasks = _load_tasks(experiment, tokenizer)
  provenance = Provenance(
    experiment, corpus.taxonomy, tokenizer, corpus.content_hash, source
  )
  check_workdir(workdir, provenance, state_bytes(experiment) if training else 0)
  return Run(workdir, provenance, corpus, training, tasks, notes)


def _load_text(
  experiment: Experiment, workdir: str
) -> tuple["Corpus | PreparedCorpus", "Tokenizer", Mapping[str, Any] | None]:
  """Returns the corpus, its tokenizer, and the source of imported weights.

  Raises:
    UserError: bad text, or two different tokenizers.
  """
  from edl_jax.checkpoint import initial_provenance
  from edl_jax.text.chat import find_template
  from edl_jax.text.mixture import load_corpus
  from edl_jax.text.prepared import load_prepared
  from edl_jax.text.tokenizer import load_tokenizer

  initial = initial_provenance(experiment, workdir)
  tokenizer = initial.tokenizer if initial else None
  source = initial.source if initial else None
  if not experiment.data.prepared:
    special = tuple(tokenizer.special_ids) if tokenizer else ()
    template = find_template(experiment.data, source, special)
    corpus = load_corpus(experiment.data, template)
    tokenizer = tokenizer or load_tokenizer(experiment, corpus)
    return corpus, tokenizer, source
  corpus = load_prepared(experiment)
  if tokenizer and tokenizer.to_json() != corpus.tokenizer.to_json():
    raise UserError(
      f"data.prepared={experiment.data.prepared} has another tokenizer than"
      f" {experiment.train.initial_checkpoint or workdir}, which the run starts"
      " from"
    )
  return corpus, corpus.tokenizer, source


def _load_tasks(
  experiment: Experiment, tokenizer: "Tokenizer"
) -> "EncodedTasks | None":
  """Returns the tasks to evaluate in training; None without `task_every`.

  Raises:
    UserError: an unknown task, a damaged file, text that is not encoded.
  """
  from edl_jax.tasks.evaluation import encode_tasks
  from edl_jax.tasks.selection import select_tasks

  train = experiment.train
  if not train.task_every:
    return None
  selected = select_tasks(train.task_files, train.tasks, train.task_documents)
  return encode_tasks(selected, tokenizer, train.sequence_length)


def _join_processes(run: Run) -> None:
  """Joins the run's other processes and checks that all run the same thing.

  Raises:
    UserError: the processes cannot meet, or their experiment or files differ.
  """
  from edl_jax import runtime

  files = run.tasks.selected.items() if run.tasks else ()
  runtime.join_processes(
    [
      run.provenance.to_dict(),
      [(name, each.sha256) for name, each in files],
    ],
    "experiment or text",
  )


def _make_mesh(experiment: Experiment) -> "Mesh":
  """Returns the mesh over all devices, which the experiment must fit.

  Raises:
    UserError: its axes do not divide the devices, the batch or the model.
  """
  from edl_jax import sharding

  mesh = sharding.make_mesh(experiment.mesh)
  sharding.check_divisible(experiment, mesh)
  return mesh


def _description(run: Run, mesh: "Mesh") -> list[str]:
  """Returns the lines that a run prints at its start."""
  from edl_jax.model.transformer import parameter_counts

  experiment, corpus = run.provenance.experiment, run.corpus
  total, active = parameter_counts(experiment.model)
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  train = experiment.train
  tokens = train.num_steps * train.batch_size * train.sequence_length
  return [
    f"{experiment.name}: {total:,} parameters, {active:,} active per token",
    f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s): {axes}",
    f"{len(corpus.taxonomy.sources)} domains:",
    *_describe_sources(experiment, corpus),
    *corpus.notes,
    *run.notes,
    f"{train.num_steps:,} steps of {train.batch_size} rows of"
    f" {train.sequence_length} tokens: {tokens:,} tokens",
  ]


def _describe_sources(
  experiment: Experiment, corpus: "Corpus | PreparedCorpus"
) -> list[str]:
  """Returns a line for each source, with its size and whether it was cut."""
  limit = experiment.data.max_characters_per_domain
  lines = []
  for name, (documents, characters) in zip(
    corpus.taxonomy.sources, corpus.sizes()
  ):
    line = f"  {name}: {documents:,} documents, {characters:,} characters"
    # The limit of a prepared corpus was that of its preparation.
    if characters >= limit and not experiment.data.prepared:
      line += " (cut at data.max_characters_per_domain)"
    lines.append(line)
  return lines


def _show(lines: list[str]) -> None:
  if lines:
    print("\n".join(lines), flush=True)


def execute(run: Run, mesh: "Mesh", verify: "Verify" = "full") -> int:
  """Trains, or evaluates the newest checkpoint; returns the exit code.

  `verify` says how much of a checkpoint is compared with its digests.

  Raises:
    UserError: the run's folder cannot be written any more.
  """
  import jax

  from edl_jax import peers, train
  from edl_jax.checkpoint import locked
  from edl_jax.evaluate import NonFiniteError, evaluate_checkpoint
  from edl_jax.preemption import Preempted

  workdir, provenance, corpus, training, tasks, _ = run
  lines = []
  if jax.process_index() == 0:
    lines = _description(run, mesh)
  try:
    if training is None:
      _show(lines)
      with peers.needed():
        evaluate_checkpoint(corpus, provenance, mesh, workdir, verify)
      return 0
    with (
      peers.needed(),
      locked(workdir),
      output.named_stdout(lasting=True),
    ):
      _show(lines)
      train.train(corpus, *training, provenance, mesh, workdir, verify, tasks)
  except NonFiniteError as error:
    print_error(error)
    return 1
  except Preempted as error:
    print_error(error)
    # The code by which a shell reports a process that a signal ended.
    return 128 + error.signal
  except (OSError, ValueError) as error:
    # Orbax reports a full or broken disk as a ValueError of many lines.
    disk = re.search(
      "No space left|File too large|Disk quota exceeded|Read-only file system"
      "|Input/output error",
      str(error),
    )
    broken_pipe = isinstance(error, BrokenPipeError)
    if broken_pipe or not (disk or isinstance(error, OSError)):
      raise
    reason = disk[0].lower() if disk else error
    raise UserError(
      f"cannot write to --workdir={workdir}: {reason}; once it can, the same"
      " command resumes from the last checkpoint"
    ) from error
  return 0


def _verify() -> "Verify":
  """Returns the choice of --verify as the type that it is."""
  from edl_jax.checkpoint import VERIFY

  return next(choice for choice in VERIFY if choice == _VERIFY.value)


def _without_traceback(record: LogRecord) -> bool:
  """Takes the traceback off what Orbax logs.

  It logs an exception of the thread that writes a checkpoint, and raises it in
  the next call, where `execute` makes one line of it.
  """
  if "orbax" in record.pathname:
    record.exc_info = None
  return True


@COMMAND.main
def main() -> int:
  """Runs the experiment; refuses a wrong one before it uses a device."""
  # Orbax and absl log every step of a save; warnings are enough.
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(_without_traceback)
  experiment = COMMAND.load()
  if _DESCRIBE.value is not None:
    print("\n".join(describe(experiment, _DESCRIBE.value)))
    return 0
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name the folder of the run")
  # Imports JAX, which --help and errors in flags do without.
  import jax

  from edl_jax import runtime

  runtime.configure()
  if not _DISTRIBUTED.value:
    # Processes that join others must do so before they use a device.
    jax.devices()
  run = prepare(experiment, _WORKDIR.value, _MODE.value)
  if _DISTRIBUTED.value:
    _join_processes(run)
  return execute(run, _make_mesh(experiment), _verify())


if __name__ == "__main__":
  sys.exit(main())
