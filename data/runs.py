"""Where the chunks of a corpus lie, so that several machines can read them.

A run is a part of the corpus that one worker reads from beginning to end: some
consecutive chunks. The chunks are those of `chunks.read_chunks`.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data.chunks import Chunk, cost, read_chunks
from edl_jax import storage
from edl_jax.text.readers import Found, read_records

# A run reads its first file from the beginning. More runs of one file would
# share its chunks among more workers, and read more of it in vain.
_RUNS_OF_A_FILE = 4
_FEWEST_CHUNKS = 8


class Run(NamedTuple):
  """Consecutive chunks, the first of which begins in `file`."""

  # Number of the first chunk.
  first: int
  # Index of the file, and how many of its records come before the chunk.
  file: int
  skipped: int
  # Number of records of each chunk, with bad ones.
  counts: tuple[int, ...]

  @property
  def chunks(self) -> range:
    """Numbers of the chunks."""
    return range(self.first, self.first + len(self.counts))


class Text(NamedTuple):
  """The files of a corpus, and how they are divided into chunks."""

  # Folder in which the glob starts.
  root: str
  paths: tuple[str, ...]
  # Columns to read besides those that every record may have.
  columns: tuple[str, ...]
  # Size of a chunk.
  characters: int

  def stored(self) -> int:
    """Returns the bytes of all files."""
    return sum(state.size for state in storage.states(self.paths))

  def records(self, file: int) -> Iterator[Found]:
    """Yields the records of a file, by its index."""
    return read_records(self.paths[file], self.root, self.columns)

  def all_chunks(self) -> Iterator[Chunk]:
    """Yields all chunks, in order."""
    return read_chunks(self.root, self.paths, self.characters, self.columns)

  def costs(self, file: int) -> np.ndarray:
    """Returns what each record of a file adds to its chunk, uint32 (N,)."""
    return np.fromiter((cost(f) for _, f in self.records(file)), np.uint32)

  def read_run(self, run: Run) -> Iterator[Chunk]:
    """Yields the chunks of a run, in order."""
    records = itertools.chain.from_iterable(
      map(self.records, range(run.file, len(self.paths)))
    )
    records = itertools.islice(records, run.skipped, None)
    for number, count in zip(run.chunks, run.counts):
      yield Chunk(number, list(itertools.islice(records, count)))


def divide(costs: Iterable[np.ndarray], characters: int) -> list[Run]:
  """Divides a corpus into runs.

  Args:
    costs: `Text.costs` of each file, in order.
    characters: size of a chunk.
  """
  chunks: list[list[tuple[int, int]]] = []
  skipped, count, size = 0, 0, 0
  file = -1
  for number, cost_N in enumerate(costs):
    chunks.append([])
    end_N = np.cumsum(cost_N, dtype=np.int64)
    place, done = 0, 0
    while place < len(end_N):
      if not count:
        file, skipped = number, place
      last = int(np.searchsorted(end_N, characters - size + done))
      stop = min(last + 1, len(end_N))
      count += stop - place
      place, full = stop, last < len(end_N)
      size = 0 if full else size + int(end_N[-1]) - done
      done = int(end_N[stop - 1])
      if full:
        chunks[file].append((skipped, count))
        count = 0
  if count:
    chunks[file].append((skipped, count))
  runs, first = [], 0
  for number, own in enumerate(chunks):
    length = max(_FEWEST_CHUNKS, -(-len(own) // _RUNS_OF_A_FILE))
    for begin in range(0, len(own), length):
      (skipped, _), *_ = part = own[begin : begin + length]
      runs.append(Run(first, number, skipped, tuple(n for _, n in part)))
      first += len(part)
  return runs
