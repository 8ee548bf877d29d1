"""Reads records of text files: JSON, Parquet, ArrayRecord, plain text.

A record is a dict with "text", or what a supervised example has, and whatever
else its file has: "domain", "origin", "id", metadata. Readers yield each record
with its place, such as "file:line". In place of a record that cannot be read
they yield an error, which names the place first, then the reason; details are
in parentheses.
"""

import functools
import io
import json
import numbers
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO

from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.text.examples import is_example, plain_text
from edl_jax.text.files import (
  JSON_LINES,
  domain_by_folder,
  partitions,
  suffix_of,
)
from edl_jax.text.streams import (
  DAMAGE,
  first_bytes,
  need_package,
  open_stream,
  reason,
)

Record = dict[str, Any]
# The place of a record, and the record or what is wrong with it.
Found = tuple[str, Record | UserError]

# Most bytes of a line or a plain file. A longer one is a file without line ends
# rather than a text, and would fill the memory.
LONGEST_RECORD = 1 << 26

# The columns of a Parquet file that are read, besides those asked for.
COLUMNS = ("text", "domain", "origin", "id")
# What a file of supervised examples has in place of "text".
_FORMS = ("prompt", "completion", "messages")

_ROWS_AT_ONCE = 1024
# What follows the path in a place.
_PLACE = re.compile(r":(?:(?:row|item|record) )?\d+$")
_CHARACTERS_AT_ONCE = 1 << 20


def read_records(
  path: str,
  root: str = "",
  columns: Collection[str] = (),
  *,
  examples: bool = False,
) -> Iterator[Found]:
  """Yields the records of a file in order, each with its place.

  The suffix of the file's name, without .gz or .zst and in any case, decides
  how it is read:

  - .jsonl, .json, .ndjson: one object per line, or one array of objects;
  - .parquet: one record per row, with a column "text" or those of examples;
  - .array_record: what `data/domain_text` writes;
  - no suffix: as JSON if the content begins so, else plain text;
  - any other: the whole file is one plain text. Its domain is its first folder
    below `root`, or its first two as coarse/fine.

  A record without "path" gets the path of its file. One without "domain" gets
  the value of a folder domain=VALUE, as Hive names them; so with other keys.
  Domains that are integers become their digits. An empty file has no records.

  Args:
    path: of the file.
    root: folder in which a glob started.
    columns: what to read of a Parquet file besides `COLUMNS`.
    examples: whether records may be supervised examples (see `examples`). They
      get a "text", which rules and models can read.
  """
  name, suffix = os.path.basename(path), suffix_of(path)
  start = first_bytes(path) if suffix in ("", *JSON_LINES) else b""
  read: Callable[[str], Iterator[Found]]
  if start.startswith(b"[") and (suffix or start[1:].lstrip()[:1] == b"{"):
    read = _read_json_array
  elif suffix in JSON_LINES or start.startswith(b"{"):
    read = read_json_lines
  elif suffix == ".parquet":
    read = functools.partial(
      _read_parquet, columns={*COLUMNS, *columns}, examples=examples
    )
  elif ".array_record" in name:
    read = _read_array_record
  else:
    read = _read_plain
  given = partitions(path)
  for where, record in read(path):
    if isinstance(record, dict):
      for key, value in given.items():
        record.setdefault(key, value)
      if read is _read_plain:
        record.setdefault("domain", domain_by_folder(path, root))
      record.setdefault("path", path)
      record = _problem(record, where, examples) or record
    yield where, record


def _problem(record: Record, where: str, examples: bool) -> UserError | None:
  """Returns what is wrong with a record's text, domain or origin.

  A domain that is an integer becomes text. A supervised example gets a text.
  """
  if is_example(record):
    if not examples:
      return UserError(
        f"{where}: a supervised example; only data.files reads them"
      )
    try:
      record["text"] = plain_text(record, where)
    except UserError as error:
      return error
  if "text" not in record:
    return UserError(f"{where}: key 'text' is missing")
  label = record.get("domain")
  # pandas makes a column of integers with gaps one of floats.
  if isinstance(label, float) and label.is_integer():
    label = int(label)
  if isinstance(label, numbers.Integral) and not isinstance(label, bool):
    record["domain"] = str(int(label))
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


