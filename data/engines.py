"""Scans and encodes all chunks of a corpus; `data.prepare` does the rest."""

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import numpy as np
from etils import epath

from data import chunks
from data.plan import Plan
from data.runs import Text
from edl_jax import storage
from edl_jax.progress import BytesProgress


class Engine(Protocol):
  """Does the work on chunks; leaves out what an earlier start has done."""

  def scan(self) -> int:
    """Scans every chunk; returns their number."""
    ...

  def read_scan(self, number: int) -> Mapping[str, np.ndarray]:
    """Returns what `chunks.scan` wrote for a chunk."""
    ...

  def sample(self, plan: Plan, enough: int) -> list[str]:
    """Returns the training text from which `load_tokenizer` would learn."""
    ...

  def encode(self, plan: Plan) -> None:
    """Writes the tokens of every chunk."""
    ...


class LocalEngine:
  """A context manager: an engine of processes of this machine."""

  def __init__(self, text: Text, workers: int, out: str, *rest: Any):
    """Takes the corpus, the processes, and what `start_worker` takes."""
    self._text, self._out = text, epath.Path(out)
    self._workers = chunks.Workers(workers, chunks.start_worker, out, *rest)

  def __enter__(self) -> Self:
    self._workers.__enter__()
    return self

  def __exit__(self, *error: object) -> None:
    self._workers.__exit__(*error)

  def scan(self) -> int:
    """See `Engine`."""
    progress, count = BytesProgress("reading", self._text.stored()), 0
    done = storage.names(self._out / "work")
    # Bytes of the files that the chunks under way were read from.
    waiting: deque[int] = deque()

    def missing() -> Iterator[chunks.Chunk]:
      nonlocal count
      for chunk in self._text.all_chunks():
        count = chunk.number + 1
        if chunks.scan_path(self._out, chunk.number).name in done:
          progress.add(chunk.stored)
        else:
          waiting.append(chunk.stored)
          yield chunk

    for _ in self._workers.in_order(chunks.scan, missing()):
      progress.add(waiting.popleft())
    progress.close(erase=True)
    return count

  def read_scan(self, number: int) -> Mapping[str, np.ndarray]:
    """See `Engine`."""
    return chunks.read_arrays(chunks.scan_path(self._out, number))

  def sample(self, plan: Plan, enough: int) -> list[str]:
    """See `Engine`."""
    wanted = choose_sample(plan, enough)
    lengths = dict(wanted)
    texts = {}
    progress = BytesProgress("sampling", self._text.stored())
    for chunk in self._text.all_chunks():
      progress.add(chunk.stored)
      begin = int(plan.begin[chunk.number])
      for number, record in enumerate(chunk.records(), start=begin):
        if number in lengths:
          texts[number] = record["text"][: lengths[number]]
    progress.close(erase=True)
    return [texts[number] for number, _ in wanted]

  def encode(self, plan: Plan) -> None:
    """See `Engine`."""
    progress = BytesProgress("tokenizing", plan.num_bytes)
    done = storage.names(self._out / "work")

    def missing() -> Iterator[chunks.Job]:
      for chunk in self._text.all_chunks():
        if chunks.encoded_path(self._out, chunk.number).name not in done:
          yield chunks.Job.of_chunk(chunk, **plan.of_chunk(chunk.number))

    for size in self._workers.in_order(chunks.encode, missing()):
      progress.add(size)
    progress.close(erase=True)


def choose_sample(plan: Plan, enough: int) -> list[tuple[int, int]]:
  """Chooses training records, and how many characters to take of each.

  Args:
    plan: the records.
    enough: most characters in all.

  Returns:
    (number of the record, characters), by source, then in order of reading.
  """
  train = np.flatnonzero((plan.source_N >= 0) & ~plan.held_out_N)
  train = train[np.argsort(plan.source_N[train], kind="stable")].tolist()
  size, wanted = 0, {}
  for number in random.Random(0).sample(train, len(train)):
    if size >= enough:
      break
    wanted[number] = min(int(plan.characters_N[number]), enough - size)
    size += wanted[number]
  return [(number, wanted[number]) for number in train if number in wanted]
