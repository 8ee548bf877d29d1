"""Scans and tokenizes text in chunks, which several processes share.

Every chunk's result is a file that is complete or missing, so that the work can
be killed at any time and resumed.
"""

import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from etils import epath

from data.bad_records import BadRecords
from data.columns import columns_in, load_conditions
from data.labels import Rule, load_rules, rule_columns
from data.near import Near
from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.text.mixture import origin_digest
from edl_jax.text.prepared import DOCUMENT, TOKENIZER, tokens_name
from edl_jax.text.readers import Found, Record, file_of, read_records
from edl_jax.text.tokenizer import Tokenizer

_Job = TypeVar("_Job")
_Made = TypeVar("_Made")

# Small files that are read or written at once.
_THREADS = 16
# NumPy parses headers by ast, which fails at random in several threads of
# Python 3.11 (https://github.com/python/cpython/issues/106905).
_PARSING = threading.Lock()


class Chunk(NamedTuple):
  """Consecutive records of one or more files, and errors of bad ones."""

  number: int
  found: list[Found]
  # About how many bytes of the files were read for it.
  stored: int = 0

  def records(self) -> list[Record]:
    """Returns the good records."""
    return [found for _, found in self.found if isinstance(found, dict)]


def read_chunks(
  root: str,
  paths: Sequence[str],
  characters: int,
  columns: Collection[str] = (),
) -> Iterator[Chunk]:
  """Yields all records in order, in chunks of about `characters` each.

  `columns` are read besides those that every record may have.
  """
  numbers = itertools.count()
  chunk, size, stored = [], 0, 0
  for path in paths:
    # Text takes as many bytes, until it turns out to be compressed.
    left = storage.size(path)
    for where, found in read_records(path, root, columns):
      chunk.append((where, found))
      added = cost(found)
      size += added
      stored += min(added, left)
      left -= min(added, left)
      if size >= characters:
        yield Chunk(next(numbers), chunk, stored)
        chunk, size, stored = [], 0, 0
    stored += left
  if chunk:
    yield Chunk(next(numbers), chunk, stored)


def cost(found: Record | UserError) -> int:
  """Returns what a record adds to the size of its chunk, in characters."""
  # Each record costs some work, however short it is.
  return 100 + (len(found["text"]) if isinstance(found, dict) else 0)


class Workers:
  """A context manager that applies a function to jobs in several processes.

  A count of one uses this process. Others start with their first job.
  """

  def __init__(self, count: int, start: Callable[..., None], *arguments: Any):
    """Calls `start` once in each process, with `arguments`."""
    self._count, self._pool = count, None
    if count == 1:
      start(*arguments)
      return
    self._pool = concurrent.futures.ProcessPoolExecutor(
      count,
      multiprocessing.get_context("spawn"),
      initializer=_start_process,
      initargs=(start, arguments),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)

  def in_order(
    self, function: Callable[[_Job], _Made], jobs: Iterable[_Job]
  ) -> Iterator[_Made]:
    """Yields `function(job)` of each job, in order; reads a few jobs ahead.

    Raises:
      UserError: a process was killed.
    """
    if self._pool is None:
      yield from map(function, jobs)
      return
    try:
      yield from _in_order(self._pool, function, jobs, 2 * self._count)
    except concurrent.futures.BrokenExecutor as error:
      raise UserError(
        "a worker process was killed, perhaps because memory ran out; start"
        " the same command again to resume, if need be with fewer --workers"
      ) from error


def in_threads(
  function: Callable[[_Job], _Made], jobs: Iterable[_Job]
) -> Iterator[_Made]:
  """Yields `function(job)` of each job, in order; reads some jobs ahead.

  The threads of this process wait together for files, above all in a bucket.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    yield from _in_order(pool, function, jobs, _THREADS)


def _in_order(
  pool: concurrent.futures.Executor,
  function: Callable[[_Job], _Made],
  jobs: Iterable[_Job],
  ahead: int,
) -> Iterator[_Made]:
  pending: deque[concurrent.futures.Future[_Made]] = deque()
  for job in jobs:
    pending.append(pool.submit(function, job))
    if len(pending) > ahead:
      yield pending.popleft().result()
  while pending:
    yield pending.popleft().result()


def _start_process(
  start: Callable[..., None], arguments: Sequence[Any]
) -> None:
  # The processes replace the tokenizer's own threads.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  os.environ["RAYON_NUM_THREADS"] = "1"
  # A killed parent cannot end its children, so they watch for its end.
  parent = multiprocessing.parent_process()
  assert parent is not None, "must run in a worker"

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  start(*arguments)


def write_arrays(path: epath.Path, **arrays: Any) -> None:
  """Writes named arrays whole or not at all."""
  file = io.BytesIO()
  np.savez(file, **arrays)
  storage.write_bytes(path, file.getvalue())


# --- Functions that run in the processes -------------------------------------


class _Worker:
  """The state of a process."""

  def __init__(self, out: str, rules: str, skip_bad: bool, near: Near | None):
    self.out, self.skip_bad, self.near = epath.Path(out), skip_bad, near
    self.rule: Rule | None = load_rules(rules) if rules else None
    self.columns = rule_columns(rules) if rules else []
    self.conditions = load_conditions(rules) if rules else []

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer, whose file is written before encoding begins."""
    text = storage.read_bytes(self.out / TOKENIZER).decode()
    return Tokenizer.from_json(text)


_worker: _Worker


def start_worker(
  out: str, rules: str, skip_bad: bool, near: Near | None = None
) -> None:
  """Prepares this process for `scan` and `encode`."""
  global _worker
  _worker = _Worker(out, rules, skip_bad, near)


