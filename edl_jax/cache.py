"""The cache folder: files that can be made again."""

import hashlib
import json
import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
  """$EDL_JAX_CACHE, or edl_jax in $XDG_CACHE_HOME or in ~/.cache."""
  if directory := os.environ.get("EDL_JAX_CACHE"):
    return Path(directory)
  parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return Path(parent) / "edl_jax"


def cache_key(*parts: str | int | float) -> str:
  """Returns a short name for all that a cached file depends on."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_cache(name: str) -> bytes | None:
  """Returns a cached file, or None if there is none that can be read."""
  try:
    return (cache_directory() / name).read_bytes()
  except OSError:
    return None


def write_cache(name: str, content: bytes) -> None:
  """Writes a cached file as a whole or, where that is impossible, not at all.

  Several processes may write the same file at once.
  """
  try:
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
      try:
        file.write(content)
        file.flush()
        os.replace(file.name, directory / name)
      except OSError:
        os.unlink(file.name)
  except OSError:
    pass
