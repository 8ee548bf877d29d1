"""The model on rows whose texts branch, behind a stem that all rows share.

Requests to score often begin alike: with the same examples, and then with the
same question before each of its answers. Here a row is a question and all its
answers, which do not see each other, and the examples are the stem: its keys
and values are computed once for all rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.losses.routing import Summaries
from edl_jax.model.cached import CACHE_SPEC, Cache
from edl_jax.model.choice import EVERY_EXPERT
from edl_jax.model.moe import GATHER
from edl_jax.model.transformer import Model, embed

# Every row reads the same stem.
_STEM_SPEC = PartitionSpec(None, None, None, "tensor", None)


def _scan(x_BTM, blocks, positions_BT, branch_BT, stem, stem_length):
  """Runs the layers of a kind; returns x_BTM and their keys and values."""
  ones_BT = jnp.ones(positions_BT.shape, jnp.int32)
  summaries = Summaries(routing=lambda *_: None)

  def layer(x_BTM, inputs):
    block, stem = inputs
    with jax.named_scope("attention"):
      y_BTM, own = block.attention.branching(
        *(block.attention_norm(x_BTM), positions_BT, branch_BT),
        *(stem.k_LBSKH[0], stem.v_LBSKH[0], stem_length),
      )
    x_BTM, _ = block.feed_forward(
      x_BTM + y_BTM, ones_BT, ones_BT, summaries, GATHER, EVERY_EXPERT
    )
    return x_BTM, own

  return jax.lax.scan(layer, x_BTM, (blocks, stem))


def _shard_branching(
  model, tokens_BT, positions_BT, branch_BT, stem, stem_length
):
  x_BTM = embed(
    model.embedding_VM[...], tokens_BT, jnp.dtype(model.config.dtype)
  )
  rest = (positions_BT, branch_BT)
  dense = stem.dense
  if dense is not None:
    x_BTM, dense = _scan(x_BTM, model.dense_blocks, *rest, dense, stem_length)
  x_BTM, moe = _scan(x_BTM, model.blocks, *rest, stem.moe, stem_length)
  return model.final_norm(x_BTM), Cache(dense, moe)


def branching(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  branch_BT: jax.Array,
  stem: Cache,
  stem_length: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs rows of texts that branch.

  Devices along `sequence` all compute the same. There are no pools, and
  `model.router=domain` is not supported.

  Args:
    model: its parameters may be those of `in_compute_dtype`.
    tokens_BT: rows.
    positions_BT: int32 position of each token in its text, the stem included.
    branch_BT: int32; a token sees the stem, and of the earlier tokens in its
      row those of branch 0 and of its own branch. Padding has branches of its
      own.
    stem: keys and values of the tokens that begin every text, with one row;
      `empty_cache(config, 1, 0)` if there are none.
    stem_length: int32; the stem's slots from there on are not read.

  Returns:
    x_BTM behind the final norm, and the tokens' own keys and values.
  """
  by_row = PartitionSpec(sharding.ROW_AXES)
  # Any: specs in place of arrays.
  stem_specs: Any = jax.tree.map(lambda _: _STEM_SPEC, stem)
  cache_specs: Any = jax.tree.map(lambda _: CACHE_SPEC, stem)
  return sharding.per_shard(
    _shard_branching,
    (
      sharding.parameter_specs(model),
      *(by_row, by_row, by_row),
      stem_specs,
      PartitionSpec(),
    ),
    (by_row, cache_specs),
  )(model, tokens_BT, positions_BT, branch_BT, stem, stem_length)
