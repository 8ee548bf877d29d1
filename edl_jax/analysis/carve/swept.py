"""Carving the runs of a sweep: the command to start, and what it left.

This module imports no JAX: a sweep starts commands and reads files.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from edl_jax import config
from edl_jax.analysis import sweep_report
from edl_jax.config import UserError

# In the sweep's folder. No run is in it, as it has no result.json.
_FOLDER = "carve"


def command(
  workdir: str, names: Sequence[str], keep: Sequence[int]
) -> list[str]:
  """Returns the command line that carves runs of the sweep in `workdir`.

  Args:
    workdir: folder of the sweep.
    names: the runs' folders in it.
    keep: numbers of experts to keep.
  """
  return [
    sys.executable,
    "-m",
    "edl_jax.analysis.carve",
    *(f"--workdir={os.path.join(workdir, name)}" for name in names),
    f"--keep={','.join(map(str, keep))}",
    f"--out={os.path.join(workdir, _FOLDER)}",
  ]


def read(
  workdir: str, runs: Sequence[sweep_report.Run]
) -> list[dict[str, Any] | None]:
  """Returns what carving measured of each run; None where it did not.

  What is left of another experiment or of an earlier step does not count.

  Raises:
    UserError: carve.json is damaged.
  """
  path = os.path.join(workdir, _FOLDER, "carve.json")
  if not os.path.exists(path):
    return [None for _ in runs]
  try:
    with open(path) as file:
      results = json.load(file)
    found = {os.path.basename(each["workdir"]): each for each in results}
    return [_of_run(found.get(run.name), run) for run in runs]
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path}: not what carving wrote; delete that file to carve again"
    ) from error


def _of_run(
  found: dict[str, Any] | None, run: sweep_report.Run
) -> dict[str, Any] | None:
  if found is None or found["step"] != run.result["step"]:
    return None
  before, now = found["experiment"], run.result["experiment"]
  return None if config.differing_keys(before, now) else found


def is_carved(
  workdir: str, runs: Sequence[sweep_report.Run], keep: Sequence[int]
) -> bool:
  """Returns whether every run has been carved to these numbers of experts."""
  return all(
    result is not None
    and {point["keep"] for point in result["points"]} == set(keep)
    for result in read(workdir, runs)
  )
