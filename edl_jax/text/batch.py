"""Rows of packed tokens, and the batches that the model reads."""

import bisect
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edl_jax.text.token_stream import EncodedDocuments, TokenStream


class Batch(NamedTuple):
  """Rows of packed tokens. A row holds text of one domain, or of none.

  The arrays are NumPy's on the host, and `jax.Array`s sharded over rows on
  devices.
  """

  # Input tokens, int32 (B, T).
  tokens_BT: Any
  # The token that follows each input token, int32 (B, T).
  targets_BT: Any
  # Number of the document within the row, from 1; 0 is padding. int32 (B, T).
  segments_BT: Any
  # Position within that document's part of the row, from 0. int32 (B, T).
  positions_BT: Any
  # 1 where a token counts, 0 for padding. float32 (B, T).
  weights_BT: Any
  # Fine domain label of each row, in [0, D), or -1 for none. int32 (B,).
  domain_B: Any
  # 1 where the target counts in the LM loss, which supervised examples restrict
  # to completions; at most `weights_BT`, by which routing is averaged. float32
  # (B, T), or None where every counted token's target does.
  loss_weights_BT: Any = None

  @property
  def target_weights_BT(self) -> Any:
    """1 where the target counts in the LM loss, float32 (B, T)."""
    if self.loss_weights_BT is None:
      return self.weights_BT
    return self.loss_weights_BT


def stack(rows: Sequence[Batch]) -> Batch:
  """Stacks rows, whose arrays lack the axis B, into a batch."""
  return Batch(
    *(None if column[0] is None else np.array(column) for column in zip(*rows))
  )


def padding_row(length: int, supervised: bool = False) -> Batch:
  """Returns a row of T = `length` tokens, none of which counts.

  `supervised` says whether the rows beside it have loss weights.
  """
  return Batch(
    *(np.zeros(length, np.int32) for _ in range(4)),
    weights_BT=np.zeros(length, np.float32),
    domain_B=np.int32(0),
    loss_weights_BT=np.zeros(length, np.float32) if supervised else None,
  )


def padded_batches(rows: Sequence[Batch], size: int) -> list[Batch]:
  """Stacks rows into batches of `size` rows; padding fills the last one up."""
  padding = [
    padding_row(len(row.tokens_BT), row.loss_weights_BT is not None)
    for row in rows[:1]
  ]
  rows = [*rows, *padding * (-len(rows) % size)]
  return [
    stack(rows[start : start + size]) for start in range(0, len(rows), size)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """Random access to the rows of one domain's stream of tokens.

  Row r reads the tokens [rT, rT + T) and predicts [rT + 1, rT + T + 1). After a
  document's last token comes the start token of the next document. So the end
  of a document is predicted like any other token, and no position is lost.
  """

  # The documents, each after a start token, and a start token at the end. int32
  # (tokens,), or an object whose slices are such arrays.
  stream: np.ndarray | TokenStream
  sequence_length: int
  document_start_id: int
  # Fine label of every row, -1 for none.
  domain: int
  # Whether to keep an incomplete last row, filled up with padding.
  keep_partial: bool = False
  # Whether rows of other domains have loss weights.
  supervised: bool = False

  def __len__(self) -> int:
    predicted = len(self.stream) - 1
    if self.keep_partial:
      predicted += self.sequence_length - 1
    return predicted // self.sequence_length

  def __getitem__(self, row: int) -> Batch:
    """Returns one row: a Batch whose arrays lack the axis B."""
    length = self.sequence_length
    tokens = self.stream[row * length : (row + 1) * length + 1]
    inputs_T, targets_T = tokens[:-1], tokens[1:]
    index_T = np.arange(len(inputs_T), dtype=np.int32)
    starts_T = inputs_T == self.document_start_id
    # A row may begin within a document: that part is its first segment.
    starts_T[0] = True
    arrays = (
      inputs_T,
      targets_T,
      np.cumsum(starts_T, dtype=np.int32),
      index_T - np.maximum.accumulate(np.where(starts_T, index_T, 0)),
      np.ones(len(inputs_T), np.float32),
    )
    if missing := length - len(inputs_T):
      arrays = tuple(np.pad(array_T, (0, missing)) for array_T in arrays)
    return Batch(
      *arrays,
      domain_B=np.int32(self.domain),
      loss_weights_BT=arrays[-1] if self.supervised else None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleRows:
  """Random access to rows of whole supervised examples of one domain.

  An example reads a start token and its tokens but the last, and predicts its
  tokens, of which the loss counts those of completions. Padding fills up a row.
  """

  # None longer than a row.
  examples: EncodedDocuments
  sequence_length: int
  document_start_id: int
  # Fine label of every row, -1 for none.
  domain: int

  @functools.cached_property
  def _members(self) -> list[list[int]]:
    """The examples of each row."""
    return best_fit(self.examples.length_I.tolist(), self.sequence_length)

  def __len__(self) -> int:
    return len(self._members)

  def __getitem__(self, row: int) -> Batch:
    """Returns one row: a Batch whose arrays lack the axis B."""
    batch, first = padding_row(self.sequence_length, supervised=True), 0
    for segment, member in enumerate(self._members[row], start=1):
      tokens, counted = self.examples.read(member)
      last = first + len(tokens)
      batch.tokens_BT[first] = self.document_start_id
      batch.tokens_BT[first + 1 : last] = tokens[:-1]
      batch.targets_BT[first:last] = tokens
      batch.segments_BT[first:last] = segment
      batch.positions_BT[first:last] = np.arange(len(tokens))
      batch.weights_BT[first:last] = 1
      batch.loss_weights_BT[first:last] = counted
      first = last
    return batch._replace(domain_B=np.int32(self.domain))


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
  """Packs items into bins by best fit decreasing (Johnson et al., 1974).

  The largest item comes first, and goes into the fullest bin that has room for
  it; of equally full bins, into the one that has been so for longest.

  Args:
    sizes: of the items, at most `room` each.
    room: of a bin.

  Returns:
    The indices of the items of each bin, in order.
  """
  bins: list[list[int]] = []
  # Bins by the room that they have left, and the rooms that some bin has.
  by_room: dict[int, collections.deque[int]] = {}
  rooms: list[int] = []
  for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    place = bisect.bisect_left(rooms, sizes[item])
    if place < len(rooms):
      left = rooms[place]
      number = by_room[left].popleft()
      if not by_room[left]:
        del by_room[left], rooms[place]
    else:
      left, number = room, len(bins)
      bins.append([])
    bins[number].append(item)
    left -= sizes[item]
    if left not in by_room:
      by_room[left] = collections.deque()
      bisect.insort(rooms, left)
    by_room[left].append(number)
  return [sorted(members) for members in bins]
