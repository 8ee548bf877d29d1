"""The folder of a run, before and at the run's start."""

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile

from etils import epath

from edl_jax import config, storage
from edl_jax.checkpoint.folders import (
  FOLDER,
  checkpoint_steps,
  saved_provenance,
)
from edl_jax.checkpoint.load import checkpoint_provenance
from edl_jax.checkpoint.provenance import Provenance, is_import
from edl_jax.config import Experiment, UserError


def check_workdir(
  workdir: str, provenance: Provenance, checkpoint_bytes: int
) -> None:
  """Checks, before any device work, that a run can use `workdir`.

  Changes nothing there. A bucket is taken to have room enough.

  Args:
    workdir: folder of the run; need not exist.
    provenance: of the run about to start.
    checkpoint_bytes: size of one checkpoint.

  Raises:
    UserError: the folder cannot be written, has too little room, or belongs to
      another run.
  """
  storage.check_name(workdir)
  if not storage.in_bucket(workdir):
    _check_places(workdir)
  saved = saved_provenance(workdir)
  if saved is not None and is_import(saved):
    if checkpoint_bytes:
      raise UserError(
        f"--workdir={workdir} holds imported weights, which no run continues;"
        f" set train.initial_checkpoint={workdir} and choose another --workdir"
      )
  elif saved is not None:
    steps = checkpoint_steps(os.path.join(workdir, FOLDER))
    provenance.check_continues(
      saved, f"--workdir={workdir}", max(steps, default=0)
    )
  try:
    room = _room(workdir)
  except OSError as error:
    named = error.filename in (None, workdir)
    where = "" if named else f" ({error.filename})"
    raise UserError(
      f"cannot write to --workdir={workdir}: {error.strerror}{where}; choose"
      " another"
    ) from error
  keep = provenance.experiment.train.keep_checkpoints
  # While a checkpoint is being written, there is one more than is kept.
  needed = (keep + 1) * checkpoint_bytes
  if room < needed:
    raise UserError(
      f"--workdir={workdir} has room for {room / 2**20:.0f} MiB, but {keep} + 1"
      f" checkpoints take {needed / 2**20:.0f} MiB; make room or choose another"
    )


# What a run writes in its folder.
_FOLDERS = (FOLDER, "damaged", "report", "tensorboard")
_FILES = ("run.json", "metrics.jsonl", "routing.json", "result.json")


def _check_places(workdir: str) -> None:
  """Raises UserError if something is where a run writes something else."""
  for names, right, kind in (
    (_FOLDERS, os.path.isdir, "folder"),
    (_FILES, os.path.isfile, "file"),
  ):
    for name in names:
      place = os.path.join(workdir, name)
      if os.path.lexists(place) and not right(place):
        raise UserError(
          f"--workdir={workdir}: {place} is no {kind}; move it away, or choose"
          " another"
        )
      if os.path.lexists(place) and not os.access(place, os.W_OK):
        raise UserError(
          f"--workdir={workdir}: {place} belongs to another user or cannot be"
          " written; choose another"
        )


def _room(workdir: str) -> float:
  """Returns the bytes that checkpoints may take.

  Raises:
    OSError: the folder cannot be written.
  """
  if storage.in_bucket(workdir):
    storage.check_writable(workdir)
    return math.inf
  existing = os.path.abspath(workdir)
  while not os.path.lexists(existing):
    existing, name = os.path.split(existing)
    # A name that is too long does not exist, and never will.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.lstat(os.path.join(existing, name))
  # Permission bits say little on read-only or special file systems: write.
  with tempfile.TemporaryFile(dir=existing) as file:
    file.write(b"x")
  for name in _FOLDERS:
    if os.path.isdir(folder := os.path.join(workdir, name)):
      try:
        with tempfile.TemporaryFile(dir=folder):
          pass
      except OSError as error:
        error.filename = folder
        raise
  present = _folder_bytes(os.path.join(workdir, FOLDER))
  return present + shutil.disk_usage(existing).free


def describe_workdir(workdir: str, provenance: Provenance) -> None:
  """Writes the provenance to `workdir`/run.json, if that file is missing.

  Until the first checkpoint, it alone says whose folder this is.
  """
  path = os.path.join(workdir, "run.json")
  if not epath.Path(path).exists():
    storage.make_folder(workdir)
    storage.write_json(path, provenance.to_dict())


def initial_provenance(
  experiment: Experiment, workdir: str
) -> Provenance | None:
  """Returns the provenance of the weights that a run starts from.

  These are those of `train.initial_checkpoint`, or imported ones in `workdir`
  itself, which are there to be evaluated. Once the run has a checkpoint of its
  own, that one answers: the initial checkpoint may have been deleted.

  Returns:
    None for a run that starts from random weights.

  Raises:
    UserError: there is no such checkpoint, or its model differs from
      `experiment.model` in more than dtype, rematerialization and pools.
  """
  path = experiment.train.initial_checkpoint
  saved = None
  if checkpoint_steps(os.path.join(workdir, FOLDER)):
    saved = saved_provenance(workdir)
  if saved and is_import(saved):
    provenance = Provenance.from_dict(saved)
    where = f"--workdir={workdir}"
    _check_same_model(provenance.experiment, experiment, where)
    return provenance
  if not path:
    return None
  if saved:
    return Provenance.from_dict(saved)
  try:
    provenance = checkpoint_provenance(path)
  except UserError as error:
    raise UserError(f"train.initial_checkpoint: {error}") from error
  where = f"train.initial_checkpoint={path}"
  _check_same_model(provenance.experiment, experiment, where)
  return provenance


def _check_same_model(
  saved: Experiment, experiment: Experiment, where: str
) -> None:
  # What may differ: the parameters are the same, and pools are for training
  # alone.
  same = {"dtype": "float32", "remat": "none", "pool_min": 0, "pool_max": 0}
  theirs, wanted = (
    config.flatten(dataclasses.replace(Experiment(), model=model))
    for model in (
      dataclasses.replace(saved.model, **same),
      dataclasses.replace(experiment.model, **same),
    )
  )
  keys = config.differing_keys(theirs, wanted)
  if keys:
    raise UserError(
      f"{where} holds another model: {'; '.join(keys)}; set these keys to the"
      " checkpoint's values"
    )


def _folder_bytes(folder: str) -> int:
  return sum(
    os.path.getsize(os.path.join(root, name))
    for root, _, names in os.walk(folder)
    for name in names
  )
