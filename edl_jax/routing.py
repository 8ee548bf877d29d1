"""Routing statistics: additive sums over sequences, and what follows from them.

Every mixture-of-experts layer returns a `RowRouting`; `collect` sums the rows
of all layers into one `RoutingStats`, which adds over micro-batches,
evaluation steps, devices and hosts. Every routing loss and metric is a small
pure function of it. Entropies and divergences are in nats.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from edl_jax.divergence import LN_2, pairwise_jensen_shannon

_HIGHEST = jax.lax.Precision.HIGHEST


class RowRouting(NamedTuple):
  """One layer's routing, per batch row; all float32.

  Scan stacks it to a leading L axis.
  """

  # Mean router probability over the row's counted tokens, (B, E).
  probability_BE: jax.Array
  # Mean entropy of a token's router probabilities, (B,).
  token_entropy_B: jax.Array
  # Counted tokens sent to each expert, (B, E); rows sum to tokens * A.
  assignments_BE: jax.Array
  # Sum over counted tokens of logsumexp(router logits)^2, (B,).
  squared_logsumexp_B: jax.Array
  # Counted tokens, (B,).
  tokens_B: jax.Array


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
  # Sum over tokens of their probabilities, (L, E).
  token_probability_LE: jax.Array
  # Sum over tokens of logsumexp(router logits)^2, (L,).
  squared_logsumexp_L: jax.Array
  # Counted tokens, (L,).
  tokens_L: jax.Array


def row_routing(
  logits_BTE: jax.Array,
  probs_BTE: jax.Array,
  expert_BTA: jax.Array,
  weights_BT: jax.Array,
) -> RowRouting:
  """Sums one layer's routing over the positions of each row.

  Args:
    logits_BTE, probs_BTE: router logits and their softmax, float32.
    expert_BTA: the active experts of each token, int.
    weights_BT: 1 where a token counts.
  """
  num_experts = probs_BTE.shape[-1]
  tokens_B = weights_BT.sum(-1)
  count_B = jnp.maximum(tokens_B, 1)
  # One comparison per active expert rather than a (B, T, A, E) one-hot.
  chosen_BTE = sum(
    (expert_BTA[..., a, None] == jnp.arange(num_experts)).astype(jnp.float32)
    for a in range(expert_BTA.shape[-1])
  )
  weighted_BTE = weights_BT[..., None] * probs_BTE
  logsumexp_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
  return RowRouting(
    probability_BE=weighted_BTE.sum(1) / count_B[:, None],
    token_entropy_B=(
      entr(jax.lax.stop_gradient(probs_BTE)).sum(-1) * weights_BT
    ).sum(-1)
    / count_B,
    assignments_BE=(chosen_BTE * weights_BT[..., None]).sum(1),
    squared_logsumexp_B=(jnp.square(logsumexp_BT) * weights_BT).sum(-1),
    tokens_B=tokens_B,
  )


def collect(
  rows: RowRouting, domain_B: jax.Array, num_domains: int
) -> RoutingStats:
  """Sums rows into domains, for all layers at once.

  Under a mesh the rows are spread over devices and this is the one place
  where routing crosses them: the sums, and so every loss and metric, are those
  of the global batch.

  Args:
    rows: stacked over layers, (L, B, ...).
    domain_B: fine domain label of each row, in [0, num_domains).
    num_domains: D.
  """
  member_BD = jax.nn.one_hot(domain_B, num_domains, dtype=jnp.float32)
  counted_LB = (rows.tokens_B > 0).astype(jnp.float32)
  # Means weigh sequences equally; a row without tokens is no sequence.
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
    token_probability_LE=(rows.tokens_B[..., None] * probability_LBE).sum(1),
    squared_logsumexp_L=rows.squared_logsumexp_B.sum(1),
    tokens_L=rows.tokens_B.sum(1),
  )


def merge_domains(
  stats: RoutingStats, parent_D: tuple[int, ...]
) -> RoutingStats:
  """Sums fine domains into their coarse parents.

  Args:
    stats: by fine domain.
    parent_D: coarse label of each fine domain.
  """
  segments = jnp.asarray(parent_D)
  num_parents = max(parent_D) + 1

  def merge(x_LD: jax.Array) -> jax.Array:
    summed = jax.ops.segment_sum(
      jnp.moveaxis(x_LD, 1, 0), segments, num_parents
    )
    return jnp.moveaxis(summed, 0, 1)

  return stats._replace(
    probability_LDE=merge(stats.probability_LDE),
    sequences_LD=merge(stats.sequences_LD),
    sequence_entropy_LD=merge(stats.sequence_entropy_LD),
    token_entropy_LD=merge(stats.token_entropy_LD),
    assignments_LDE=merge(stats.assignments_LDE),
  )


def domain_probabilities(stats: RoutingStats) -> tuple[jax.Array, jax.Array]:
  """Returns p_LDE, the mean of each domain's sequences, and present_LD."""
  count_LD = stats.sequences_LD
  p_LDE = stats.probability_LDE / jnp.maximum(count_LD, 1)[..., None]
  return p_LDE, count_LD > 0


def pairwise_divergence(stats: RoutingStats) -> jax.Array:
  """JSD of every pair of domains in nats, (L, D, D); 0 for absent domains."""
  p_LDE, present_LD = domain_probabilities(stats)
  divergence_LDD = jax.lax.map(pairwise_jensen_shannon, p_LDE)
  both_LDD = present_LD[:, :, None] & present_LD[:, None, :]
  return jnp.where(both_LDD, divergence_LDD, 0)


