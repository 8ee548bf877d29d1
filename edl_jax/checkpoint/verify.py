"""Verifies the checkpoints of a run, without its experiment's classes."""

import os
from collections.abc import Iterator

from edl_jax import storage
from edl_jax.checkpoint.digest import json_digest
from edl_jax.checkpoint.folders import (
  DamagedError,
  checkpoint_steps,
  find_checkpoint,
  read_json,
  read_provenance,
)
from edl_jax.checkpoint.items import check_items, read_item, reading
from edl_jax.config import UserError

_ARRAYS = ("parameters", "optimizer")
# Items that only some runs have.
_OPTIONAL = ("auto_weights", "ema", "spikes")


def verify_run(workdir: str) -> Iterator[str | UserError]:
  """Yields a line for each complete checkpoint, or what is wrong with it.

  Raises:
    UserError: there is no checkpoint.
  """
  workdir = storage.absolute(workdir)
  folder = os.path.join(workdir, "checkpoints")
  steps = checkpoint_steps(folder)
  if not steps:
    checkpoint, _ = find_checkpoint(workdir)
    folder, steps = (
      os.path.dirname(checkpoint),
      checkpoint_steps(os.path.dirname(checkpoint)),
    )
  for step in steps:
    try:
      yield verify_checkpoint(os.path.join(folder, str(step)))
    except DamagedError as error:
      yield error


def verify_checkpoint(checkpoint: str) -> str:
  """Returns a line that says what was found intact.

  Raises:
    DamagedError: something is not what was saved.
  """
  step = os.path.basename(checkpoint)
  saved = read_provenance(checkpoint).get("digests", {})
  data_path = os.path.join(checkpoint, "data", "metadata")
  data_state = reading(checkpoint, lambda: read_json(data_path))
  if saved and saved.get("data") != json_digest(data_state):
    raise DamagedError(f"step {step}: {data_path} is not what was saved")
  count = 0
  for item in (*_ARRAYS, *_OPTIONAL):
    # Checkpoints from before there were digests have what every run has.
    if any(name.startswith(f"{item}/") for name in saved) or (
      not saved and item in _ARRAYS
    ):
      # One item at a time, as all may not fit the memory.
      arrays = {item: read_item(checkpoint, item)}
      count += check_items(checkpoint, arrays, saved, "full")
  if not saved:
    return (
      f"step {step}: readable, but written before checkpoints had digests:"
      " nothing to compare its arrays with"
    )
  return f"step {step}: {count} arrays and the position in the data are intact"
