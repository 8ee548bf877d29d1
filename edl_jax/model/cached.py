"""The model over a cache of keys and values, token after token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.config import ModelConfig
from edl_jax.losses.routing import Summaries
from edl_jax.model.attention import KVCache
from edl_jax.model.choice import CHOICE_SPECS, EVERY_EXPERT, Choice
from edl_jax.model.moe import GATHER
from edl_jax.model.transformer import Model, embed


class Cache(NamedTuple):
  """The keys and values of every layer; its arrays are (L, B, S, K, H)."""

  # Those of dense layers; None without such layers.
  dense: KVCache | None
  moe: KVCache


# How the mesh spreads a cache's arrays.
CACHE_SPEC = PartitionSpec(None, sharding.ROW_AXES, None, "tensor", None)


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
  """Returns a cache of zeros for documents of up to `slots` tokens.

  Its dtype is that of the model's activations.
  """

  def zeros(layers: int) -> KVCache:
    shape = (layers, rows, slots, config.num_kv_heads, config.head_width)
    return KVCache(*(jnp.zeros(shape, config.dtype) for _ in range(2)))

  dense = config.num_dense_layers
  return Cache(
    zeros(dense) if dense else None, zeros(config.num_layers - dense)
  )


@jax.jit
def in_compute_dtype(model: Model) -> Model:
  """Returns the model with each parameter in the dtype that products read.

  It computes the same, and reads half of the bytes if that is bfloat16.
  """

  def cast(path, leaf):
    rule = sharding.parameter_rule(path, leaf)
    return leaf if rule.is_float32 else leaf.astype(model.config.dtype)

  return jax.tree_util.tree_map_with_path(cast, model)


def _active(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT):
  del logits_BTE, probs_BTE, gate_BTA, weights_BT
  return expert_BTA


def _scan(x_BTM, cache, blocks, choice, positions_BT):
  """Runs the layers of a kind, and updates the cache in place.

  Returns:
    x_BTM and the cache; and expert_LBTA, None for dense layers.
  """
  ones_BT = jnp.ones(positions_BT.shape, jnp.int32)
  is_moe, is_step = hasattr(blocks, "moe"), positions_BT.shape[1] == 1

  def layer(carry, inputs):
    x_BTM, cache = carry
    block, choice, index = inputs
    with jax.named_scope("attention"):
      y_BTM, cache = block.attention.cached(
        block.attention_norm(x_BTM), positions_BT, cache, index
      )
      x_BTM += y_BTM
    if is_moe and is_step:
      y_BTM, expert_BTA = block.moe.few(
        block.feed_forward_norm(x_BTM),
        choice,
        (blocks.moe.gate_up_EM2F[...], blocks.moe.down_EFM[...]),
        index,
      )
      return (x_BTM + y_BTM, cache), expert_BTA
    x_BTM, results = block.feed_forward(
      x_BTM, ones_BT, ones_BT, Summaries(routing=_active), GATHER, choice
    )
    return (x_BTM, cache), results[0] if is_moe else None

  layers = jnp.arange(len(cache.k_LBSKH))
  return jax.lax.scan(layer, (x_BTM, cache), (blocks, choice, layers))


def _shard_advance(model, tokens_BT, positions_BT, last_B, cache, choice):
  x_BTM = embed(
    model.embedding_VM[...], tokens_BT, jnp.dtype(model.config.dtype)
  )

  dense = cache.dense
  if dense is not None:
    (x_BTM, dense), _ = _scan(
      x_BTM, dense, model.dense_blocks, EVERY_EXPERT, positions_BT
    )
  (x_BTM, moe), expert_LBTA = _scan(
    x_BTM, cache.moe, model.blocks, choice, positions_BT
  )
  x_BM = jnp.take_along_axis(x_BTM, last_B[:, None, None], axis=1)[:, 0]
  return model.final_norm(x_BM), Cache(dense, moe), expert_LBTA


def advance(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  last_B: jax.Array,
  cache: Cache,
  choice: Choice = EVERY_EXPERT,
) -> tuple[jax.Array, Cache, jax.Array]:
  """Runs further tokens of documents, and adds them to the cache.

  Args:
    model: its parameters may be those of `in_compute_dtype`.
    tokens_BT: the next token of each row, T = 1; or the first T > 1 tokens of
      all rows. Rows that have fewer end in any tokens, which later ones
      overwrite in the cache.
    positions_BT: int32 position of each token in its document.
    last_B: index along T of each row's last token.
    cache: from `empty_cache`, or the last call.
    choice: the experts that routers may choose, from `make_choice`.

  Returns:
    logits_BV behind the last token of each row, float32; the cache; and
    expert_LBTA, int32, the active experts in mixture-of-experts layers as
    `MoE.route` orders them.
  """
  by_row = PartitionSpec(sharding.ROW_AXES)
  # Any: specs in place of arrays.
  cache_specs: Any = jax.tree.map(lambda _: CACHE_SPEC, cache)
  x_BM, cache, expert_LBTA = sharding.per_shard(
    _shard_advance,
    (
      sharding.parameter_specs(model),
      by_row,
      by_row,
      by_row,
      cache_specs,
      CHOICE_SPECS,
    ),
    (by_row, cache_specs, PartitionSpec(None, sharding.ROW_AXES)),
  )(model, tokens_BT, positions_BT, last_B, cache, choice)
  with jax.named_scope("head"):
    logits_BV = model.logits(x_BM)
  return logits_BV, cache, expert_LBTA
