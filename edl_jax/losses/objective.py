"""Cross-entropy in chunks, the router's losses, and the fused objective.

L = L_LM + alpha L_LB + beta L_ED + zeta L_z, and in post-training + L_o and
L_v, every term a function of sums over the *global* batch, so that it is the
same number on any mesh and for any number of micro-batches.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from edl_jax import sharding
from edl_jax.config import LossesConfig, auto_target
from edl_jax.losses import routing
from edl_jax.losses.divergence import hierarchical_divergence_loss

# Elements, domains x domains x experts, of layers whose divergence is computed
# at once.
_LAYERS_ELEMENTS = 1 << 20


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
  chunk_elements: int = 1 << 22,
) -> tuple[jax.Array, jax.Array]:
  """Weighted cross-entropy of a linear head, without all logits at once.

  Logits exist for one chunk of tokens at a time. The gradient is formed in the
  forward pass, chunk by chunk, from the same logits: nothing is computed
  twice and only arrays of the size of `x_BTM` and `head_MV` are kept.

  Inside `sharding.per_shard` the arguments are a device's own: its rows, and
  its piece of the head, whose gradient sums over all rows already. So all
  devices' sums must be added up with the same weight, as they are in a total.

  Args:
    x_BTM: final activations; their dtype is the matmul's, sums are float32.
    head_MV: float32 master weights.
    targets_BT: int32 in [0, V).
    weights_BT: float32, 0 for padding; no gradient.
    chunk_elements: of the largest array of logits.

  Returns:
    The weighted sum in nats over these rows, a float32 scalar, and float32
    nats_BT (weighted) for reports, through which no gradient flows.
  """
  total, nats_BT = _cross_entropy(
    x_BTM, head_MV, targets_BT, weights_BT, chunk_elements
  )
  return total, jax.lax.stop_gradient(nats_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(x_BTM, head_MV, targets_BT, weights_BT, chunk_elements):
  nats_BT, _, _ = _in_chunks(
    x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, False
  )
  return nats_BT.sum(), nats_BT


def _cross_entropy_forward(
  x_BTM, head_MV, targets_BT, weights_BT, chunk_elements
):
  nats_BT, dx_BTM, dhead_MV = _in_chunks(
    x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, True
  )
  return (nats_BT.sum(), nats_BT), (dx_BTM, dhead_MV)


def _cross_entropy_backward(chunk_elements, residuals, cotangents):
  del chunk_elements
  dx_BTM, dhead_MV = residuals
  # Devices along `tensor` hold the same sum, and a part of its cotangent each.
  scale = sharding.sum_over(cotangents[0], ("tensor",))
  return (scale * dx_BTM).astype(dx_BTM.dtype), scale * dhead_MV, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _in_chunks(
  x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, with_gradient
):
  """Returns nats_BT, and dx_BTM and dhead_MV (None without gradient).

  Along `tensor` each device has the logits of its part of the vocabulary, and
  returns the part of dx_BTM that these make.
  """
  batch, length, width = x_BTM.shape
  head = sharding.gather("head_MV", head_MV.astype(x_BTM.dtype))
  vocabulary = head.shape[1]
  first = sharding.index_along("tensor") * vocabulary
  tokens = batch * length
  num_chunks = max(1, -(-tokens * vocabulary // chunk_elements))
  chunk = -(-tokens // num_chunks)

  def in_chunks(x):
    flat = x.reshape(tokens, *x.shape[2:])
    padding = [(0, num_chunks * chunk - tokens)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding).reshape(num_chunks, chunk, *flat.shape[1:])

  def body(dhead_MV, inputs):
    x_PM, target_P, weight_P = inputs
    logits_PV = jnp.dot(x_PM, head, preferred_element_type=jnp.float32)
    hit_PV = target_P[:, None] - first == jnp.arange(vocabulary)
    # Kept apart from the logits: log(p) = shifted - log(sum exp(shifted)).
    largest_P = sharding.max_over(logits_PV.max(-1), ("tensor",))
    shifted_PV = logits_PV - largest_P[:, None]
    exp_PV = jnp.exp(shifted_PV)
    sum_P, target_logit_P = sharding.sum_over(
      (exp_PV.sum(-1), jnp.where(hit_PV, shifted_PV, 0).sum(-1)), ("tensor",)
    )
    nats_P = (jnp.log(sum_P) - target_logit_P) * weight_P
    if not with_gradient:
      return dhead_MV, (nats_P, None)
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
    # Scattered here, so that no device keeps the whole until the backward pass.
    dhead_MV = sharding.scatter("head_MV", dhead_MV.astype(x_BTM.dtype))
    dhead_MV = dhead_MV.astype(jnp.float32)
  return nats_BT, dx, dhead_MV


def load_balance_loss(
  stats: routing.RoutingStats, scope: str = "global"
) -> jax.Array:
  """L_LB = E sum_e f_e P_e, (L,); 1 at perfect balance.

  `f_e` is the share of routed assignments that went to expert e, without
  gradient, and `P_e` the mean probability. Fedus et al., arXiv:2101.03961; over
  the global batch: Qiu et al., arXiv:2501.11873.

  Args:
    stats: of the global batch.
    scope: what is balanced: the "global" batch, or each "sequence" by itself,
      the mean over sequences. The latter also balances every domain, which
      suppresses specialisation: it is here for comparison.

  Raises:
    ValueError: `scope` is neither.
  """
  if scope == "sequence":
    return stats.sequence_balance_L / jnp.maximum(stats.sequences_L, 1)
  if scope != "global":
    raise ValueError(f"scope={scope!r}: must be 'global' or 'sequence'")
  assignments_LE = jax.lax.stop_gradient(stats.assignments_LE)
  routed_L1 = assignments_LE.sum(-1, keepdims=True)
  f_LE = assignments_LE / jnp.maximum(routed_L1, 1)
  p_LE = stats.token_probability_LE / jnp.maximum(stats.tokens_L, 1)[:, None]
  return f_LE.shape[-1] * (f_LE * p_LE).sum(-1)


def router_z_loss(stats: routing.RoutingStats) -> jax.Array:
  """L_z = mean over tokens of logsumexp(router logits)^2, (L,).

  Zoph et al., arXiv:2202.08906.
  """
  return stats.squared_logsumexp_L / jnp.maximum(stats.tokens_L, 1)


def divergence_loss(
  stats: routing.RoutingStats,
  config: LossesConfig,
  parent_D: tuple[int, ...] = (),
  coarse_weight: float = 0.0,
  max_present: int | None = None,
) -> jax.Array:
  """L_ED of every layer, (L,); see `divergence.hierarchical_divergence_loss`.

  Args:
    stats: of the global batch, by fine domain. Rows without a domain are in
      none of its sums by domain, and so have no influence at all.
    config: which divergence, and its epsilon.
    parent_D: coarse label of each fine domain, where `coarse_weight` > 0.
    coarse_weight: share of the coarse level, in [0, 1].
    max_present: rows of the global batch, in which no more domains can be.
  """
  p_LDE, _ = routing.domain_probabilities(stats)
  loss = functools.partial(
    hierarchical_divergence_loss,
    parent_D=parent_D,
    coarse_weight=coarse_weight,
    eps=config.divergence_epsilon,
    divergence=config.divergence,
    max_present=max_present,
  )
  num_layers, num_domains, num_experts = p_LDE.shape
  # Layers side by side as long as they are small together.
  compared = min(num_domains, max_present or num_domains)
  pairs = compared * compared * num_experts
  return jax.lax.map(
    lambda layer: loss(*layer),
    (p_LDE, stats.sequences_LD),
    batch_size=min(num_layers, max(1, _LAYERS_ELEMENTS // pairs)),
  )


def orthogonality_loss(stats: routing.RoutingStats) -> jax.Array:
  """L_o: active experts of a token return orthogonal outputs, (L,).

  Mean over tokens of `OutputStats.projection`, whose form is chosen where
  outputs are summed (`routing.output_stats`). 0 with one active expert. Guo et
  al., arXiv:2505.22323.
  """
  return stats.outputs.projection / jnp.maximum(stats.tokens_L, 1)


def variance_loss(
  stats: routing.RoutingStats, form: str = "paper"
) -> jax.Array:
  """L_v: routing weights vary, (L,); negative or 0. Guo et al., 2505.22323.

  Args:
    stats: of the global batch.
    form: "paper": minus the variance over tokens of each expert's routing
      weight after top-k, mean over experts. "released": minus the unbiased
      variance over experts of a token's probabilities before top-k, mean over
      tokens, as the authors' code has it.

  Raises:
    ValueError: `form` is neither.
  """
  if form not in ("paper", "released"):
    raise ValueError(f"form={form!r}: must be 'paper' or 'released'")
  tokens_L = jnp.maximum(stats.tokens_L, 1)
  num_experts = stats.gate_LE.shape[-1]
  if num_experts == 1:
    return jnp.zeros_like(tokens_L)
  if form == "paper":
    mean_LE = stats.gate_LE / tokens_L[:, None]
    mean_square_LE = stats.squared_gate_LE / tokens_L[:, None]
    return -(mean_square_LE - jnp.square(mean_LE)).mean(-1)
  # A token's probabilities sum to 1.
  deviation_L = (
    stats.squared_probability_L - stats.tokens_L / num_experts
  ) / tokens_L
  return -deviation_L / (num_experts - 1)


def auto_weights(config: LossesConfig) -> dict[str, jax.Array]:
  """Returns the weights that the first batch will set, all 0 until then."""
  return {
    key: jnp.float32(0)
    for key in ("orthogonality_weight", "variance_weight")
    if auto_target(getattr(config, key)) is not None
  }


def _found_weight(loss: jax.Array, target: float, kept: jax.Array) -> jax.Array:
  """Returns `kept` if it is set, else 10^round(log10(target / |loss|))."""
  size = jnp.abs(jax.lax.stop_gradient(loss))
  exponent = jnp.round(jnp.log10(target / jnp.where(size > 0, size, 1)))
  return jnp.where(kept > 0, kept, jnp.where(size > 0, 10.0**exponent, 0))


def objective(
  sums: BatchSums,
  config: LossesConfig,
  parent_D: tuple[int, ...] = (),
  coarse_weight: float = 0.0,
  kept_weights: Mapping[str, jax.Array] | None = None,
  max_present: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The training objective, L = L_LM + alpha L_LB + beta L_ED + zeta L_z.

  In post-training also + orthogonality_weight L_o + variance_weight L_v.

  Args:
    sums: of the global batch.
    config: weights and forms.
    parent_D, coarse_weight, max_present: see `divergence_loss`.
    kept_weights: weights "auto:TARGET" as the first batch set them, from
      `auto_weights` before it.

  Returns:
    The loss in nats per token, and its terms, unweighted: `loss`, `lm_loss`,
    `balance_loss`, `divergence_loss`, `z_loss`, `variance_loss` and, where
    outputs were summed, `orthogonality_loss`, each a float32 scalar; and the
    automatic weights in use under the keys of `kept_weights`. Router terms are
    means over layers.
  """
  stats = sums.routing
  terms = {
    "lm_loss": sums.nats / jnp.maximum(sums.tokens, 1),
    "balance_loss": load_balance_loss(stats, config.balance_scope).mean(),
    "divergence_loss": divergence_loss(
      stats, config, parent_D, coarse_weight, max_present
    ).mean(),
    "z_loss": router_z_loss(stats).mean(),
    "variance_loss": variance_loss(stats, config.specialization_form).mean(),
  }
  if stats.outputs is not None:
    terms["orthogonality_loss"] = orthogonality_loss(stats).mean()
  loss, found = terms["lm_loss"], {}
  for name in ("balance", "divergence", "z", "orthogonality", "variance"):
    weight = getattr(config, f"{name}_weight")
    # A weight of 0 leaves the term out of the gradient's program altogether.
    if not weight:
      continue
    term, target = terms[f"{name}_loss"], auto_target(weight)
    if target is not None:
      kept = (kept_weights or auto_weights(config))[f"{name}_weight"]
      weight = found[f"{name}_weight"] = _found_weight(term, target, kept)
    loss += weight * term
  return loss, {"loss": loss, **terms, **found}
