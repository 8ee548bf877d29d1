"""Cross-entropy in chunks, the router's losses, and the fused objective.

L = L_LM + alpha L_LB + beta L_ED + zeta L_z, every term a function of sums
over the *global* batch, so that it is the same number on any mesh and for any
number of micro-batches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from edl_jax import routing, sharding
from edl_jax.config import LossesConfig
from edl_jax.divergence import expert_divergence_loss

# Elements of the largest logits array held at a time, per device.
_CHUNK_ELEMENTS = 1 << 22


class BatchSums(NamedTuple):
  """All that the objective needs of a batch; adds leaf by leaf."""

  # Summed cross-entropy of counted tokens, nats, scalar.
  nats: jax.Array
  # Counted tokens, scalar.
  tokens: jax.Array
  routing: routing.RoutingStats


def chunked_cross_entropy(
  x_BTM: jax.Array,
  head_MV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Weighted cross-entropy of a linear head, without all logits at once.

  Logits exist for one chunk of tokens at a time. The gradient is formed in the
  forward pass, chunk by chunk, from the same logits: nothing is computed
  twice and only arrays of the size of `x_BTM` and `head_MV` are kept.

  Args:
    x_BTM: final activations; their dtype is the matmul's, sums are float32.
    head_MV: float32 master weights.
    targets_BT: int32 in [0, V).
    weights_BT: float32, 0 for padding; no gradient.

  Returns:
    The weighted sum in nats, a float32 scalar, and float32 nats_BT (weighted)
    for reports, through which no gradient flows.
  """
  total, nats_BT = _cross_entropy(x_BTM, head_MV, targets_BT, weights_BT)
  return total, jax.lax.stop_gradient(nats_BT)


@jax.custom_vjp
def _cross_entropy(x_BTM, head_MV, targets_BT, weights_BT):
  total, nats_BT, _, _ = _over_shards(
    x_BTM, head_MV, targets_BT, weights_BT, with_gradient=False
  )
  return total, nats_BT


def _cross_entropy_forward(x_BTM, head_MV, targets_BT, weights_BT):
  total, nats_BT, dx_BTM, dhead_MV = _over_shards(
    x_BTM, head_MV, targets_BT, weights_BT, with_gradient=True
  )
  return (total, nats_BT), (dx_BTM, dhead_MV)


def _cross_entropy_backward(residuals, cotangents):
  dx_BTM, dhead_MV = residuals
  scale = cotangents[0]
  return (scale * dx_BTM).astype(dx_BTM.dtype), scale * dhead_MV, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _over_shards(x_BTM, head_MV, targets_BT, weights_BT, *, with_gradient):
  """Runs `_local_cross_entropy` on each device's rows and sums."""
  rows, whole = PartitionSpec(sharding.ROW_AXES), PartitionSpec()

  def local(x_BTM, head_MV, targets_BT, weights_BT):
    total, nats_BT, dx_BTM, dhead_MV = _local_cross_entropy(
      x_BTM, head_MV, targets_BT, weights_BT, with_gradient
    )
    total, dhead_MV = sharding.sum_over((total, dhead_MV), sharding.ROW_AXES)
    return total, nats_BT, dx_BTM, dhead_MV

  return sharding.per_shard(
    local,
    (rows, whole, rows, rows),
    (whole, rows, rows, whole),
  )(x_BTM, head_MV, targets_BT, weights_BT)


