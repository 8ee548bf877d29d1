"""The cache folder, whose files can be deleted: they are made again."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from edl_jax import storage

_DIGEST_SIZE = hashlib.sha256().digest_size


def cache_directory() -> Path:
  """Returns $EDL_JAX_CACHE, else edl_jax in $XDG_CACHE_HOME or in ~/.cache."""
  if directory := os.environ.get("EDL_JAX_CACHE"):
    return Path(directory).expanduser()
  parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return Path(parent).expanduser() / "edl_jax"


def cache_key(*parts: str | int | float) -> str:
  """Returns a short hash of everything that a cached file depends on."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_cache(name: str) -> bytes | None:
  """Returns the content of a cached file, None if there is none intact.

  A file that was written under another name is not intact either.
  """
  try:
    file = (cache_directory() / name).read_bytes()
  except OSError:
    return None
  content, digest = file[:-_DIGEST_SIZE], file[-_DIGEST_SIZE:]
  return content if digest == _digest(name, content) else None


def write_cache(name: str, content: bytes) -> None:
  """Writes a cached file, if the folder can be written.

  Several processes may write the same file at once.
  """
  with contextlib.suppress(OSError):
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(directory / name, content + _digest(name, content))


def _digest(name: str, content: bytes) -> bytes:
  """Returns what stands behind the content of a file."""
  digest = hashlib.sha256(name.encode())
  digest.update(content)
  return digest.digest()
