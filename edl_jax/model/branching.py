"""The model on rows whose texts branch, behind a stem that all rows share.

Requests to score often begin alike: with the same examples, and then with the
same question before each of its answers. Here a row is a question and all its
answers, which do not see each other, and the examples are the stem: its keys
and values are computed once for all rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.losses.routing import Summaries
from edl_jax.model.cached import Cache
from edl_jax.model.choice import EVERY_EXPERT
from edl_jax.model.moe import GATHER
from edl_jax.model.transformer import Model, embed

# The mesh axes over which rows are spread. Rows are whole, so the devices along
# `sequence` take rows of their own as well.
ROW_AXES = (*sharding.ROW_AXES, "sequence")

# Every row reads the same stem.
STEM_SPEC = PartitionSpec(None, None, None, "tensor", None)
_CACHE_SPEC = PartitionSpec(None, ROW_AXES, None, "tensor", None)


class Routed(NamedTuple):
  """Routing of rows in each mixture-of-experts layer; float32, (L, B, E)."""

  # Sum over counted tokens of their router probabilities.
  probability_LBE: jax.Array
  # Counted tokens sent to each expert.
  assignments_LBE: jax.Array


def _routed(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT):
  del logits_BTE, gate_BTA
  weights_BT1 = weights_BT[..., None]
  experts_E = jnp.arange(probs_BTE.shape[-1])
  assigned_BTE = sum(
    expert_BTA[..., a, None] == experts_E for a in range(expert_BTA.shape[-1])
  )
  return Routed(
    (weights_BT1 * probs_BTE).sum(1), (weights_BT1 * assigned_BTE).sum(1)
  )


def _scan(
  x_BTM, blocks, positions_BT, branch_BT, counted_BT, stem, stem_length
):
  """Runs the layers of a kind.

  Returns:
    x_BTM; their keys and values; and `Routed`, None for dense layers.
  """
  ones_BT = jnp.ones(positions_BT.shape, jnp.int32)
  summaries = Summaries(routing=_routed)

  def layer(x_BTM, inputs):
    block, stem = inputs
    with jax.named_scope("attention"):
      y_BTM, own = block.attention.branching(
        *(block.attention_norm(x_BTM), positions_BT, branch_BT),
        *(stem.k_LBSKH[0], stem.v_LBSKH[0], stem_length),
      )
    x_BTM, results = block.feed_forward(
      x_BTM + y_BTM, ones_BT, counted_BT, summaries, GATHER, EVERY_EXPERT
    )
    return x_BTM, (own, results and results[0])

  x_BTM, (own, routed) = jax.lax.scan(layer, x_BTM, (blocks, stem))
  return x_BTM, own, routed


def _shard_branching(
  model, tokens_BT, positions_BT, branch_BT, counted_BT, stem, stem_length
):
  x_BTM = embed(
    model.embedding_VM[...], tokens_BT, jnp.dtype(model.config.dtype)
  )
  rest = (positions_BT, branch_BT, counted_BT)
  dense = stem.dense
  if dense is not None:
    x_BTM, dense, _ = _scan(
      x_BTM, model.dense_blocks, *rest, dense, stem_length
    )
  x_BTM, moe, routed = _scan(x_BTM, model.blocks, *rest, stem.moe, stem_length)
  return model.final_norm(x_BTM), Cache(dense, moe), routed


def branching(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  branch_BT: jax.Array,
  counted_BT: jax.Array,
  stem: Cache,
  stem_length: jax.Array,
) -> tuple[jax.Array, Cache, Routed]:
  """Runs rows of texts that branch.

  Rows are spread over `ROW_AXES`. There are no pools, and `model.router=domain`
  is not supported.

  Args:
    model: its parameters may be those of `in_compute_dtype`.
    tokens_BT: rows.
    positions_BT: int32 position of each token in its text, the stem included.
    branch_BT: int32; a token sees the stem, and of the earlier tokens in its
      row those of branch 0 and of its own branch. Padding has branches of its
      own.
    counted_BT: float32; 1 where the routing of a token counts.
    stem: keys and values of the tokens that begin every text, with one row;
      `empty_cache(config, 1, 0)` if there are none.
    stem_length: int32; the stem's slots from there on are not read.

  Returns:
    x_BTM behind the final norm; the tokens' own keys and values; and how the
    counted ones were routed.
  """
  by_row = PartitionSpec(ROW_AXES)
  # Any: specs in place of arrays.
  stem_specs: Any = jax.tree.map(lambda _: STEM_SPEC, stem)
  cache_specs: Any = jax.tree.map(lambda _: _CACHE_SPEC, stem)
  return sharding.per_shard(
    _shard_branching,
    (
      sharding.parameter_specs(model),
      *(by_row, by_row, by_row, by_row),
      stem_specs,
      PartitionSpec(),
    ),
    (by_row, cache_specs, PartitionSpec(None, ROW_AXES)),
  )(model, tokens_BT, positions_BT, branch_BT, counted_BT, stem, stem_length)
