"""Checks of a folder to write, before any work."""

import os
import shutil

from edl_jax import storage
from edl_jax.config import UserError


def check_new(out: str) -> None:
  """Checks that `out` is a folder of this machine that does not exist.

  Raises:
    UserError: it exists, or lies in a bucket.
  """
  if storage.in_bucket(out):
    raise UserError(
      f"--out={out}: name a folder on this machine, and copy it to the bucket"
      " when it is complete"
    )
  if os.path.lexists(out):
    raise UserError(f"--out={out} exists; remove it or choose another")


def check_room(out: str, needed: int) -> None:
  """Raises UserError if the disk of `out` has fewer free bytes than needed."""
  existing = os.path.abspath(out)
  while not os.path.isdir(existing):
    existing = os.path.dirname(existing)
  free = shutil.disk_usage(existing).free
  if free < needed:
    raise UserError(
      f"--out={out} needs {needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are"
      " free; make room or choose another"
    )