def routing_diversity(stats: RoutingStats) -> jax.Array:
  """Mean pairwise JSD of the domains present over ln 2, in [0, 1]; (L,)."""
  present_LD = stats.sequences_LD > 0
  domains_L = present_LD.sum(-1)
  pairs_L = jnp.maximum(domains_L * (domains_L - 1), 1)
  return pairwise_divergence(stats).sum((1, 2)) / pairs_L / LN_2


def diversity_decomposition(
  stats: RoutingStats, unit: str = "sequence"
) -> tuple[jax.Array, jax.Array]:
  """Total diversity and its part between domains (arXiv:2603.00054).

  D_total = H(sum_j pi_j p_j) - mean over units of H(p_unit), and
  D_inter = H(sum_j pi_j p_j) - sum_j pi_j H(p_j), with pi_j the share of
  sequences in domain j; D_intra = D_total - D_inter >= 0. D_inter is evaluated
  as sum_j pi_j KL(p_j || mean), elementwise non-negative terms.

  Args:
    stats: routing sums.
    unit: "sequence" or "token", what D_total is taken over.

  Returns:
    (D_total, D_inter) in nats, each (L,).

  Raises:
    ValueError: `unit` is neither.
  """
  if unit not in ("sequence", "token"):
    raise ValueError(f"unit={unit!r}: must be 'sequence' or 'token'")
  entropy_LD = (
    stats.sequence_entropy_LD if unit == "sequence" else stats.token_entropy_LD
  )
  p_LDE, _ = domain_probabilities(stats)
  sequences_L = jnp.maximum(stats.sequences_LD.sum(-1), 1)
  share_LD = stats.sequences_LD / sequences_L[:, None]
  mean_LE = stats.probability_LDE.sum(1) / sequences_L[:, None]
  # p log(p/m) - p + m >= 0 for every expert, and the added terms sum to 0.
  mean_L1E = mean_LE[:, None]
  safe_L1E = jnp.where(mean_L1E > 0, mean_L1E, 1)
  ratio_LDE = jnp.where(mean_L1E > 0, p_LDE / safe_L1E, 1)
  excess_LDE = ratio_LDE - 1
  # entr(r) = -r log r; near r = 1 the three terms cancel, hence log1p.
  log_LDE = jnp.log1p(jnp.maximum(excess_LDE, -1 + 1e-7))
  terms_LDE = jnp.where(
    jnp.abs(excess_LDE) < 1e-2,
    jnp.square(excess_LDE)
    * (0.5 - excess_LDE / 6 + jnp.square(excess_LDE) / 12),
    ratio_LDE * log_LDE - excess_LDE,
  )
  kl_LD = (mean_L1E * terms_LDE).sum(-1)
  inter_L = (share_LD * kl_LD).sum(-1)
  total_L = entr(mean_LE).sum(-1) - entropy_LD.sum(-1) / sequences_L
  # Rounding of the entropies must not push the total below its part.
  return jnp.maximum(total_L, inter_L), inter_L


def inter_fraction(stats: RoutingStats) -> jax.Array:
  """D_inter / D_total over sequences, in [0, 1]; 0 where both vanish; (L,)."""
  total_L, inter_L = diversity_decomposition(stats)
  return jnp.where(total_L > 0, inter_L / jnp.where(total_L > 0, total_L, 1), 0)


def max_violation(stats: RoutingStats) -> jax.Array:
  """MaxVio = max_e load_e / mean load - 1 (arXiv:2408.15664), (L,)."""
  load_LE = stats.assignments_LDE.sum(1)
  mean_L = load_LE.mean(-1)
  return load_LE.max(-1) / jnp.where(mean_L > 0, mean_L, 1) - (mean_L > 0)


def clustering_purity(stats: RoutingStats) -> jax.Array:
  """Share of assignments from the domain that each expert sees most, (L,).

  At least 1/D for equally frequent domains, and 1 if no expert is shared.
  """
  total_L = stats.assignments_LDE.sum((1, 2))
  return stats.assignments_LDE.max(1).sum(-1) / jnp.maximum(total_L, 1)


def normalized_mutual_information(stats: RoutingStats) -> jax.Array:
  """NMI(domain, expert) of routed assignments, in [0, 1]; (L,).

  I(domain; expert) over the mean of the two entropies; 0 if both vanish.
  """
  total_L = jnp.maximum(stats.assignments_LDE.sum((1, 2)), 1)
  joint_LDE = stats.assignments_LDE / total_L[:, None, None]
  domain_L = entr(joint_LDE.sum(2)).sum(-1)
  expert_L = entr(joint_LDE.sum(1)).sum(-1)
  information_L = domain_L + expert_L - entr(joint_LDE).sum((1, 2))
  mean_L = (domain_L + expert_L) / 2
  return jnp.where(
    mean_L > 0, information_L / jnp.where(mean_L > 0, mean_L, 1), 0
  ).clip(0, 1)


def metrics_by_layer(stats: RoutingStats) -> dict[str, jax.Array]:
  """Every routing metric, each (L,)."""
  return {
    "diversity": routing_diversity(stats),
    "inter_fraction": inter_fraction(stats),
    "max_violation": max_violation(stats),
    "purity": clustering_purity(stats),
    "normalized_mutual_information": normalized_mutual_information(stats),
  }
