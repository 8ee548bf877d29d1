"""Rows of packed tokens, and the batches that the model reads."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edl_jax.text.token_stream import TokenStream


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


def stack(rows: Sequence[Batch]) -> Batch:
  """Stacks rows, whose arrays lack the axis B, into a batch."""
  return Batch(*map(np.array, zip(*rows)))


def padding_row(length: int) -> Batch:
  """Returns a row of T = `length` tokens, none of which counts."""
  return Batch(
    *(np.zeros(length, np.int32) for _ in range(4)),
    weights_BT=np.zeros(length, np.float32),
    domain_B=np.int32(0),
  )


def padded_batches(rows: Sequence[Batch], size: int) -> list[Batch]:
  """Stacks rows into batches of `size` rows; padding fills the last one up."""
  padding = [padding_row(len(row.tokens_BT)) for row in rows[:1]]
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
      arrays = (np.pad(array_T, (0, missing)) for array_T in arrays)
    return Batch(*arrays, domain_B=np.int32(self.domain))
