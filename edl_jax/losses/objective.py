"""Cross-entropy in chunks, the router's losses, and the fused objective.

L = L_LM + alpha L_LB + beta L_ED + zeta L_z, and in post-training + L_o and
L_v, every term a function of sums over the *global* batch, so that it is the
same number on any mesh and for any number of micro-batches.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from edl_jax.config import LossesConfig, auto_target
from edl_jax.losses import routing
from edl_jax.losses.divergence import hierarchical_divergence_loss
from edl_jax.losses.routing import BatchSums

# Elements, domains x domains x experts, of layers whose divergence is computed
# at once.
_LAYERS_ELEMENTS = 1 << 20


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
