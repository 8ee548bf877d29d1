"""The training objective, and the one table of its terms.

L = L_LM + the weighted sum of `LOSS_TERMS`. Every term is a function of sums
over the *global* batch, so its value does not depend on the mesh or on the
number of micro-batches.

To add a term, write its function, enter it in `LOSS_TERMS`, and give
`LossesConfig` a field for its weight. The metrics, the progress line and the
documentation's table of losses follow from the entry.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from edl_jax import tables
from edl_jax.config import LossesConfig
from edl_jax.fields import auto_target
from edl_jax.losses import routing
from edl_jax.losses.divergence import (
  hierarchical_divergence_loss,
  token_pair_divergence_loss,
)

# The divergence loss works on several layers at once while the arrays of
# domains x domains x experts hold fewer elements than this.
_LAYERS_ELEMENTS = 1 << 20


class LossContext(NamedTuple):
  """What the loss terms read beside the routing statistics."""

  config: LossesConfig
  # Coarse label of each fine domain; needed where `coarse_weight` > 0.
  parent_D: tuple[int, ...] = ()
  # Share of the coarse level in the divergence loss, in [0, 1].
  coarse_weight: float = 0.0
  # Rows of the global batch, which bound the number of domains present. None:
  # all domains may be present.
  max_present: int | None = None
  # What weights are multiplied by, by field of `config`; see `weight_factors`.
  factors: Mapping[str, jax.Array] | None = None


class LossTerm(NamedTuple):
  """One auxiliary loss: an entry of `LOSS_TERMS`."""

  # Name in the metrics, unweighted.
  name: str
  # Field of `LossesConfig` that holds the weight.
  weight: str
  # Maps statistics of the global batch to the loss of each layer, (L,). With
  # `of_output` it maps `BatchSums` to one loss.
  function: Callable[[Any, LossContext], jax.Array]
  # For documents.
  formula: str
  source: str
  # Other `*_weight` fields that belong to the term.
  other_weights: tuple[str, ...] = ()
  # The term reads `RoutingStats.outputs`, which are summed on demand.
  needs_outputs: bool = False
  # The term is about the output's logits, not about layers.
  of_output: bool = False
  # The progress line of a run shows the term.
  in_progress_line: bool = False


def load_balance_loss(
  stats: routing.RoutingStats, context: LossContext
) -> jax.Array:
  """L_LB = E sum_e f_e P_e, (L,); 1 at perfect balance.

  `f_e` is the share of routed assignments that went to expert e, without
  gradient, and `P_e` is the mean probability. Fedus et al., arXiv:2101.03961;
  over the global batch: Qiu et al., arXiv:2501.11873.

  With `config.balance_scope` = "sequence" the loss is the mean of every
  sequence's own L_LB. This form exists for comparison: it also balances every
  domain, which suppresses specialisation.

  Raises:
    ValueError: `config.balance_scope` is neither "global" nor "sequence".
  """
  scope = context.config.balance_scope
  if scope == "sequence":
    return stats.sequence_balance_L / jnp.maximum(stats.sequences_L, 1)
  if scope != "global":
    raise ValueError(f"scope={scope!r}: must be 'global' or 'sequence'")
  assignments_LE = jax.lax.stop_gradient(stats.assignments_LE)
  routed_L1 = assignments_LE.sum(-1, keepdims=True)
  f_LE = assignments_LE / jnp.maximum(routed_L1, 1)
  p_LE = stats.token_probability_LE / jnp.maximum(stats.tokens_L, 1)[:, None]
  return f_LE.shape[-1] * (f_LE * p_LE).sum(-1)


def divergence_loss(
  stats: routing.RoutingStats, context: LossContext
) -> jax.Array:
  """L_ED of every layer, (L,).

  `config.divergence_pairs` chooses what is compared: the mean routing of
  "domains" (`divergence.hierarchical_divergence_loss`), or sampled pairs of
  "tokens" (`divergence.token_pair_divergence_loss`). Rows without a domain have
  no influence on either.
  """
  if context.config.divergence_pairs == "tokens":
    assert stats.token_pairs_L22 is not None, "the step samples pairs"
    return token_pair_divergence_loss(stats.token_pairs_L22)
  p_LDE, _ = routing.domain_probabilities(stats)
  loss = functools.partial(
    hierarchical_divergence_loss,
    parent_D=context.parent_D,
    coarse_weight=context.coarse_weight,
    eps=context.config.divergence_epsilon,
    divergence=context.config.divergence,
    max_present=context.max_present,
  )
  num_layers, num_domains, num_experts = p_LDE.shape
  compared = min(num_domains, context.max_present or num_domains)
  pairs = compared * compared * num_experts
  return jax.lax.map(
    lambda layer: loss(*layer),
    (p_LDE, stats.sequences_LD),
    batch_size=min(num_layers, max(1, _LAYERS_ELEMENTS // pairs)),
  )


def router_z_loss(
  stats: routing.RoutingStats, context: LossContext
) -> jax.Array:
  """L_z = mean over tokens of logsumexp(router logits)^2, (L,).

  Zoph et al., arXiv:2202.08906.
  """
  del context
  return stats.squared_logsumexp_L / jnp.maximum(stats.tokens_L, 1)


def output_z_loss(sums: routing.BatchSums, context: LossContext) -> jax.Array:
  """Mean over tokens of logsumexp(output logits)^2, a scalar.

  It keeps the softmax of the output normalised. PaLM, arXiv:2204.02311,
  section 5, with the weight 1e-4.
  """
  del context
  return sums.squared_logsumexp / jnp.maximum(sums.tokens, 1)


def orthogonality_loss(
  stats: routing.RoutingStats, context: LossContext
) -> jax.Array:
  """L_o: the active experts of a token return orthogonal outputs, (L,).

  Mean over tokens of `OutputStats.projection`; `routing.output_stats` computes
  it in the form that `summaries` asks for. 0 with one active expert. Guo et
  al., arXiv:2505.22323.
  """
  del context
  return stats.output_sums().projection / jnp.maximum(stats.tokens_L, 1)


def variance_loss(
  stats: routing.RoutingStats, context: LossContext
) -> jax.Array:
  """L_v: routing weights vary, (L,); at most 0. Guo et al., arXiv:2505.22323.

  `config.specialization_form` chooses between two forms. "paper": minus the
  variance over tokens of each expert's routing weight after top-k, mean over
  experts. "released": minus the unbiased variance over experts of a token's
  probabilities before top-k, mean over tokens, as in the authors' code.

  Raises:
    ValueError: `config.specialization_form` is neither.
  """
  form = context.config.specialization_form
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


LOSS_TERMS: tuple[LossTerm, ...] = (
  LossTerm(
    name="balance_loss",
    weight="balance_weight",
    function=load_balance_loss,
    formula="E sum_e f_e P_e",
    source="arXiv:2101.03961; over the global batch: arXiv:2501.11873",
  ),
  LossTerm(
    name="divergence_loss",
    weight="divergence_weight",
    function=divergence_loss,
    formula="mean over domains j < k of -log(JSD(p_j, p_k) + eps)",
    source="arXiv:2603.00054",
    other_weights=("coarse_weight",),
    in_progress_line=True,
  ),
  LossTerm(
    name="z_loss",
    weight="z_weight",
    function=router_z_loss,
    formula="mean over tokens of logsumexp(router logits)^2",
    source="arXiv:2202.08906",
  ),
  LossTerm(
    name="output_z_loss",
    weight="output_z_weight",
    function=output_z_loss,
    formula="mean over tokens of logsumexp(output logits)^2",
    source="arXiv:2204.02311",
    of_output=True,
  ),
  LossTerm(
    name="orthogonality_loss",
    weight="orthogonality_weight",
    function=orthogonality_loss,
    formula="mean over j != k of norm(x_j projected on x_k)^2",
    source="arXiv:2505.22323",
    needs_outputs=True,
  ),
  LossTerm(
    name="variance_loss",
    weight="variance_weight",
    function=variance_loss,
    formula="-mean over experts of the variance of routing weights",
    source="arXiv:2505.22323",
  ),
)


def check_loss_terms(terms: Sequence[LossTerm], config: type) -> None:
  """Checks that terms and `*_weight` fields of `config` match one to one.

  Raises:
    TypeError: a field belongs to no term or to several, or a term's field does
      not exist.
  """
  fields = {
    field.name
    for field in dataclasses.fields(config)
    if field.name.endswith("_weight")
  }
  claimed: dict[str, str] = {}
  for term in terms:
    for name in (term.weight, *term.other_weights):
      if name not in fields:
        raise TypeError(
          f"loss term {term.name}: {config.__name__} has no field {name}"
        )
      if name in claimed:
        raise TypeError(
          f"loss terms {claimed[name]} and {term.name} share the field {name}"
        )
      claimed[name] = term.name
  if unclaimed := sorted(fields - claimed.keys()):
    raise TypeError(
      f"{config.__name__}: no loss term reads {', '.join(unclaimed)}; enter the"
      " term in edl_jax.losses.objective.LOSS_TERMS"
    )


check_loss_terms(LOSS_TERMS, LossesConfig)


def loss_table_markdown() -> str:
  """Returns `LOSS_TERMS` as a Markdown table, for the documentation."""
  return tables.markdown(
    ("term", "weight", "formula, per layer", "source"),
    [
      (
        f"`{term.name}`",
        f"`losses.{term.weight}`",
        f"`{term.formula}`",
        term.source,
      )
      for term in LOSS_TERMS
    ],
    left=range(4),
  )


def summaries(config: LossesConfig) -> routing.Summaries:
  """Returns what each mixture-of-experts layer must sum up for the objective.

  The experts' outputs are summed up only where a weighted term needs them, in
  the form `config.specialization_form`.
  """
  needs_outputs = any(
    term.needs_outputs and getattr(config, term.weight) for term in LOSS_TERMS
  )
  made = routing.Summaries(output_z_weight=config.output_z_weight)
  if not needs_outputs:
    return made
  return made._replace(
    outputs=functools.partial(
      routing.output_stats, form=config.specialization_form
    )
  )


def auto_weights(config: LossesConfig) -> dict[str, jax.Array]:
  """Returns a 0 for every "auto:TARGET" weight, which the first batch sets."""
  return {
    term.weight: jnp.float32(0)
    for term in LOSS_TERMS
    if auto_target(getattr(config, term.weight)) is not None
  }


def _found_weight(loss: jax.Array, target: float, kept: jax.Array) -> jax.Array:
  """Returns `kept` if it is set, else 10^round(log10(target / |loss|))."""
  size = jnp.abs(jax.lax.stop_gradient(loss))
  exponent = jnp.round(jnp.log10(target / jnp.where(size > 0, size, 1)))
  return jnp.where(kept > 0, kept, jnp.where(size > 0, 10.0**exponent, 0))


def weight_factors(
  config: LossesConfig, num_steps: int, step: jax.Array | int
) -> dict[str, jax.Array]:
  """Returns what weights are multiplied by at a step, by their fields.

  Weights that stay as they are have no entry. `config.divergence_schedule` of
  "warmup" rises linearly from 0 at the first step to 1 after
  `config.divergence_fraction` of the steps; "decay" is 1 until that share is
  left, and falls linearly: it would be 0 one step after the last.

  Args:
    config: the weights.
    num_steps: of the run.
    step: steps taken, those that `train.skip_spikes` skipped too.
  """
  if config.divergence_schedule == "constant":
    return {}
  length = config.divergence_fraction * num_steps
  falls = config.divergence_schedule == "decay"
  inside = num_steps - step if falls else step
  return {"divergence_weight": jnp.clip(inside / length, 0.0, 1.0)}


def objective(
  sums: routing.BatchSums,
  context: LossContext,
  kept_weights: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the training objective: L_LM plus the weighted `LOSS_TERMS`.

  Args:
    sums: of the global batch.
    context: weights, their factors, forms and labels.
    kept_weights: the "auto:TARGET" weights that the first batch set; before
      it, what `auto_weights` returns.

  Returns:
    The loss in nats per token, and a float32 scalar by name: "loss",
    "lm_loss", every term unweighted (those of experts' outputs where these
    were summed), and the automatic weights and those with a factor, as they are
    in use, under their fields. Terms are means over layers.
  """
  stats, config = sums.routing, context.config
  scalars = {"lm_loss": sums.nats / jnp.maximum(sums.tokens, 1)}
  for term in LOSS_TERMS:
    if stats.outputs is not None or not term.needs_outputs:
      read = sums if term.of_output else stats
      scalars[term.name] = term.function(read, context).mean()
  loss, found = scalars["lm_loss"], {}
  factors = context.factors or {}
  for term in LOSS_TERMS:
    weight = getattr(config, term.weight)
    # A weight of 0 leaves the term out of the gradient's program.
    if not weight:
      continue
    value, target = scalars[term.name], auto_target(weight)
    if target is not None:
      kept = (kept_weights or auto_weights(config))[term.weight]
      weight = found[term.weight] = _found_weight(value, target, kept)
    if term.weight in factors:
      weight = found[term.weight] = factors[term.weight] * weight
    loss += weight * value
  return loss, {"loss": loss, **scalars, **found}
