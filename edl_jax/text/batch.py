"""The arrays of one batch, shared by the input pipeline and the model."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
  """Rows of packed tokens; every row belongs to one domain, or to none.

  Arrays are NumPy on the host and `jax.Array`, sharded over rows, on devices.
  """

  # Input tokens, int32 (B, T).
  tokens_BT: Any
  # The token that follows each input token, int32 (B, T).
  targets_BT: Any
  # Document number within the row, from 1; 0 marks padding. int32 (B, T).
  segments_BT: Any
  # Position within the document's part of the row, from 0. int32 (B, T).
  positions_BT: Any
  # 1 where a token counts, 0 for padding. float32 (B, T).
  weights_BT: Any
  # Fine domain label of each row, in [0, D), or -1 for none. int32 (B,).
  domain_B: Any
