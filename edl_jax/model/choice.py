"""Which experts a router may choose.

All may be restricted: to a part of the model, to the fixed experts of domains,
and to pools. Each is a mask of the router's logits: `masked` sets those of the
other experts to minus infinity, and softmax and top-k go on among the rest.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.config import ModelConfig
from edl_jax.losses.token_pairs import row_hashes
from edl_jax.text.batch import Batch


class Choice(NamedTuple):
  """The experts that routers may choose; None does not restrict them.

  The arrays have a leading L axis, for the mixture-of-experts layers, or
  belong to one layer.
  """

  # Experts that exist in a layer, bool (L, E), or for a row, bool (L, B, E): A
  # or more. Routing statistics see the softmax over these, as if the layer did
  # not have the others.
  kept_LE: jax.Array | None = None
  kept_LBE: jax.Array | None = None
  # Experts in the pool of each document of a row, int32 (L, B, I), by segment
  # number. Routing statistics see the softmax without the pool.
  pool_size_LBI: jax.Array | None = None


EVERY_EXPERT = Choice()

_BY_ROW = PartitionSpec(None, sharding.ROW_AXES)
# How the mesh spreads the arrays. Any: these are specs in place of arrays.
CHOICE_SPECS: Any = Choice(*cast(Any, (PartitionSpec(), _BY_ROW, _BY_ROW)))


def masked(logits_BTE: jax.Array, kept_BTE: jax.Array) -> jax.Array:
  """Returns the logits, minus infinity where `kept_BTE` is false."""
  return jnp.where(kept_BTE, logits_BTE, -jnp.inf)


def domain_experts(config: ModelConfig, num_domains: int) -> np.ndarray:
  """Returns the fixed experts of `model.router=domain`, bool (D, E).

  Domain d has the experts from floor(d E / D) to floor((d + 1) E / D) - 1, and
  further ones after these, around the end, until there are A of them. So with
  E >= A D each expert has exactly one domain, and with fewer experts
  neighbouring domains share some.

  A reference router from labels to experts is due to the MoE Routing Testbed;
  which experts a domain gets is our choice.
  """
  edges = np.arange(num_domains + 1) * config.num_experts // num_domains
  sizes_D1 = np.maximum(np.diff(edges), config.num_active_experts)[:, None]
  offset_DE = np.arange(config.num_experts) - edges[:-1, None]
  return offset_DE % config.num_experts < sizes_D1


def make_choice(
  config: ModelConfig,
  domain_B: jax.Array | None,
  num_domains: int,
  kept_LE: jax.Array | None = None,
  pool_size_LBI: jax.Array | None = None,
) -> Choice:
  """Returns the experts that rows may choose in every layer.

  Args:
    config: sizes, and the router.
    domain_B: fine domain label of each row; rows with -1 may use all experts.
      Only `model.router=domain` needs labels.
    num_domains: D.
    kept_LE, pool_size_LBI: see `Choice`.

  Raises:
    ValueError: `model.router=domain` has no labels, or comes with kept_LE.
  """
  if config.router != "domain":
    return Choice(kept_LE, None, pool_size_LBI)
  if domain_B is None:
    raise ValueError(
      "model.router='domain' chooses experts by the domain of a row: pass"
      " domain_B and num_domains"
    )
  if kept_LE is not None:
    raise ValueError(
      "model.router='domain' fixes the experts of each row: kept_LE cannot"
      " leave out some"
    )
  # The label -1 reads the last element.
  kept_DE = np.append(
    domain_experts(config, num_domains),
    np.ones((1, config.num_experts), bool),
    axis=0,
  )
  kept_BE = jnp.asarray(kept_DE)[domain_B]
  num_layers = config.num_layers - config.num_dense_layers
  kept_LBE = jnp.broadcast_to(kept_BE, (num_layers, *kept_BE.shape))
  return Choice(None, kept_LBE, pool_size_LBI)


def draw_pool_sizes(
  config: ModelConfig, batch: Batch, key: jax.Array
) -> jax.Array | None:
  """Draws the size of the pool of every document in every layer.

  Sizes are uniform in [pool_min, pool_max]. The order of rows depends on the
  number of processes, but sizes must not: a row draws by a hash of its counted
  tokens. Only equal rows draw the same sizes.

  Args:
    config: sizes of the model and of pools.
    batch: rows of the global batch, or some of them.
    key: of `jax.random`; another one for each step.

  Returns:
    The sizes by segment number, int32 (L, B, T + 1), None without pools.
  """
  if not config.pool_max:
    return None
  hash_key, key = jax.random.split(key)
  hash_B = row_hashes(batch.tokens_BT, batch.weights_BT, hash_key)
  num_layers = config.num_layers - config.num_dense_layers
  shape = (num_layers, batch.tokens_BT.shape[1] + 1)

  def of_row(row_hash: jax.Array) -> jax.Array:
    row_key = jax.random.fold_in(key, row_hash)
    return jax.random.randint(
      row_key, shape, config.pool_min, config.pool_max + 1
    )

  return jax.vmap(of_row, out_axes=1)(hash_B)


def document_pools(
  probs_BTE: jax.Array,
  weights_BT: jax.Array,
  segments_BT: jax.Array,
  size_BI: jax.Array,
) -> jax.Array:
  """Returns the experts in the pool of each token's document, bool (B, T, E).

  The m experts with the largest sums of probabilities over the counted tokens
  of the document are in the pool; of equal ones, those with lower indices.
  Where devices share rows, a document is the whole of it. There is no
  gradient. EMO, arXiv:2605.06663.

  Args:
    probs_BTE: the router's softmax.
    weights_BT: 1 where a token counts.
    segments_BT: int32 document of each token within the row, in [0, I).
    size_BI: m of each document, at least 1.
  """
  num_documents, num_experts = size_BI.shape[1], probs_BTE.shape[-1]
  counted_BTE = jax.lax.stop_gradient(probs_BTE) * weights_BT[..., None]
  sum_BIE = jax.vmap(
    lambda x_TE, segments_T: jax.ops.segment_sum(
      x_TE, segments_T, num_documents
    )
  )(counted_BTE, segments_BT)
  sum_BIE = sharding.sum_over(sum_BIE, ("sequence",))
  # top_k takes a matrix: see `MoE.route`.
  sorted_, order = jax.lax.top_k(sum_BIE.reshape(-1, num_experts), num_experts)
  smallest_BI1, last_BI1 = (
    jnp.take_along_axis(x.reshape(sum_BIE.shape), size_BI[..., None] - 1, -1)
    for x in (sorted_, order)
  )
  kept_BIE = sum_BIE > smallest_BI1
  kept_BIE |= (sum_BIE == smallest_BI1) & (jnp.arange(num_experts) <= last_BI1)
  return jnp.take_along_axis(kept_BIE, segments_BT[..., None], axis=1)
