"""Reads records of text files: JSON lines, Parquet, ArrayRecord, plain text.

A record is a dict with "text" and whatever else its file has: "domain",
"origin", "id", metadata. Readers yield each record with its place, such as
"file:line". In place of a record that cannot be read they yield an error, which
names the place.
"""

import contextlib
import glob
import gzip
import importlib
import io
import json
import os
import re
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from edl_jax.config import UserError

Record = dict[str, Any]
# The place of a record, and the record or what is wrong with it.
Found = tuple[str, Record | UserError]

# Most bytes of a line or a plain file. A longer one is a file without line ends
# rather than a text, and would fill the memory.
LONGEST_RECORD = 1 << 26

_JSON_LINES = (".jsonl", ".json", ".ndjson")
_ROWS_AT_ONCE = 1024


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


def find_files(pattern: str, setting: str) -> tuple[str, list[str]]:
  """Returns the folder in which a glob starts, and the matching files, sorted.

  Raises:
    UserError: no file matches; names the `setting` that holds the glob.
  """
  expanded = os.path.expanduser(pattern)
  paths = sorted(filter(os.path.isfile, glob.glob(expanded, recursive=True)))
  if not paths:
    raise UserError(f"{setting}={pattern}: no such file")
  fixed = re.split(r"[*?\[]", expanded, maxsplit=1)[0]
  return os.path.dirname(fixed), paths


def read_records(path: str, root: str = "") -> Iterator[Found]:
  """Yields the records of a file in order, each with its place.

  The suffix of the file's name, without .gz or .zst, decides how it is read:

  - .jsonl, .json, .ndjson: one object per line;
  - .parquet: one record per row, with a column "text";
  - .array_record: what `data/domain_text` writes;
  - no suffix: JSON lines if the content begins with "{", else plain text;
  - any other: the whole file is one plain text. Its domain is its first folder
    below `root`, or its first two as coarse/fine.

  A record without "path" gets the path of its file.
  """
  name = path.removesuffix(".gz").removesuffix(".zst")
  suffix = os.path.splitext(name)[1]
  read: Callable[[str], Iterator[Found]]
  if suffix in _JSON_LINES or (not suffix and _begins_with_brace(path)):
    read = read_json_lines
  elif suffix == ".parquet":
    read = _read_parquet
  elif ".array_record" in os.path.basename(path):
    read = _read_array_record
  else:
    read = _read_plain
  for where, record in read(path):
    if isinstance(record, dict):
      if read is _read_plain:
        record["domain"] = _domain_by_folder(path, root)
      record.setdefault("path", path)
      record = _problem(record, where) or record
    yield where, record


def _problem(record: Record, where: str) -> UserError | None:
  """Returns what is wrong with a record's text, domain or origin."""
  if "text" not in record:
    return UserError(f"{where}: key 'text' is missing")
  for key in ("text", "domain", "origin"):
    value = record.get(key)
    if not isinstance(value, str) and (key == "text" or value is not None):
      return UserError(
        f"{where}: {key} must be a string, not {type(value).__name__}"
      )
    try:
      (value or "").encode()
    except UnicodeEncodeError:
      return UserError(f"{where}: {key} holds half a surrogate pair")
  return None


class SeenIds:
  """Detects ids that occur twice; ignores records without an id."""

  def __init__(self):
    self._seen: set[str] = set()

  def problem(self, record: Record, where: str) -> UserError | None:
    """Remembers a record's id; returns an error if it occurred before."""
    if record.get("id") is None:
      return None
    identifier = str(record["id"])
    if identifier in self._seen:
      return UserError(f"{where}: id {identifier!r} occurs a second time")
    self._seen.add(identifier)
    return None


# --- Streams -----------------------------------------------------------------


class _ZstdStream(io.RawIOBase):
  """Decompresses any number of frames; raises EOFError for a truncated one."""

  def __init__(self, file: IO[bytes]):
    self._file, self._ready = file, b""
    zstandard = need_package("zstandard", "reading .zst files")
    self._new_frame = zstandard.ZstdDecompressor().decompressobj
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


def _open(path: str) -> io.BufferedIOBase:
  """Opens a file for reading bytes, decompressed if its name says so."""
  if path.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.endswith(".zst"):
    return io.BufferedReader(_ZstdStream(open(path, "rb")), 1 << 20)
  return open(path, "rb")


# Exceptions of reading a file that is damaged or disappears.
_DAMAGE = (OSError, EOFError, zlib.error)


def _damaged(where: str, error: Exception) -> Found:
  reason = getattr(error, "strerror", None) or " ".join(str(error).split())
  return where, UserError(f"{where}: cannot be read further ({reason})")


def _begins_with_brace(path: str) -> bool:
  with contextlib.suppress(*_DAMAGE), _open(path) as stream:
    return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
  return False


