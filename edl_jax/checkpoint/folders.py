"""The folders of checkpoints, and the JSON files in them."""

import json
import os
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from edl_jax import storage
from edl_jax.checkpoint.digest import json_digest
from edl_jax.config import UserError

FOLDER = "checkpoints"


class DamagedError(UserError):
  """A checkpoint is not what was written; the message names step and file."""


def checkpoint_steps(folder: str) -> list[int]:
  """Returns the steps of the complete checkpoints in `folder`, rising."""
  if not epath.Path(folder).is_dir():
    return []
  # Orbax writes a checkpoint under a temporary name and renames it when it is
  # complete. In a bucket it adds an object that marks it as complete.
  return sorted(
    int(path.name)
    for path in epath.Path(folder).iterdir()
    if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
  )


def find_checkpoint(path: str, step: int | None = None) -> tuple[str, int]:
  """Returns a checkpoint's folder and its step; see `load`."""
  storage.check_access(path)
  path = storage.absolute(path)
  if epath.Path(path, "parameters").is_dir():
    folder, name = os.path.split(path)
    if not name.isdigit():
      raise UserError(
        f"{path}: the folder of a checkpoint must be named by its step"
      )
    steps = [known for known in checkpoint_steps(folder) if str(known) == name]
  else:
    inner = os.path.join(path, FOLDER)
    folder = inner if epath.Path(inner).is_dir() else path
    steps = checkpoint_steps(folder)
  if not steps:
    raise UserError(f"no checkpoint in {path}")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise UserError(
      f"no checkpoint of step {step} in {folder}; there are: "
      + ", ".join(map(str, steps))
    )
  return os.path.join(folder, str(step)), step


def run_folder(path: str) -> str:
  """Returns the folder of the run that a checkpoint belongs to; see `load`.

  Raises:
    UserError: there is no checkpoint.
  """
  checkpoint, _ = find_checkpoint(path)
  return os.path.dirname(os.path.dirname(checkpoint))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a JSON object with a digest of itself, which `read_sealed` checks.

  Args:
    content: it has the key "digests", without which nothing needs a seal.
  """
  return {**content, "seal": json_digest(content)}


def read_provenance(checkpoint: str) -> dict[str, Any]:
  """Returns the provenance that a checkpoint's folder holds, with "digests".

  Checkpoints from before there were digests do not have that key.

  Raises:
    DamagedError: the file is missing or not what was written.
  """
  # Orbax writes the dict that JsonSave is given to this path.
  path = os.path.join(checkpoint, "provenance", "metadata")
  step = os.path.basename(checkpoint)
  try:
    content = read_json(path)
  except UserError as error:
    raise DamagedError(f"step {step}: {error}") from error
  seal = content.pop("seal", None)
  whole = is_provenance(content) and (
    seal == json_digest(content) if seal else len(content) == len(_KEYS)
  )
  if not whole:
    raise DamagedError(f"step {step}: {path} is not what was written")
  return content


# The keys of `Provenance.to_dict`, and the types of their values.
_KEYS = {
  "experiment": dict,
  "taxonomy": dict,
  "tokenizer": str,
  "content_hash": str,
}


def is_provenance(content: Mapping[str, Any]) -> bool:
  """Returns whether a JSON object has the form of a saved `Provenance`."""
  return all(isinstance(content.get(key), kind) for key, kind in _KEYS.items())


def read_json(path: str) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file is missing or damaged.
  """
  try:
    content = json.loads(epath.Path(path).read_text())
    if not isinstance(content, dict):
      raise ValueError(f"not an object, but {type(content).__name__}")
    return content
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} is damaged ({reason})") from error


def saved_provenance(workdir: str) -> dict[str, Any] | None:
  """Returns the provenance saved in `workdir`, None if there is none.

  It comes from the newest checkpoint whose provenance is intact.

  Raises:
    UserError: no checkpoint's provenance is, or run.json is damaged.
  """
  folder = os.path.join(workdir, FOLDER)
  damage = None
  for step in reversed(checkpoint_steps(folder)):
    try:
      return read_provenance(os.path.join(folder, str(step)))
    except DamagedError as error:
      damage = damage or error
  if damage:
    raise damage
  path = os.path.join(workdir, "run.json")
  if not epath.Path(path).exists():
    return None
  try:
    content = read_json(path)
    if not is_provenance(content):
      raise UserError(f"{path} does not describe a run of edl_jax")
    return content
  except UserError as error:
    raise UserError(f"{error}; remove it, or choose another folder") from error