def file_of(where: str) -> str:
  """Returns the path of the file in which a place is."""
  return _PLACE.sub("", where)


class SeenIds:
  """Detects ids that occur twice in a file; ignores records without an id."""

  def __init__(self):
    self._file, self._seen = "", set[str]()

  def problem(self, record: Record, where: str) -> UserError | None:
    """Remembers a record's id; returns an error if it occurred before.

    Args:
      record: of a file that is read in one go.
      where: its place, "file:place".
    """
    file = file_of(where)
    if file != self._file:
      # Many data sets count the records of each file from 0.
      self._file, self._seen = file, set()
    if record.get("id") is None:
      return None
    identifier = str(record["id"])
    if identifier in self._seen:
      return UserError(f"{where}: id {identifier!r} occurs a second time")
    self._seen.add(identifier)
    return None


def _damaged(where: str, error: Exception) -> Found:
  return where, UserError(f"{where}: cannot be read further ({reason(error)})")


# --- Kinds of file -----------------------------------------------------------


def read_json_lines(path: str) -> Iterator[Found]:
  """Yields ("path:line", object or error) of every line that is not blank.

  A name that ends in .gz or .zst is decompressed. What the objects hold is not
  checked.
  """
  number, offset = 0, 0
  try:
    with open_stream(path) as stream:
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
              f"{where}: longer than {LONGEST_RECORD:,} bytes (the line from"
              f" byte {start} to {offset})"
            ),
          )
        elif line.strip():
          yield where, _parse(line, where)
  except DAMAGE as error:
    yield _damaged(f"{path}:{number + 1}", error)


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
  return _object(record, where)


def _read_json_array(path: str) -> Iterator[Found]:
  """Yields ("path:item N", object or error), N from 1, of one array."""
  number = 1
  try:
    # Any: the wrapper wants a name, which a decompressed stream lacks.
    content: Any = open_stream(path)
    with io.TextIOWrapper(content, "utf-8-sig", newline="") as stream:
      for item in _items(stream):
        where = f"{path}:item {number}"
        yield where, _object(item, where)
        number += 1
  except (*DAMAGE, UnicodeDecodeError) as error:
    yield _damaged(f"{path}:item {number}", error)
  except (ValueError, RecursionError) as error:
    where = f"{path}:item {number}"
    yield where, UserError(f"{where}: not JSON ({reason(error)})")


_END = object()


def _items(stream: TextIO) -> Iterator[Any]:
  """Yields the items of a JSON array, of which it keeps a part in memory.

  Raises:
    ValueError, RecursionError: the text is no array, or an item too long.
  """
  text, at, mark, more = "", 0, "[", True
  while True:
    try:
      item, at = _item(text, at, mark)
    except (ValueError, RecursionError):
      # The item may go on in what is not read yet.
      if not more or len(text) - at > LONGEST_RECORD:
        raise
      text, at = text[at:], 0
      added = stream.read(max(_CHARACTERS_AT_ONCE, len(text)))
      text, more = text + added, bool(added)
      continue
    if item is _END:
      return
    mark = ","
    yield item


def _item(text: str, at: int, mark: str) -> tuple[Any, int]:
  """Returns the item behind `mark`, `_END` for none, and where it ends."""
  at = _skip_blanks(text, at)
  if text[at : at + 1] not in (mark, "]"):
    raise ValueError(f"{mark} or ] is missing")
  start = _skip_blanks(text, at + 1)
  if text[at] == "]" or (mark == "[" and text[start : start + 1] == "]"):
    return _END, start
  return json.JSONDecoder().raw_decode(text, start)


def _skip_blanks(text: str, at: int) -> int:
  while text[at : at + 1] in ("\n", " ", "\r", "\t"):
    at += 1
  return at


def _object(record: Any, where: str) -> Record | UserError:
  if isinstance(record, dict):
    return record
  return UserError(f"{where}: not an object, but {type(record).__name__}")


