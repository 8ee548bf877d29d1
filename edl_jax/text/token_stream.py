"""The tokens of many documents, in memory or mapped files, as one stream."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDocuments:
  """The tokens of I documents, each a slice of one of `arrays`."""

  # Tokens, of any integer type: one array, or the maps of several files.
  arrays: Sequence[np.ndarray]
  # The array of each document, its first token there, its number of tokens;
  # integers, (I,) each.
  array_I: np.ndarray
  start_I: np.ndarray
  length_I: np.ndarray
  # Of supervised examples: whether each token of `arrays` is a completion's,
  # bool, in arrays of the same shapes.
  counted: Sequence[np.ndarray] | None = None

  @classmethod
  def from_array(
    cls,
    tokens: np.ndarray,
    length_I: np.ndarray,
    counted: np.ndarray | None = None,
  ) -> "EncodedDocuments":
    """Wraps documents that lie end to end in one array."""
    length_I = np.asarray(length_I, np.int64)
    return cls(
      [tokens],
      np.zeros(len(length_I), np.int32),
      np.cumsum(length_I) - length_I,
      length_I,
      None if counted is None else [counted],
    )

  def __len__(self) -> int:
    return len(self.length_I)

  def __getitem__(self, part: slice | np.ndarray) -> "EncodedDocuments":
    """Selects documents by a slice, a mask or an array of indices."""
    return EncodedDocuments(
      self.arrays,
      self.array_I[part],
      self.start_I[part],
      self.length_I[part],
      self.counted,
    )

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a supervised example, and which are completions."""
    assert self.counted is not None, "documents of another kind"
    array, start = self.array_I[number], self.start_I[number]
    part = slice(start, start + self.length_I[number])
    return self.arrays[array][part], self.counted[array][part]

  @property
  def token_count(self) -> int:
    """Number of tokens, with one start token for each document."""
    return int(self.length_I.sum()) + len(self)


class TokenStream:
  """Documents end to end, each after a start token, then one more start token.

  A slice is an int32 array; only the tokens of the slice are read into memory.
  """

  def __init__(self, documents: EncodedDocuments, document_start_id: int):
    self._documents, self._start_id = documents, document_start_id
    # Position of each document's start token, and of the last start token.
    self._begin = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents.length_I + 1, out=self._begin[1:])

  def __len__(self) -> int:
    return int(self._begin[-1]) + 1

  def __getitem__(self, part: slice) -> np.ndarray:
    start, stop, _ = part.indices(len(self))
    tokens = np.full(max(stop - start, 0), self._start_id, np.int32)
    documents, begin = self._documents, self._begin
    number = int(np.searchsorted(begin, start, side="right")) - 1
    while number < len(documents) and begin[number] < stop:
      # The document's own tokens are [first, last) of the stream.
      first, last = begin[number] + 1, begin[number + 1]
      low, high = max(first, start), min(last, stop)
      if low < high:
        offset = documents.start_I[number] - first
        array = documents.arrays[documents.array_I[number]]
        tokens[low - start : high - start] = array[offset + low : offset + high]
      number += 1
    return tokens
