"""Folders that may lie in a bucket: what objects cannot do as files do.

Paths stay strings: of this machine, or gs://BUCKET/FOLDER. An object in a
bucket is written whole or not at all; it cannot be renamed, mapped or added
to, and its folders need no making.
"""

import errno
import logging
import os
import uuid

import fsspec
from etils import epath

from edl_jax.config import UserError

# Orbax and other processes write to the same folders: a listing kept in memory
# would hide their checkpoints. Set before epath makes its client.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def in_bucket(path: str) -> bool:
  """Returns whether a path is no folder of this machine."""
  return "://" in path


def absolute(path: str) -> str:
  """Returns a path independent of the working directory, without end slash."""
  return path.rstrip("/") if in_bucket(path) else os.path.abspath(path)


def make_folder(path: str) -> None:
  """Makes a local folder and those above it, where they are missing."""
  if not in_bucket(path):
    os.makedirs(path, exist_ok=True)


def write_bytes(path: str, content: bytes) -> None:
  """Writes a file that is either complete or not there.

  Raises:
    OSError: it cannot be written; `strerror` says why, in one line.
  """
  if in_bucket(path):
    try:
      epath.Path(path).write_bytes(content)
    except Exception as error:  # The library's own, and of those below it.
      raise OSError(errno.EIO, _reason(error), path) from error
    return
  temporary = f"{path}.tmp"
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def check_access(path: str, setting: str = "") -> None:
  """Checks that the bucket of `path` is there and readable.

  Does nothing for a local path.

  Args:
    path: a folder.
    setting: what names the path, such as "--workdir=", for messages.

  Raises:
    UserError: it is not, or what buckets need is not installed.
  """
  if not in_bucket(path):
    return
  scheme, _, rest = path.partition("://")
  named = f"{setting}{path}"
  if scheme != "gs":
    raise UserError(f"{named}: of buckets only gs:// can be used")
  # It logs, with a traceback, what it raises.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  bucket = f"gs://{rest.partition('/')[0]}"
  try:
    epath.Path(bucket).stat()
  except ImportError as error:
    raise UserError(
      f"{named} needs gcsfs: pip install -r requirements-gcs.txt"
    ) from error
  except FileNotFoundError as error:
    raise UserError(f"{named}: there is no bucket {bucket}") from error
  except Exception as error:
    raise UserError(
      f"{named}: cannot read {bucket} ({_reason(error)}); log in with `gcloud"
      " auth application-default login`, or give the VM's service account access"
    ) from error


def check_writable(path: str) -> None:
  """Writes an object below `path`, a folder in a bucket, and removes it.

  Raises:
    OSError: one of both is not allowed; `strerror` says why, in one line.
  """
  # A name of its own: processes that start together must not meet.
  trial = f"{path}/{uuid.uuid4().hex}"
  write_bytes(trial, b"")
  try:
    epath.Path(trial).unlink()
  except Exception as error:
    raise OSError(errno.EIO, _reason(error), path) from error


def _reason(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
