"""Files of this machine or in a bucket, and the one writer of whole files.

A path is a string: a local path, or gs://BUCKET/FOLDER. An object in a bucket
cannot be renamed, mapped into memory or appended to, and needs no folder.
"""

import concurrent.futures
import contextlib
import errno
import gzip
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from etils import epath
from etils.epath import backend
from fsspec.config import conf

from edl_jax.config import UserError

# Orbax and other processes write to the same folders, and a cached listing
# would hide their checkpoints. This must be set before epath makes a client.
conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
# It logs a traceback for every error that it raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# Requests to a bucket at once.
_REQUESTS = 32


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


class FileState(NamedTuple):
  """What tells whether a file is the one that it was."""

  size: int
  # Time of the last change, or the generation of an object.
  version: str


def states(paths: Sequence[str]) -> list[FileState]:
  """Returns the states of files.

  Raises:
    OSError: a file is missing or cannot be read.
  """
  if not any(map(in_bucket, paths)):
    return list(map(_state, paths))
  # A request takes tens of milliseconds, in which the machine waits.
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    return list(pool.map(_state, paths))


def _state(path: str) -> FileState:
  if not in_bucket(path):
    state = os.stat(path)
    return FileState(state.st_size, str(state.st_mtime_ns))
  with _as_os_error(path):
    found = backend.fsspec_backend.fs(path).info(path)
  version = found.get("generation") or found.get("created")
  return FileState(found["size"], str(version))


def size(path: str | os.PathLike[str]) -> int:
  """Returns the bytes of a file; raises OSError, see `states`."""
  return _state(os.fspath(path)).size


def find(pattern: str) -> list[tuple[str, int]]:
  """Returns the objects that a glob in a bucket matches, and their sizes.

  An object whose name is the pattern is taken as it is.

  Raises:
    OSError: the bucket cannot be read.
  """
  scheme = pattern.partition("://")[0]
  with _as_os_error(pattern):
    # Any: fsspec's types leave out what detail=True returns.
    bucket: Any = backend.fsspec_backend.fs(pattern)
    if bucket.isfile(pattern):
      return [(pattern, bucket.info(pattern)["size"])]
    found = bucket.glob(pattern, detail=True)
  return [
    (f"{scheme}://{path.lstrip('/')}", info["size"])
    for path, info in found.items()
    if info["type"] == "file"
  ]


def names(folder: str | os.PathLike[str]) -> set[str]:
  """Returns the names of what is in a folder, none if there is no folder."""
  path = epath.Path(folder)
  with _as_os_error(os.fspath(path)), contextlib.suppress(FileNotFoundError):
    return {entry.name for entry in path.iterdir()}
  return set()


class _Object(io.RawIOBase):
  """An object in a bucket, which raises OSError alone."""

  def __init__(self, path: str):
    self._path = path
    with _as_os_error(path):
      self._file = backend.fsspec_backend.fs(path).open(path, "rb")

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    with _as_os_error(self._path):
      content = self._file.read(len(buffer))
    buffer[: len(content)] = content
    return len(content)

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def open_bytes(path: str | os.PathLike[str]) -> io.BufferedReader:
  """Opens a file for reading.

  Raises:
    OSError: it is missing or cannot be read; so do the methods of the file.
  """
  path = os.fspath(path)
  if in_bucket(path):
    return io.BufferedReader(_Object(path), 1 << 20)
  return open(path, "rb")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
  """Returns what a file holds; raises OSError, see `open_bytes`."""
  with open_bytes(path) as file:
    return file.read()


@contextlib.contextmanager
def _as_os_error(path: str) -> Iterator[None]:
  """Makes an OSError with a reason of whatever gcsfs or a library raises."""
  try:
    yield
  except FileNotFoundError as error:
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
  except Exception as error:
    if isinstance(error, OSError) and error.strerror:
      raise
    raise OSError(errno.EIO, _reason(error), path) from error


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
    with _as_os_error(path):
      epath.Path(path).write_bytes(content.getvalue())
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


def flush(path: str) -> None:
  """Waits until a local file, or the names in a local folder, are on the disk.

  Raises:
    OSError: the disk failed.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def flush_folder(folder: str) -> None:
  """Waits until all files below a local folder, and it, are on the disk.

  Raises:
    OSError: the disk failed.
  """
  for parent, _, files in os.walk(folder):
    for name in (*files, ""):
      flush(os.path.join(parent, name))


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