# --- Kinds of file -----------------------------------------------------------


def read_json_lines(path: str) -> Iterator[Found]:
  """Yields ("path:line", object or error) of every line that is not blank.

  A name that ends in .gz or .zst is decompressed. What the objects hold is not
  checked.
  """
  number, offset = 0, 0
  try:
    with _open(path) as stream:
      while line := stream.readline(LONGEST_RECORD + 1):
        number += 1
        where, start = f"{path}:{number}", offset
        offset += len(line)
        if len(line) > LONGEST_RECORD:
          while not line.endswith(b"\n") and line:
            line = stream.readline(LONGEST_RECORD)
            offset += len(line)
          yield (
            where,
            UserError(
              f"{where}: the line from byte {start} to {offset} is longer than"
              f" {LONGEST_RECORD:,} bytes"
            ),
          )
        elif line.strip():
          yield where, _parse(line, where)
  except _DAMAGE as error:
    yield _damaged(f"{path}:{number + 1}", error)
    return
  if not number:
    yield path, UserError(f"{path}: empty file")


def _parse(line: bytes, where: str) -> Record | UserError:
  try:
    # Some editors write a byte order mark at the start of a file.
    record = json.loads(line.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    return UserError(
      f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})"
    )
  except json.JSONDecodeError as error:
    return UserError(
      f"{where}: not JSON ({error.msg} at character {error.pos + 1})"
    )
  except (ValueError, RecursionError) as error:  # A huge number; deep nesting.
    return UserError(f"{where}: not JSON ({error})")
  if not isinstance(record, dict):
    return UserError(f"{where}: not an object, but {type(record).__name__}")
  return record


def _read_plain(path: str) -> Iterator[Found]:
  """Yields the whole file as one record, even if it is empty."""
  try:
    with _open(path) as stream:
      content = stream.read(LONGEST_RECORD + 1)
    if len(content) > LONGEST_RECORD:
      yield (
        path,
        UserError(f"{path}: a text of more than {LONGEST_RECORD:,} bytes"),
      )
      return
    yield path, {"text": content.decode("utf-8-sig")}
  except UnicodeDecodeError as error:
    yield (
      path,
      UserError(
        f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})"
      ),
    )
  except _DAMAGE as error:
    yield _damaged(path, error)


def _domain_by_folder(path: str, root: str) -> str | None:
  folders = Path(os.path.relpath(path, root or ".")).parts[:-1]
  return "/".join(folders[:2]) or None


def _read_parquet(path: str) -> Iterator[Found]:
  """Yields ("path:row N", record), N from 1, with all columns."""
  parquet = need_package("pyarrow.parquet", "reading Parquet")
  damage = (*_DAMAGE, need_package("pyarrow", "reading Parquet").ArrowException)
  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      if "text" not in names:
        problem = f"no column 'text'; there are: {', '.join(names)}"
        yield path, UserError(f"{path}: {problem}")
        return
      for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
        for record in batch.to_pylist():
          number += 1
          yield f"{path}:row {number}", record
  except damage as error:
    yield _damaged(f"{path}:row {number + 1}", error)
    return
  if not number:
    yield path, UserError(f"{path}: empty file")


def _read_array_record(path: str) -> Iterator[Found]:
  """Yields ("path:record N", record), N from 1, of a TFDS data set.

  The features.json in its folder describes the records. Class labels become
  their names.
  """
  purpose = "reading ArrayRecord"
  features = need_package("tensorflow_datasets", purpose).features
  module = need_package("array_record.python.array_record_module", purpose)
  number = 0
  try:
    decoder = features.FeaturesDict.from_config(os.path.dirname(path) or ".")
    reader = module.ArrayRecordReader(path)
    try:
      for start in range(0, reader.num_records(), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, reader.num_records())
        for content in reader.read(start, stop):
          example = decoder.deserialize_example_np(content)
          number += 1
          yield f"{path}:record {number}", _named(example, decoder)
    finally:
      reader.close()
  # array_record and protocol buffers raise the last three.
  except (*_DAMAGE, RuntimeError, ValueError, IndexError) as error:
    yield _damaged(f"{path}:record {number + 1}", error)
    return
  if not number:
    yield path, UserError(f"{path}: empty file")


def _named(example: Record, features: Any) -> Record:
  """Returns an example with text as str and the name of its domain."""
  record: Record = {}
  for key, value in example.items():
    if hasattr(features[key], "int2str"):
      value = features[key].int2str(int(value))
    elif isinstance(value, bytes):
      value = value.decode()
    record[key] = value
  if "domain" not in record and "fine" in record:
    coarse = record.get("coarse") or record["fine"]
    same = coarse == record["fine"]
    record["domain"] = record["fine"] if same else f"{coarse}/{record['fine']}"
  return record
