"""Files of this machine or in a bucket, and the one writer of whole files.

A path is a string: a local path, or gs://BUCKET/FOLDER. An object in a bucket
cannot be renamed, mapped into memory or appended to, and needs no folder.
"""

import contextlib
import errno
import gzip
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath
from fsspec.config import conf

from edl_jax.config import UserError

# Orbax and other processes write to the same folders, and a cached listing
# would hide their checkpoints. This must be set before epath makes a client.
conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def in_bucket(path: str) -> bool:
  """Returns whether a path lies in a bucket, not on this machine."""
  return "://" in path


def absolute(path: str) -> str:
  """Returns a path that does not depend on the working directory.

  It ends without a slash. A "~" at its start is the user's home.
  """
  if in_bucket(path):
    return path.rstrip("/")
  return os.path.abspath(os.path.expanduser(path))


def check_name(path: str) -> None:
  """Checks that a run can keep checkpoints in `path`, by its name.

  Raises:
    UserError: Orbax, which writes them, would take the path for a pattern.
  """
  whole = absolute(path)
  if special := set(whole) & set("*?["):
    raise UserError(
      f"--workdir={path}: {whole} holds {' '.join(sorted(special))}, which the"
      " library that writes checkpoints takes for a pattern; choose another"
    )


def make_folder(path: str) -> None:
  """Creates a local folder and its parents; does nothing in a bucket."""
  if not in_bucket(path):
    os.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """Opens a file that becomes visible, complete, when the block ends.

  If the block raises, whatever was at `path` stays as it was. Several processes
  may write the same file at once; the last to finish wins. The folder must
  exist. A device or a pipe, such as /dev/stdout, is written to directly.

  Yields:
    The file, open for writing bytes.

  Raises:
    OSError: it cannot be written; `strerror` says why, in one line.
  """
  path = os.fspath(path)
  if in_bucket(path):
    content = io.BytesIO()
    yield content
    try:
      epath.Path(path).write_bytes(content.getvalue())
    except Exception as error:  # Of gcsfs, or of a library that it uses.
      raise OSError(errno.EIO, _reason(error), path) from error
    return
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, "wb") as file:
      yield file
    return
  folder, name = os.path.split(path)
  # Process ids do not tell apart the machines that share a folder.
  temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


@contextlib.contextmanager
def whole_folder(path: str) -> Iterator[str]:
  """Makes a folder that becomes visible, complete, when the block ends.

  If the block raises, nothing is left. Parents are made where they are missing.

  Args:
    path: of the folder, on this machine; it must not exist.

  Yields:
    The path of the folder while it is being filled.

  Raises:
    OSError: it exists, or cannot be written.
  """
  parent, name = os.path.split(os.path.abspath(path))
  if os.path.lexists(path):
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
  os.makedirs(parent, exist_ok=True)
  temporary = os.path.join(parent, f".{name}.{uuid.uuid4().hex}.tmp")
  try:
    os.mkdir(temporary)
    yield temporary
    os.rename(temporary, path)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


@contextlib.contextmanager
def whole_gzip_file(path: str | os.PathLike[str]) -> Iterator[gzip.GzipFile]:
  """Opens a gzip file as `whole_file` does; equal contents give equal bytes."""
  with (
    whole_file(path) as file,
    # Without the name and the time that gzip otherwise stores.
    gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
  ):
    yield packed


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file whole or not at all; see `whole_file`."""
  with whole_file(path) as file:
    file.write(content)


def write_json(
  path: str | os.PathLike[str], value: Any, *, indent: int | None = None
) -> None:
  """Writes a JSON file whole or not at all; see `whole_file`.

  Args:
    path: of the file.
    value: what `json.dumps` takes.
    indent: spaces a level, for files that people read: these keep characters
      beyond ASCII, and end with a newline. None: one line without it.
  """
  if indent is None:
    text = json.dumps(value)
  else:
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
  write_bytes(path, text.encode())


def check_access(path: str, setting: str = "") -> None:
  """Checks that the bucket of `path` exists and can be read.

  Does nothing for a local path.

  Args:
    path: a folder.
    setting: the flag or key that holds the path, such as "--workdir=", for
      messages.

  Raises:
    UserError: there is no such bucket, it cannot be read, or gcsfs is not
      installed.
  """
  if not in_bucket(path):
    return
  scheme, _, rest = path.partition("://")
  named = f"{setting}{path}"
  if scheme != "gs":
    raise UserError(f"{named}: only gs:// buckets can be used")
  # gcsfs logs a traceback for every error that it raises.
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
      f"{named}: cannot read {bucket} ({_reason(error)}); log in with"
      " `gcloud auth application-default login`, or give the VM's service"
      " account access"
    ) from error


def check_writable(path: str) -> None:
  """Writes an object in `path`, a folder of a bucket, and deletes it again.

  Raises:
    OSError: one of the two is not allowed; `strerror` says why, in one line.
  """
  # Processes that start together need different names.
  trial = f"{path}/{uuid.uuid4().hex}"
  try:
    write_bytes(trial, b"")
  except OSError as error:
    # Name the folder: the caller does not know the trial.
    raise OSError(error.errno, error.strerror, path) from error
  try:
    epath.Path(trial).unlink()
  except Exception as error:
    raise OSError(errno.EIO, _reason(error), path) from error


def _reason(error: Exception) -> str:
  """Returns an error's message in one line."""
  return " ".join(str(error).split()) or type(error).__name__
