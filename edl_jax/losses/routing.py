"""Routing statistics: sums from which every routing loss and metric follows.

Every mixture-of-experts layer returns a `RowRouting`. `collect` sums the rows
of all layers into one `RoutingStats`. These sums add over micro-batches,
evaluation steps, devices and hosts. Entropies and divergences are in nats.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from edl_jax import sharding

# Assignments are counted for this many of the most frequent tokens of held-out
# text, and for all others as one.
COUNTED_TOKENS = 8192

_HIGHEST = jax.lax.Precision.HIGHEST


class RowRouting(NamedTuple):
  """One layer's routing by row of the batch; all float32.

  The scan over layers adds a leading L axis.
  """

  # Mean router probability over the row's counted tokens, (B, E).
  probability_BE: jax.Array
  # Mean entropy of a token's router probabilities, (B,).
  token_entropy_B: jax.Array
  # Counted tokens sent to each expert, (B, E); rows sum to tokens * A.
  assignments_BE: jax.Array
  # Sums over counted tokens of the routing weights after top-k (0 where an
  # expert is not active) and of their squares, (B, E).
  gate_BE: jax.Array
  squared_gate_BE: jax.Array
  # Sum over counted tokens of sum_e p_e^2, (B,).
  squared_probability_B: jax.Array
  # Sum over counted tokens of logsumexp(router logits)^2, (B,).
  squared_logsumexp_B: jax.Array
  # Counted tokens, (B,).
  tokens_B: jax.Array


class OutputStats(NamedTuple):
  """Sums over counted tokens of the active experts' outputs; all float32.

  Describes one layer, or all with a leading L axis. Adds leaf by leaf.
  """

  # Squared norm of one active expert's output projected on another's, mean over
  # a token's pairs; see `output_stats`.
  projection: jax.Array
  # Squared cosine of the outputs of two active experts, mean over a token's
  # pairs.
  squared_cosine: jax.Array
  # Sum of every expert's outputs, (E, M), and of their squared norms, (E,).
  sum_EM: jax.Array
  squared_norm_E: jax.Array
  # Sum of the norms of every expert's outputs, each times its routing weight,
  # (E,).
  gated_norm_E: jax.Array
  # Counted tokens of every expert, (E,).
  tokens_E: jax.Array


class RoutingStats(NamedTuple):
  """Sums over sequences, per layer; all float32. Adds leaf by leaf."""

  # Sum over sequences of their mean probabilities, by domain, (L, D, E).
  probability_LDE: jax.Array
  # Sequences with a counted token, by domain, (L, D).
  sequences_LD: jax.Array
  # Sum over sequences of the entropy of their mean probabilities, (L, D).
  sequence_entropy_LD: jax.Array
  # Sum over sequences of their mean token entropy, (L, D).
  token_entropy_LD: jax.Array
  # Routed assignments by domain, (L, D, E).
  assignments_LDE: jax.Array
  # Sum over sequences of each one's own load-balance loss, (L,).
  sequence_balance_L: jax.Array
  # Sum over tokens of their probabilities, (L, E), and of sum_e p_e^2, (L,).
  token_probability_LE: jax.Array
  squared_probability_L: jax.Array
  # Sums over tokens of routing weights after top-k and of their squares,
  # (L, E).
  gate_LE: jax.Array
  squared_gate_LE: jax.Array
  # Sum over tokens of logsumexp(router logits)^2, (L,).
  squared_logsumexp_L: jax.Array
  # Counted tokens, (L,).
  tokens_L: jax.Array
  # Sequences with a counted token, (L,), and routed assignments, (L, E). Unlike
  # the sums by domain, these include rows without a domain.
  sequences_L: jax.Array
  assignments_LE: jax.Array
  # Sums of the experts' outputs, with leading L, where they were asked for.
  outputs: OutputStats | None = None
  # From `divergence.token_pair_sums`, (L, 2, 2), where pairs were sampled.
  token_pairs_L22: jax.Array | None = None
  # Routed assignments by class of the token, (L, V, E), where classes were
  # given; see `token_assignments`.
  token_assignments_LVE: jax.Array | None = None

  def output_sums(self) -> OutputStats:
    """Returns `outputs`.

    Raises:
      ValueError: they were not summed.
    """
    if self.outputs is None:
      raise ValueError("the experts' outputs were not summed")
    return self.outputs


class BatchSums(NamedTuple):
  """The sums of a batch that the objective needs; adds leaf by leaf."""

  # Summed cross-entropy of counted tokens, nats, scalar.
  nats: jax.Array
  # Sum over counted tokens of logsumexp(output logits)^2, scalar.
  squared_logsumexp: jax.Array
  # Counted tokens, scalar: of supervised examples those of completions, which
  # are fewer than `routing` counts.
  tokens: jax.Array
  routing: RoutingStats


def row_routing(
  logits_BTE: jax.Array,
  probs_BTE: jax.Array,
  expert_BTA: jax.Array,
  gate_BTA: jax.Array,
  weights_BT: jax.Array,
) -> RowRouting:
  """Sums one layer's routing over the positions of each row.

  Devices that share rows add up their positions.

  Args:
    logits_BTE, probs_BTE: router logits and their softmax, float32.
    expert_BTA: the active experts of each token, int.
    gate_BTA: their routing weights, float32.
    weights_BT: 1 where a token counts.
  """
  num_experts = probs_BTE.shape[-1]
  # One comparison per active expert avoids a one-hot array (B, T, A, E).
  chosen = [
    expert_BTA[..., a, None] == jnp.arange(num_experts)
    for a in range(expert_BTA.shape[-1])
  ]
  counted_BT1 = weights_BT[..., None]
  gate_BTE = sum(
    jnp.where(chosen_BTE, gate_BTA[..., a, None], 0)
    for a, chosen_BTE in enumerate(chosen)
  )
  logsumexp_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
  sums = RowRouting(
    probability_BE=(counted_BT1 * probs_BTE).sum(1),
    token_entropy_B=(
      entr(jax.lax.stop_gradient(probs_BTE)).sum(-1) * weights_BT
    ).sum(-1),
    assignments_BE=functools.reduce(
      jnp.add,
      [jnp.where(chosen_BTE, counted_BT1, 0).sum(1) for chosen_BTE in chosen],
    ),
    gate_BE=(gate_BTE * counted_BT1).sum(1),
    squared_gate_BE=(jnp.square(gate_BTE) * counted_BT1).sum(1),
    squared_probability_B=(jnp.square(probs_BTE) * counted_BT1).sum((1, 2)),
    squared_logsumexp_B=(jnp.square(logsumexp_BT) * weights_BT).sum(-1),
    tokens_B=weights_BT.sum(-1),
  )
  # Add over devices before dividing: a mean of means would weigh devices alike.
  sums = sharding.sum_over(sums, ("sequence",))
  count_B = jnp.maximum(sums.tokens_B, 1)
  return sums._replace(
    probability_BE=sums.probability_BE / count_B[:, None],
    token_entropy_B=sums.token_entropy_B / count_B,
  )


def _row_balance(rows: RowRouting) -> jax.Array:
  """Computes every row's own load-balance loss, E sum_e f_e P_e, (L, B)."""
  assignments_LBE = jax.lax.stop_gradient(rows.assignments_BE)
  routed_LB1 = jnp.maximum(assignments_LBE.sum(-1, keepdims=True), 1)
  share_LBE = assignments_LBE / routed_LB1
  return share_LBE.shape[-1] * (share_LBE * rows.probability_BE).sum(-1)


