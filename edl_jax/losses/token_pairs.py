"""Pairs of tokens of the global batch, for the divergence loss of pairs.

`sample` draws the pairs before the model runs, from a key and the contents of
the batch alone. Every device then returns the router probabilities of the
sampled tokens that it holds, and zeros for all others, so that a sum over
devices completes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from edl_jax import sharding
from edl_jax.losses import divergence


class TokenPairs(NamedTuple):
  """Both tokens of every sampled pair."""

  # Row and position of each token in the global batch, int32.
  row_I2: jax.Array
  position_I2: jax.Array
  # Domain label of each token, int32.
  domain_I2: jax.Array
  # False for every pair if the batch has fewer than two counted tokens.
  counted_I: jax.Array


def sample(
  tokens_BT: jax.Array,
  weights_BT: jax.Array,
  domain_B: jax.Array,
  key: jax.Array,
  num_pairs: int,
) -> TokenPairs:
  """Draws pairs of two different counted tokens, uniformly with replacement.

  The order of rows depends on the number of processes, but the pairs must not.
  They are therefore drawn from rows in the order of a random hash of their
  counted tokens. Only rows with equal hashes keep their order.

  Args:
    tokens_BT, weights_BT: tokens of the global batch, and 1 where one counts.
    domain_B: domain label of each row; rows without a domain, -1, do not count.
    key: of `jax.random`.
    num_pairs: I.
  """
  hash_key, key = jax.random.split(key)
  order_B = jnp.argsort(row_hashes(tokens_BT, weights_BT, hash_key))
  in_domain_BT = (weights_BT > 0) & (domain_B >= 0)[:, None]
  index_I2, counted_I = divergence.sample_token_pairs(
    in_domain_BT[order_B].reshape(-1), key, num_pairs
  )
  row_I2, position_I2 = jnp.divmod(index_I2, tokens_BT.shape[1])
  row_I2 = order_B[row_I2]
  return TokenPairs(row_I2, position_I2, domain_B[row_I2], counted_I)


def row_hashes(
  tokens_BT: jax.Array, weights_BT: jax.Array, key: jax.Array
) -> jax.Array:
  """Returns a random hash of the counted tokens of every row, uint32 (B,).

  It identifies a row of the global batch in any order of rows.
  """
  factor_T = jax.random.bits(key, tokens_BT.shape[1:], jnp.uint32)
  term_BT = jnp.where(weights_BT > 0, tokens_BT + 1, 0).astype(jnp.uint32)
  return (term_BT * factor_T).sum(1, dtype=jnp.uint32)


def local_probabilities(probs_BTE: jax.Array, pairs: TokenPairs) -> jax.Array:
  """Returns probs_I2E of the sampled tokens on this device, 0 for all others.

  Args:
    probs_BTE: router probabilities of this device's rows and positions, inside
      `sharding.per_shard`.
    pairs: of the global batch.
  """
  rows, length, _ = probs_BTE.shape
  row_I2 = pairs.row_I2 - rows * _shard_index(sharding.ROW_AXES)
  position_I2 = pairs.position_I2 - length * _shard_index(("sequence",))
  here_I2 = (row_I2 >= 0) & (row_I2 < rows)
  here_I2 &= (position_I2 >= 0) & (position_I2 < length)
  # A row beyond the end reads the fill value; a negative one would wrap around.
  return probs_BTE.at[jnp.where(here_I2, row_I2, rows), position_I2].get(
    mode="fill", fill_value=0
  )


def _shard_index(axes: tuple[str, ...]) -> jax.Array | int:
  """Returns the index of this device's shard of an axis spread over `axes`."""
  axes = sharding.spread_axes(axes)
  return jax.lax.axis_index(axes) if axes else 0