def _local_cross_entropy(x_BTM, head_MV, targets_BT, weights_BT, with_gradient):
  """Returns total, nats_BT, and dx_BTM, dhead_MV (None without gradient)."""
  batch, length, width = x_BTM.shape
  vocabulary = head_MV.shape[1]
  tokens = batch * length
  num_chunks = max(1, -(-tokens * vocabulary // _CHUNK_ELEMENTS))
  chunk = -(-tokens // num_chunks)
  head = head_MV.astype(x_BTM.dtype)

  def in_chunks(x):
    flat = x.reshape(tokens, *x.shape[2:])
    padding = [(0, num_chunks * chunk - tokens)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding).reshape(num_chunks, chunk, *flat.shape[1:])

  def body(dhead_MV, inputs):
    x_PM, target_P, weight_P = inputs
    logits_PV = jnp.dot(x_PM, head, preferred_element_type=jnp.float32)
    # Kept apart from the logits: log(p) = shifted - log(sum exp(shifted)).
    shifted_PV = logits_PV - logits_PV.max(-1, keepdims=True)
    exp_PV = jnp.exp(shifted_PV)
    sum_P = exp_PV.sum(-1)
    target_logit_P = jnp.take_along_axis(shifted_PV, target_P[:, None], 1)[:, 0]
    nats_P = (jnp.log(sum_P) - target_logit_P) * weight_P
    if not with_gradient:
      return dhead_MV, (nats_P, None)
    hit_PV = target_P[:, None] == jnp.arange(vocabulary)
    dlogits_PV = exp_PV * (weight_P / sum_P)[:, None]
    dlogits_PV = jnp.where(hit_PV, dlogits_PV - weight_P[:, None], dlogits_PV)
    dlogits_PV = dlogits_PV.astype(x_PM.dtype)
    dx_PM = jnp.dot(dlogits_PV, head.T)
    dhead_MV += jnp.dot(x_PM.T, dlogits_PV, preferred_element_type=jnp.float32)
    return dhead_MV, (nats_P, dx_PM)

  dhead_MV = (
    jnp.zeros((width, vocabulary), jnp.float32) if with_gradient else None
  )
  dhead_MV, (nats, dx) = jax.lax.scan(
    body,
    dhead_MV,
    (in_chunks(x_BTM), in_chunks(targets_BT), in_chunks(weights_BT)),
  )
  nats_BT = nats.reshape(-1)[:tokens].reshape(batch, length)
  if with_gradient:
    dx = dx.reshape(-1, width)[:tokens].reshape(x_BTM.shape)
  return nats.sum(), nats_BT, dx, dhead_MV


def load_balance_loss(stats: routing.RoutingStats) -> jax.Array:
  """L_LB = E sum_e f_e P_e over the global batch, (L,).

  `f_e` is the share of routed assignments that went to expert e, without
  gradient, and `P_e` the mean probability; 1 at perfect balance. Fedus et al.,
  arXiv:2101.03961; over the global batch: Qiu et al., arXiv:2501.11873.
  """
  assignments_LE = jax.lax.stop_gradient(stats.assignments_LDE.sum(1))
  routed_L1 = assignments_LE.sum(-1, keepdims=True)
  f_LE = assignments_LE / jnp.maximum(routed_L1, 1)
  p_LE = stats.token_probability_LE / jnp.maximum(stats.tokens_L, 1)[:, None]
  return f_LE.shape[-1] * (f_LE * p_LE).sum(-1)


def router_z_loss(stats: routing.RoutingStats) -> jax.Array:
  """L_z = mean over tokens of logsumexp(router logits)^2, (L,).

  Zoph et al., arXiv:2202.08906.
  """
  return stats.squared_logsumexp_L / jnp.maximum(stats.tokens_L, 1)


def divergence_loss(stats: routing.RoutingStats, eps: float) -> jax.Array:
  """L_ED of every layer, (L,); see `expert_divergence_loss`."""
  p_LDE, present_LD = routing.domain_probabilities(stats)
  loss = functools.partial(expert_divergence_loss, eps=eps)
  return jax.lax.map(lambda layer: loss(*layer), (p_LDE, present_LD))


def objective(
  sums: BatchSums,
  config: LossesConfig,
  parent_D: tuple[int, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The training objective, L = L_LM + alpha L_LB + beta L_ED + zeta L_z.

  Args:
    sums: of the global batch.
    config: the weights alpha, beta and zeta.
    parent_D: if given, L_ED compares these coarse parents of the domains.

  Returns:
    The loss in nats per token, and its terms, unweighted: `loss`, `lm_loss`,
    `balance_loss`, `divergence_loss`, `z_loss`, each a float32 scalar. Router
    terms are means over layers.
  """
  stats = sums.routing
  compared = (
    stats if parent_D is None else routing.merge_domains(stats, parent_D)
  )
  terms = {
    "lm_loss": sums.nats / jnp.maximum(sums.tokens, 1),
    "balance_loss": load_balance_loss(stats).mean(),
    "divergence_loss": divergence_loss(
      compared, config.divergence_epsilon
    ).mean(),
    "z_loss": router_z_loss(stats).mean(),
  }
  loss = terms["lm_loss"]
  for name, weight in (
    ("balance_loss", config.balance_weight),
    ("divergence_loss", config.divergence_weight),
    ("z_loss", config.z_weight),
  ):
    # A weight of 0 leaves the term out of the gradient's program altogether.
    if weight:
      loss += weight * terms[name]
  return loss, {"loss": loss, **terms}