def output_stats(
  y_PAM: jax.Array,
  expert_PA: jax.Array,
  gate_PA: jax.Array,
  weights_P: jax.Array,
  num_experts: int,
  form: str = "paper",
) -> OutputStats:
  """Sums the outputs of each token's active experts, in one layer.

  `projection` sums L_o of Guo et al., arXiv:2505.22323, over tokens. In the
  form "paper", a token's L_o is

    mean over j != k of || <x_j, x_k> / (<x_k, x_k> + 1e-8) x_k ||^2

  of its active outputs x. In the form "released", as in the authors' code, it
  is the mean over j of the squared norm of x_j projected on the span of the
  token's other active outputs (Gram-Schmidt, vectors divided by their norm +
  1e-6). The authors' code reshapes outputs that lie expert by expert to
  (tokens, A), so its rows mix tokens. Here outputs are grouped by token, as
  their text says.

  Args:
    y_PAM: outputs of the active experts, before weighting; any float dtype.
    expert_PA: index of the expert of each output.
    gate_PA: routing weight of each output, float32.
    weights_P: 1 where a token counts.
    num_experts: E.
    form: "paper" or "released".

  Raises:
    ValueError: `form` is neither.
  """
  y_PAM = y_PAM.astype(jnp.float32)
  active = y_PAM.shape[1]
  gram_PAA = jnp.einsum("PAM,PaM->PAa", y_PAM, y_PAM, precision=_HIGHEST)
  square_PA = jnp.diagonal(gram_PAA, axis1=1, axis2=2)
  other_AA = ~jnp.eye(active, dtype=bool)
  pairs = max(1, active * (active - 1))
  if form == "paper":
    ratio_PAA = gram_PAA / (square_PA[:, None, :] + 1e-8)
    term_PAA = jnp.square(ratio_PAA) * square_PA[:, None, :]
    projection_P = jnp.where(other_AA, term_PAA, 0).sum((1, 2)) / pairs
  elif form == "released":
    projection_P = _span_projection(y_PAM)
  else:
    raise ValueError(f"form={form!r}: must be 'paper' or 'released'")
  gram_PAA, square_PA, y_PAM, gate_PA = jax.lax.stop_gradient(
    (gram_PAA, square_PA, y_PAM, gate_PA)
  )
  norms_PAA = square_PA[:, None, :] * square_PA[:, :, None]
  cosine_PAA = jnp.square(gram_PAA) / jnp.where(norms_PAA > 0, norms_PAA, 1)
  counted_PA = jnp.broadcast_to(weights_P[:, None], square_PA.shape)

  def by_expert(x_PA: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(
      x_PA.reshape(-1, *x_PA.shape[2:]), expert_PA.reshape(-1), num_experts
    )

  return OutputStats(
    projection=(projection_P * weights_P).sum(),
    squared_cosine=(
      jnp.where(other_AA, cosine_PAA, 0).sum((1, 2)) / pairs * weights_P
    ).sum(),
    sum_EM=by_expert(y_PAM * counted_PA[..., None]),
    squared_norm_E=by_expert(square_PA * counted_PA),
    gated_norm_E=by_expert(gate_PA * jnp.sqrt(square_PA) * counted_PA),
    tokens_E=by_expert(counted_PA),
  )


def _span_projection(y_PAM: jax.Array) -> jax.Array:
  """Mean over j of |x_j projected on the span of the other x_k|^2, (P,)."""

  def norm(x_PM: jax.Array) -> jax.Array:
    square_P1 = jnp.square(x_PM).sum(-1, keepdims=True)
    # The derivative of the root is infinite at 0.
    return jnp.where(square_P1 > 0, jnp.sqrt(jnp.maximum(square_P1, 1e-30)), 0)

  def inner(x_PM: jax.Array, y_PM: jax.Array) -> jax.Array:
    return (x_PM * y_PM).sum(-1, keepdims=True)

  @jax.checkpoint
  def of_one(y_APM: jax.Array) -> jax.Array:
    """Projects the first output on the span of the rest; squared norm, (P,)."""
    basis: list[jax.Array] = []
    for x_PM in y_APM[1:]:
      for unit_PM in basis:
        x_PM = x_PM - inner(x_PM, unit_PM) * unit_PM
      basis.append(x_PM / (norm(x_PM) + 1e-6))
    projected_PM = sum(
      (inner(y_APM[0], unit_PM) * unit_PM for unit_PM in basis),
      jnp.zeros_like(y_APM[0]),
    )
    return jnp.square(projected_PM).sum(-1)

  y_APM = jnp.moveaxis(y_PAM, 1, 0)
  active = y_APM.shape[0]
  each_AP = jax.lax.map(
    lambda j: of_one(jnp.roll(y_APM, -j, axis=0)), jnp.arange(active)
  )
  return each_AP.mean(0)


class Summaries(NamedTuple):
  """Functions that sum up what happens inside a mixture-of-experts layer.

  The layer returns their results beside its output, and the scan stacks them
  to a leading L axis.
  """

  # Takes the arguments of `row_routing`. Every leaf that it returns starts with
  # the axis B: rows stay apart until the model has run.
  routing: Callable[..., Any] = row_routing
  # Takes the arguments of `output_stats`, and returns sums over this device's
  # tokens, which are then added over devices. None skips this. The dispatch
  # "ring" has no outputs by token to sum up.
  outputs: Callable[..., OutputStats] | None = None
  # The class of every token id, int32 (V,): asks for `token_assignments`.
  token_class_V: np.ndarray | None = None
  # The objective's weight of `BatchSums.squared_logsumexp` over tokens: see
  # `chunked_cross_entropy`.
  output_z_weight: float = 0.0


# Leaves the experts' outputs alone.
ROUTING_ONLY = Summaries()


def token_assignments(
  token_class_V: np.ndarray,
  tokens_BT: jax.Array,
  expert_BTA: jax.Array,
  weights_BT: jax.Array,
  num_experts: int,
) -> jax.Array:
  """Counts one layer's assignments by class of the token and by expert.

  Args:
    token_class_V: the class of every token id, from 0; every id may be its own.
    tokens_BT: token ids.
    expert_BTA: the active experts of each token.
    weights_BT: 1 where a token counts.
    num_experts: E.

  Returns:
    Float32 (V, E), with V as many as there are classes.
  """
  num_classes = int(token_class_V.max()) + 1
  class_BT1 = jnp.asarray(token_class_V)[tokens_BT][..., None]
  place_BTA = class_BT1 * num_experts + expert_BTA
  weights_BTA = jnp.broadcast_to(weights_BT[..., None], expert_BTA.shape)
  return jax.ops.segment_sum(
    weights_BTA.reshape(-1), place_BTA.reshape(-1), num_classes * num_experts
  ).reshape(num_classes, num_experts)


def collect(
  rows: RowRouting,
  domain_B: jax.Array,
  num_domains: int,
  outputs: OutputStats | None = None,
  token_pairs_L22: jax.Array | None = None,
  token_assignments_LVE: jax.Array | None = None,
) -> RoutingStats:
  """Sums rows by domain, for all layers at once.

  A mesh spreads the rows over devices, and this is the one place where routing
  crosses devices. So the sums, and every loss and metric, are those of the
  global batch.

  Args:
    rows: stacked over layers, (L, B, ...).
    domain_B: fine domain label of each row, in [0, num_domains), or -1. Rows
      of label -1 have no domain and enter only the sums over all rows.
    num_domains: D.
    outputs: stacked over layers, if the experts' outputs were summed.
    token_pairs_L22: sums over pairs of tokens, if these were sampled.
    token_assignments_LVE: assignments by class of the token, if there are
      classes.
  """
  member_BD = jax.nn.one_hot(domain_B, num_domains, dtype=jnp.float32)
  counted_LB = (rows.tokens_B > 0).astype(jnp.float32)
  # Sequences count equally. A row without counted tokens is not a sequence.
  sequence_LBD = counted_LB[..., None] * member_BD
  probability_LBE = rows.probability_BE

  def by_domain(x_LB: jax.Array) -> jax.Array:
    return jnp.einsum("LB,LBD->LD", x_LB, sequence_LBD, precision=_HIGHEST)

  def experts_by_domain(x_LBE: jax.Array) -> jax.Array:
    return jnp.einsum("LBE,LBD->LDE", x_LBE, sequence_LBD, precision=_HIGHEST)

  return RoutingStats(
    probability_LDE=experts_by_domain(probability_LBE),
    sequences_LD=sequence_LBD.sum(1),
    sequence_entropy_LD=by_domain(
      entr(jax.lax.stop_gradient(probability_LBE)).sum(-1)
    ),
    token_entropy_LD=by_domain(rows.token_entropy_B),
    assignments_LDE=experts_by_domain(rows.assignments_BE),
    sequence_balance_L=_row_balance(rows).sum(1),
    token_probability_LE=(rows.tokens_B[..., None] * probability_LBE).sum(1),
    squared_probability_L=rows.squared_probability_B.sum(1),
    gate_LE=rows.gate_BE.sum(1),
    squared_gate_LE=rows.squared_gate_BE.sum(1),
    squared_logsumexp_L=rows.squared_logsumexp_B.sum(1),
    tokens_L=rows.tokens_B.sum(1),
    sequences_L=counted_LB.sum(1),
    assignments_LE=rows.assignments_BE.sum(1),
    outputs=outputs,
    token_pairs_L22=token_pairs_L22,
    token_assignments_LVE=token_assignments_LVE,
  )


def domain_probabilities(stats: RoutingStats) -> tuple[jax.Array, jax.Array]:
  """Returns p_LDE, each domain's mean over sequences, and present_LD."""
  count_LD = stats.sequences_LD
  p_LDE = stats.probability_LDE / jnp.maximum(count_LD, 1)[..., None]
  return p_LDE, count_LD > 0
