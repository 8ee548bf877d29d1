"""Opens text files, decompressed, and says what a damaged one raises."""

import contextlib
import gzip
import importlib
import io
import types
import zlib
from typing import IO, Any

from edl_jax import storage
from edl_jax.config import UserError

# Exceptions of reading a file that is damaged or disappears.
DAMAGE = (OSError, EOFError, zlib.error)

# `zstd --long=31` makes frames that refer back so far. Memory is only taken for
# what a frame holds.
_LARGEST_WINDOW = 1 << 31


def need_package(module: str, purpose: str) -> types.ModuleType:
  """Imports a module of an optional package.

  Raises:
    UserError: the package is not installed; says how to install it.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"{purpose} needs the package {module.split('.')[0]}: pip install -r"
      " requirements-data.txt"
    ) from error


class _GzipStream(gzip.GzipFile):
  """Decompresses a file, and closes it in the end."""

  def __init__(self, file: IO[bytes]):
    super().__init__(mode="rb", fileobj=file)
    self._file = file

  def close(self) -> None:
    super().close()
    self._file.close()


class _ZstdStream(io.RawIOBase):
  """Decompresses any number of frames; raises EOFError for a truncated one."""

  def __init__(self, file: IO[bytes]):
    self._file, self._ready = file, b""
    zstandard = need_package("zstandard", "reading .zst files")
    self._new_frame = zstandard.ZstdDecompressor(
      max_window_size=_LARGEST_WINDOW
    ).decompressobj
    self._frame, self._begun = self._new_frame(), False
    self._damage = zstandard.ZstdError

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      content = self._frame.unused_data if self._frame.eof else b""
      if self._frame.eof:
        self._frame, self._begun = self._new_frame(), False
      content = content or self._file.read(1 << 14)
      if not content:
        if self._begun:
          raise EOFError("the last zstd frame is cut off")
        return 0
      try:
        self._ready, self._begun = self._frame.decompress(content), True
      except self._damage as error:
        raise EOFError(str(error)) from error
    count = min(len(buffer), len(self._ready))
    buffer[:count] = self._ready[:count]
    self._ready = self._ready[count:]
    return count

  def close(self) -> None:
    self._file.close()
    super().close()


def open_stream(path: str) -> io.BufferedIOBase:
  """Opens a file for reading bytes, decompressed if its name says so."""
  name = path.lower()
  if name.endswith(".gz"):
    return _GzipStream(storage.open_bytes(path))
  if name.endswith(".zst"):
    return io.BufferedReader(_ZstdStream(storage.open_bytes(path)), 1 << 20)
  return storage.open_bytes(path)


def reason(error: Exception) -> str:
  """Returns what went wrong, in a few words."""
  return getattr(error, "strerror", None) or " ".join(str(error).split())


def first_bytes(path: str) -> bytes:
  """Returns the first bytes of a file that are neither blank nor a mark.

  A file that cannot be read has none.
  """
  with contextlib.suppress(*DAMAGE), open_stream(path) as stream:
    return stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
  return b""
