"""Routing metrics: small pure functions of `RoutingStats`.

Entropies and divergences are in nats.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from edl_jax.losses.divergence import LN_2, pairwise_jensen_shannon
from edl_jax.losses.routing import RoutingStats, domain_probabilities


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
    unit: "sequence" or "token", the units of D_total.

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
  # The terms p log(p/m) - p + m are non-negative, and m - p sums to 0.
  mean_L1E = mean_LE[:, None]
  safe_L1E = jnp.where(mean_L1E > 0, mean_L1E, 1)
  ratio_LDE = jnp.where(mean_L1E > 0, p_LDE / safe_L1E, 1)
  excess_LDE = ratio_LDE - 1
  # Near ratio 1 the three terms cancel; a Taylor series replaces them there.
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
  # Rounding of the entropies could make the total smaller than its part.
  return jnp.maximum(total_L, inter_L), inter_L


def inter_fraction(stats: RoutingStats) -> jax.Array:
  """D_inter / D_total over sequences, in [0, 1]; 0 where both vanish; (L,)."""
  total_L, inter_L = diversity_decomposition(stats)
  return jnp.where(total_L > 0, inter_L / jnp.where(total_L > 0, total_L, 1), 0)


def max_violation(stats: RoutingStats) -> jax.Array:
  """MaxVio = max_e load_e / mean load - 1 (arXiv:2408.15664), (L,)."""
  load_LE = stats.assignments_LE
  mean_L = load_LE.mean(-1)
  return load_LE.max(-1) / jnp.where(mean_L > 0, mean_L, 1) - (mean_L > 0)


def dead_experts(stats: RoutingStats) -> jax.Array:
  """Share of experts that no counted token was sent to, in [0, 1]; (L,)."""
  return (stats.assignments_LE == 0).mean(-1, dtype=jnp.float32)


def load_evenness(stats: RoutingStats) -> jax.Array:
  """exp(H(load)) / E, the share of experts that are effectively used; (L,).

  H is the entropy of the experts' shares of assignments: 1 if all experts have
  the same load, 1/E if one has everything.
  """
  load_LE = stats.assignments_LE
  share_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  return jnp.exp(entr(share_LE).sum(-1)) / load_LE.shape[-1]


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


def token_mutual_information(stats: RoutingStats) -> jax.Array:
  """NMI(token, expert) of routed assignments, in [0, 1]; (L,).

  A control of `normalized_mutual_information` with tokens in the domains'
  place: where it is high, an expert may serve words rather than topics
  (arXiv:2604.09780).

  Raises:
    ValueError: assignments were not counted by token.
  """
  if stats.token_assignments_LVE is None:
    raise ValueError("assignments were not counted by token")
  return normalized_mutual_information(
    stats._replace(assignments_LDE=stats.token_assignments_LVE)
  )


def routing_variance(stats: RoutingStats) -> jax.Array:
  """Mean over tokens of the variance over experts of the routing weights, (L,).

  The weights s are those after top-k, 0 where an expert is not active. They
  sum to 1, so the mean variance is mean_i sum_e s_ie^2 / E - 1 / E^2. Guo et
  al., arXiv:2505.22323.
  """
  num_experts = stats.squared_gate_LE.shape[-1]
  tokens_L = jnp.maximum(stats.tokens_L, 1)
  mean_square_L = stats.squared_gate_LE.sum(-1) / tokens_L / num_experts
  return jnp.where(
    stats.tokens_L > 0, jnp.maximum(mean_square_L - num_experts**-2, 0), 0
  )


def expert_overlap(stats: RoutingStats) -> jax.Array:
  """Mean overlap of the domain profiles of two experts, (L,).

  An expert's profile is the share of its assignments that each domain sends;
  two profiles share sum_d min(a_d, b_d): 0 if the experts serve no common
  domain, 1 if they serve the same mix. Experts without a token do not count.
  Guo et al., arXiv:2505.22323, report an overlap without defining it.
  """
  load_LE = stats.assignments_LDE.sum(1)
  used_LE = load_LE > 0
  profile_LDE = stats.assignments_LDE / jnp.where(used_LE, load_LE, 1)[:, None]

  def of_layer(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
    profile_DE, used_E = arguments
    # One expert at a time takes memory O(D E) in place of O(D E^2).
    shared_EE = jax.lax.map(
      lambda own_D: jnp.minimum(own_D[:, None], profile_DE).sum(0),
      profile_DE.T,
    )
    pair_EE = used_E[:, None] & used_E & ~jnp.eye(len(used_E), dtype=bool)
    return jnp.where(pair_EE, shared_EE, 0).sum() / jnp.maximum(
      pair_EE.sum(), 1
    )

  return jax.lax.map(of_layer, (profile_LDE, used_LE))


def output_similarity(stats: RoutingStats) -> jax.Array:
  """Mean squared cosine between outputs of two experts of one token, (L,).

  0 if active experts return orthogonal vectors, 1 if parallel ones. L_o of
  arXiv:2505.22323 lowers it; the length of the outputs has no influence.
  """
  return stats.output_sums().squared_cosine / jnp.maximum(stats.tokens_L, 1)


def silhouette(stats: RoutingStats) -> jax.Array:
  """How far apart experts' outputs lie, in [0, 1]; (L,).

  The silhouette (b - a) / max(a, b) of Rousseeuw (1987). The outputs of an
  expert are a cluster; a is their mean squared distance to their own centroid,
  and b that to the nearest other centroid. With these distances b is a plus
  the squared distance of the two centroids. The result is a mean over tokens
  and active experts; experts without a token do not count.
  Guo et al., arXiv:2505.22323, do not say which silhouette they report.
  """
  outputs = stats.output_sums()
  count_LE1 = jnp.maximum(outputs.tokens_E, 1)[..., None]
  mean_LEM = outputs.sum_EM / count_LE1
  square_LE = outputs.squared_norm_E / count_LE1[..., 0]
  used_LE = outputs.tokens_E > 0
  spread_LE = jnp.maximum(square_LE - jnp.square(mean_LEM).sum(-1), 0)

  def nearest(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
    mean_EM, used_E = arguments

    def of_expert(own: tuple[jax.Array, jax.Array]) -> jax.Array:
      own_M, index = own
      distance_E = jnp.square(own_M - mean_EM).sum(-1)
      other_E = used_E & (jnp.arange(len(used_E)) != index)
      return jnp.where(other_E, distance_E, jnp.inf).min()

    return jax.lax.map(of_expert, (mean_EM, jnp.arange(len(used_E))))

  apart_LE = jax.lax.map(nearest, (mean_LEM, used_LE))
  apart_LE = jnp.where(jnp.isfinite(apart_LE), apart_LE, 0)
  whole_LE = spread_LE + apart_LE
  each_LE = jnp.where(
    whole_LE > 0, apart_LE / jnp.where(whole_LE > 0, whole_LE, 1), 0
  )
  return (each_LE * outputs.tokens_E).sum(-1) / jnp.maximum(
    outputs.tokens_E.sum(-1), 1
  )


_METRICS: dict[str, Callable[[RoutingStats], jax.Array]] = {
  "diversity": routing_diversity,
  "inter_fraction": inter_fraction,
  "max_violation": max_violation,
  "dead_experts": dead_experts,
  "load_evenness": load_evenness,
  "purity": clustering_purity,
  "normalized_mutual_information": normalized_mutual_information,
  "routing_variance": routing_variance,
  "expert_overlap": expert_overlap,
}
# These need the sums of the experts' outputs.
_OUTPUT_METRICS: dict[str, Callable[[RoutingStats], jax.Array]] = {
  "output_similarity": output_similarity,
  "silhouette": silhouette,
}
# These need the assignments by token.
_TOKEN_METRICS: dict[str, Callable[[RoutingStats], jax.Array]] = {
  "token_mutual_information": token_mutual_information,
}
# Training computes these at every logged step; evaluation computes all.
TRAINING_METRICS = (
  "diversity",
  "inter_fraction",
  "max_violation",
  "dead_experts",
  "load_evenness",
  "routing_variance",
)
# A mean over layers hides a single bad layer. These training metrics are
# reported by further figures over layers too.
_OVER_LAYERS: dict[str, dict[str, Callable[[jax.Array], jax.Array]]] = {
  "max_violation": {"median": jnp.median, "max": jnp.max},
  "dead_experts": {"max": jnp.max},
  "load_evenness": {"min": jnp.min},
}


def metrics_by_layer(
  stats: RoutingStats, names: Collection[str] | None = None
) -> dict[str, jax.Array]:
  """Computes routing metrics by name, each (L,).

  Args:
    stats: routing sums.
    names: which metrics; by default all that the sums allow, which includes
      those of the experts' outputs and of tokens only where these were summed.
  """
  metrics = dict(_METRICS)
  if stats.outputs is not None:
    metrics |= _OUTPUT_METRICS
  if stats.token_assignments_LVE is not None:
    metrics |= _TOKEN_METRICS
  names = metrics.keys() if names is None else names
  return {name: metrics[name](stats) for name in names}


def training_figures(
  stats: RoutingStats, first_layer: int = 0
) -> dict[str, jax.Array]:
  """Computes what a logged training step reports of routing.

  Args:
    stats: routing sums of the step.
    first_layer: number of the first mixture-of-experts layer.

  Returns:
    Float32 scalars: the mean over layers of each training metric, by its name;
    further figures over layers, as "max_violation/max"; and MaxVio of every
    layer, as "max_violation/layer_3".
  """
  by_layer = metrics_by_layer(stats, TRAINING_METRICS)
  figures = {name: values_L.mean() for name, values_L in by_layer.items()}
  for name, functions in _OVER_LAYERS.items():
    for over, function in functions.items():
      figures[f"{name}/{over}"] = function(by_layer[name])
  for layer, value in enumerate(by_layer["max_violation"], start=first_layer):
    figures[f"max_violation/layer_{layer}"] = value
  return figures