def _read_plain(path: str) -> Iterator[Found]:
  """Yields the whole file as one record; an empty file has none."""
  try:
    with open_stream(path) as stream:
      content = stream.read(LONGEST_RECORD + 1)
    if len(content) > LONGEST_RECORD:
      yield (
        path,
        UserError(f"{path}: a text of more than {LONGEST_RECORD:,} bytes"),
      )
      return
    if content:
      yield path, {"text": content.decode("utf-8-sig")}
  except UnicodeDecodeError as error:
    yield (
      path,
      UserError(
        f"{path}: not UTF-8 ({error.reason} at byte {error.start + 1})"
      ),
    )
  except DAMAGE as error:
    yield _damaged(path, error)


def _read_parquet(
  path: str, columns: Collection[str], examples: bool
) -> Iterator[Found]:
  """Yields ("path:row N", record), N from 1, with those of `columns` it has.

  A value that cannot be converted makes an error of its row alone. The columns
  of supervised examples are read if `examples` or if there is no text.
  """
  parquet = need_package("pyarrow.parquet", "reading Parquet")
  damage = (*DAMAGE, need_package("pyarrow", "reading Parquet").ArrowException)
  number = 0
  try:
    if not storage.size(path):
      return
    with (
      storage.open_bytes(path) as stream,
      parquet.ParquetFile(stream) as file,
    ):
      names = file.schema_arrow.names
      if examples or "text" not in names:
        columns = {*columns, *_FORMS, "tools"}
      if not {"text", *_FORMS}.intersection(names):
        problem = f"no column 'text'; there are: {', '.join(names)}"
        yield path, UserError(f"{path}: {problem}")
        return
      wanted = [name for name in dict.fromkeys(names) if name in columns]
      for batch in file.iter_batches(
        _ROWS_AT_ONCE, columns=wanted, use_threads=False
      ):
        names = batch.schema.names
        for row in zip(*map(_values, batch.columns), strict=True):
          number += 1
          where = f"{path}:row {number}"
          bad = [
            UserError(f"{where}: {name} cannot be read ({reason(value)})")
            for name, value in zip(names, row)
            if isinstance(value, Exception)
          ]
          record = dict(zip(names, row))
          for name in ("messages", "tools"):
            if isinstance(record.get(name), list):
              record[name] = _without_nulls(record[name])
          yield where, bad[0] if bad else record
  except damage as error:
    yield _damaged(f"{path}:row {number + 1}", error)


def _values(column: Any) -> list[Any]:
  """Returns a column's values, and an exception for each that has none."""
  try:
    values = column.to_pylist()
  # Arrow's exceptions are ValueErrors. Dates beyond Python's range overflow.
  except (ValueError, OverflowError):
    values = [_value(scalar) for scalar in column]
  # Some writers store text as bytes.
  if any(isinstance(value, bytes) for value in values):
    values = [_decoded(value) for value in values]
  return values


def _value(scalar: Any) -> Any:
  try:
    return scalar.as_py()
  except (ValueError, OverflowError) as error:
    return error


def _without_nulls(value: Any) -> Any:
  """Returns a value without the keys of objects that are null.

  A column gives every object the keys of all. Chat templates ask whether a
  message has a key.
  """
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


def _decoded(value: Any) -> Any:
  try:
    return value.decode() if isinstance(value, bytes) else value
  except UnicodeDecodeError as error:
    return error


def _read_array_record(path: str) -> Iterator[Found]:
  """Yields ("path:record N", record), N from 1, of a TFDS data set.

  The features.json in its folder describes the records. Class labels become
  their names.
  """
  purpose = "reading ArrayRecord"
  if storage.in_bucket(path):
    problem = "ArrayRecord is not read in buckets; copy it to a disk"
    yield path, UserError(f"{path}: {problem}")
    return
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
  except (*DAMAGE, RuntimeError, ValueError, IndexError) as error:
    yield _damaged(f"{path}:record {number + 1}", error)


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