def scan_path(out: str | os.PathLike[str], number: int) -> epath.Path:
  """Returns the path of the arrays that `scan` writes for a chunk."""
  return epath.Path(out, "work", f"scan-{number:05}.npz")


def encoded_path(out: str | os.PathLike[str], number: int) -> epath.Path:
  """Returns the path of the documents that `encode` writes for a chunk."""
  return epath.Path(out, "work", f"documents-{number:05}.npz")


def scan(chunk: Chunk) -> int:
  """Writes labels, sizes and digests of a chunk's records; returns their bytes.

  Raises:
    UserError: a record is bad, and bad records are not skipped.
  """
  bad = BadRecords()
  labels: dict[str | None, tuple[int, str]] = {}
  # Good records of each file, in the order of reading.
  files = Counter[str]()
  ids, columns, missing = [], [], set(_worker.columns)
  for where, record in chunk.found:
    if isinstance(record, UserError):
      if not _worker.skip_bad:
        raise record
      bad.add(where, record)
      continue
    files[file_of(where)] += 1
    if record.get("id") is not None:
      ids.append((len(columns), str(record["id"]), where))
    name, confidence = record.get("domain"), 1.0
    missing -= columns_in(record, missing)
    # No label: the conditions leave the record out.
    label = -1
    if all(condition.holds(record) for condition in _worker.conditions):
      if _worker.rule:
        name, confidence = _worker.rule(record) or (None, 0.0)
      label, _ = labels.setdefault(name, (len(labels), where))
    text = record["text"]
    content = text.encode()
    digest, origin = hashlib.sha256(content).digest(), record.get("origin")
    columns.append(
      (
        label,
        confidence,
        len(text),
        len(content),
        not text or text.isspace(),
        digest,
        # A text without an origin is its own.
        origin_digest(origin) if origin else digest,
      )
    )
  more: dict[str, Any] = {}
  if _worker.near:
    good = [(place, r) for place, r in chunk.found if isinstance(r, dict)]
    more = _worker.near.columns(
      [place for place, _ in good], [record["text"] for _, record in good]
    )
  values = zip(*columns) if columns else [[]] * 7
  label, confidence, characters, size, blank, text, origin = values
  write_arrays(
    scan_path(_worker.out, chunk.number),
    label=np.array(label, np.int32),
    confidence=np.array(confidence, np.float32),
    characters=np.array(characters, np.uint32),
    bytes=np.array(size, np.uint32),
    blank=np.array(blank, bool),
    text=_digests(text),
    origin=_digests(origin),
    # The name of each label by its index, and where it first occurs.
    labels=json.dumps([(name, where) for name, (_, where) in labels.items()]),
    ids=json.dumps(ids),
    files=json.dumps(list(files.items())),
    bad=json.dumps(bad.to_json()),
    missing=json.dumps(sorted(missing)),
    **more,
  )
  return sum(size)


def _digests(digests: Sequence[bytes]) -> np.ndarray:
  return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


class Job(NamedTuple):
  """The texts to keep of a chunk, their sources, and which are held out."""

  number: int
  texts: list[str]
  source_N: np.ndarray
  held_out_N: np.ndarray

  @classmethod
  def of_chunk(
    cls,
    chunk: Chunk,
    source_N: np.ndarray,
    held_out_N: np.ndarray,
    characters_N: np.ndarray,
  ) -> Self:
    """Chooses what to keep of a chunk's N good records; see `plan.Plan`."""
    texts = [
      record["text"][:length]
      for record, length in zip(
        chunk.records(), characters_N.tolist(), strict=True
      )
      if length
    ]
    kept = source_N >= 0
    return cls(chunk.number, texts, source_N[kept], held_out_N[kept])


def encode(job: Job) -> int:
  """Writes a chunk's tokens, then its documents; returns their bytes."""
  tokenizer = _worker.tokenizer
  tokens, length_N = tokenizer.encode_flat(job.texts)
  contents = [text.encode() for text in job.texts]
  documents = np.zeros(len(job.texts), DOCUMENT)
  documents["file"] = job.number
  documents["tokens"] = length_N
  documents["start"] = np.cumsum(documents["tokens"], dtype=np.uint64)
  documents["start"] -= documents["tokens"]
  documents["bytes"] = [len(content) for content in contents]
  documents["characters"] = [len(text) for text in job.texts]
  documents["source"] = job.source_N
  documents["held_out"] = job.held_out_N
  content = tokens.astype(token_dtype(tokenizer)).tobytes()
  storage.write_bytes(_worker.out / tokens_name(job.number), content)
  write_arrays(
    encoded_path(_worker.out, job.number),
    documents=documents,
    text=_digests([hashlib.sha256(content).digest() for content in contents]),
    sha256=hashlib.sha256(content).hexdigest(),
  )
  return int(documents["bytes"].sum(dtype=np.int64))


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads what `write_arrays` wrote.

  Raises:
    UserError: the file is damaged, for example by a failing machine. It is
      removed, so that the next start writes it again.
  """
  try:
    content = io.BytesIO(storage.read_bytes(path))
    with _PARSING, np.load(content, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    path.unlink(missing_ok=True)
    raise lost(path) from error


def lost(path: epath.Path) -> UserError:
  """Returns the error of a file that changed after it was written."""
  return UserError(f"{path}: damaged; the same command writes it again")


def token_dtype(tokenizer: Tokenizer) -> str:
  """Returns the smallest little-endian integer type that holds every id."""
  return "<u2" if tokenizer.vocabulary_size <= 2**16 else "<u4"
