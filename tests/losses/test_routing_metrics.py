"""Routing metrics against their definitions in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.losses import routing, routing_metrics
from tests.losses.routing_cases import (
  BATCH,
  NUM_DOMAINS,
  OUTPUTS,
  assignments,
  domain_means,
  entropy,
  jensen_shannon,
  sequences,
  sparse_gates,
  stats_of,
  stats_of_outputs,
)


def test_diversity_and_divergence_against_pairs():
  stats = stats_of(BATCH)
  for layer in range(2):
    means = domain_means(BATCH, layer)
    table = np.zeros((NUM_DOMAINS, NUM_DOMAINS))
    for j, p in means.items():
      for k, q in means.items():
        table[j, k] = jensen_shannon(p, q)
    np.testing.assert_allclose(
      routing_metrics.pairwise_divergence(stats)[layer],
      table,
      rtol=1e-4,
      atol=1e-7,
    )
    pairs = [table[j, k] for j in means for k in means if j < k]
    assert float(
      routing_metrics.routing_diversity(stats)[layer]
    ) == pytest.approx(np.mean(pairs) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_decomposition_against_loops(unit):
  total_L, inter_L = routing_metrics.diversity_decomposition(
    stats_of(BATCH), unit
  )
  for layer in range(2):
    rows = list(sequences(BATCH, layer))
    mean = np.mean([p for _, p, _ in rows], 0)
    units = [entropy(p) if unit == "sequence" else h for _, p, h in rows]
    means = domain_means(BATCH, layer)
    shares = {d: np.mean([domain == d for domain, _, _ in rows]) for d in means}
    assert float(total_L[layer]) == pytest.approx(
      entropy(mean) - np.mean(units), rel=1e-4
    )
    assert float(inter_L[layer]) == pytest.approx(
      entropy(mean) - sum(shares[d] * entropy(p) for d, p in means.items()),
      rel=1e-4,
    )
    assert 0 <= inter_L[layer] <= total_L[layer]


def test_inter_part_is_exact_where_domains_are_close():
  p = np.full((2, 64), 1 / 64)
  p[0, :32] *= 1 + 1e-4
  p[0, 32:] *= 1 - 1e-4
  empty = stats_of_domains(p)
  _, inter_L = routing_metrics.diversity_decomposition(empty)
  # For two equal shares D_inter is the JSD, about mean d^2 / 8.
  assert float(inter_L[0]) == pytest.approx(1e-8 / 8, rel=1e-3)


def stats_of_domains(p_DE, assignments_DE=None) -> routing.RoutingStats:
  """One sequence a domain, with the given means."""
  p_DE = np.asarray(p_DE, np.float64)
  if assignments_DE is None:
    assignments_DE = p_DE
  zeros = jnp.zeros((1, len(p_DE)))
  stats = routing.RoutingStats(
    *[zeros[:, 0]] * len(routing.RoutingStats._fields)
  )
  assignments_DE = jnp.asarray(assignments_DE, jnp.float32)
  return stats._replace(
    probability_LDE=jnp.asarray(p_DE, jnp.float32)[None],
    sequences_LD=zeros + 1,
    sequence_entropy_LD=jnp.array([[entropy(p) for p in p_DE]]),
    token_entropy_LD=zeros,
    assignments_LDE=assignments_DE[None],
    assignments_LE=assignments_DE.sum(0)[None],
    outputs=None,
    token_pairs_L22=None,
  )


def test_disjoint_and_equal_domains_are_the_extremes():
  disjoint = stats_of_domains(np.eye(4))
  assert float(routing_metrics.routing_diversity(disjoint)[0]) == pytest.approx(
    1
  )
  assert float(routing_metrics.inter_fraction(disjoint)[0]) == pytest.approx(1)
  assert float(routing_metrics.clustering_purity(disjoint)[0]) == 1
  assert float(
    routing_metrics.normalized_mutual_information(disjoint)[0]
  ) == pytest.approx(1)
  assert float(routing_metrics.max_violation(disjoint)[0]) == 0

  equal = stats_of_domains(np.full((4, 4), 0.25))
  assert float(routing_metrics.routing_diversity(equal)[0]) == 0
  assert float(routing_metrics.inter_fraction(equal)[0]) == 0
  assert float(routing_metrics.clustering_purity(equal)[0]) == 0.25
  assert float(
    routing_metrics.normalized_mutual_information(equal)[0]
  ) == pytest.approx(0, abs=1e-6)


def test_assignment_metrics_against_definitions():
  stats = stats_of(BATCH)
  for layer in range(2):
    table = assignments(BATCH, layer)
    load = table.sum(0)
    assert float(routing_metrics.max_violation(stats)[layer]) == pytest.approx(
      load.max() / load.mean() - 1, rel=1e-5
    )
    assert float(
      routing_metrics.clustering_purity(stats)[layer]
    ) == pytest.approx(
      sum(table[:, e].max() for e in range(6)) / table.sum(), rel=1e-5
    )
    joint = table / table.sum()
    domain, expert = joint.sum(1), joint.sum(0)
    information = sum(
      joint[d, e] * math.log(joint[d, e] / domain[d] / expert[e])
      for d in range(NUM_DOMAINS)
      for e in range(6)
      if joint[d, e]
    )
    want = information / ((entropy(domain) + entropy(expert)) / 2)
    assert float(
      routing_metrics.normalized_mutual_information(stats)[layer]
    ) == pytest.approx(want, rel=1e-4)


def with_dead_experts():
  """The batch, but its first layer sends all tokens to three of six experts."""
  logits, probs, expert, gate, weights, domain = BATCH
  expert = expert.copy()
  expert[0] %= 3
  return logits, probs, expert, gate, weights, domain


def test_load_metrics_against_definitions():
  stats = stats_of(with_dead_experts())
  dead_L, even_L = (
    routing_metrics.dead_experts(stats),
    routing_metrics.load_evenness(stats),
  )
  for layer in range(2):
    load = assignments(with_dead_experts(), layer).sum(0)
    assert float(dead_L[layer]) == pytest.approx(sum(load == 0) / 6)
    assert float(even_L[layer]) == pytest.approx(
      math.exp(entropy(load / load.sum())) / 6, rel=1e-5
    )
  assert dead_L[0] == 0.5 and dead_L[1] == 0 and even_L[0] <= 0.5 < even_L[1]


def test_extremes_of_load_metrics():
  even = stats_of_domains(np.full((2, 4), 0.25))
  assert float(routing_metrics.dead_experts(even)[0]) == 0
  assert float(routing_metrics.load_evenness(even)[0]) == pytest.approx(1)
  one = stats_of_domains(np.eye(4)[[0, 0]])
  assert float(routing_metrics.dead_experts(one)[0]) == 0.75
  assert float(routing_metrics.load_evenness(one)[0]) == pytest.approx(0.25)


def test_training_figures_are_of_all_layers():
  stats = stats_of(with_dead_experts())
  by_layer = routing_metrics.metrics_by_layer(stats)
  figures = routing_metrics.training_figures(stats, first_layer=2)
  violation, dead, even = (
    np.asarray(by_layer[name], np.float64)
    for name in ("max_violation", "dead_experts", "load_evenness")
  )
  want = {
    name: np.mean(np.asarray(by_layer[name], np.float64))
    for name in routing_metrics.TRAINING_METRICS
  } | {
    "max_violation/median": sorted(violation)[0] / 2 + sorted(violation)[1] / 2,
    "max_violation/max": max(violation),
    "dead_experts/max": max(dead),
    "load_evenness/min": min(even),
    "max_violation/layer_2": violation[0],
    "max_violation/layer_3": violation[1],
  }
  assert figures.keys() == want.keys()
  for name, value in want.items():
    assert float(figures[name]) == pytest.approx(value, rel=1e-6), name
  assert len(set(map(float, violation))) == 2


def test_specialisation_metrics_against_definitions():
  stats = stats_of(BATCH)
  for layer in range(2):
    gates = sparse_gates(BATCH, layer)
    assert float(
      routing_metrics.routing_variance(stats)[layer]
    ) == pytest.approx(np.mean([np.var(s) for s in gates]), rel=1e-5)
    table = assignments(BATCH, layer)
    profiles = [column / column.sum() for column in table.T if column.sum()]
    shared = [
      np.minimum(profiles[i], profiles[j]).sum()
      for i in range(len(profiles))
      for j in range(i)
    ]
    assert float(routing_metrics.expert_overlap(stats)[layer]) == pytest.approx(
      np.mean(shared), rel=1e-5
    )


def test_overlap_of_disjoint_equal_and_idle_experts():
  assert (
    float(routing_metrics.expert_overlap(stats_of_domains(np.eye(4)))[0]) == 0
  )
  equal = stats_of_domains(np.full((3, 4), 0.25))
  assert float(routing_metrics.expert_overlap(equal)[0]) == pytest.approx(1)
  idle = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
  overlap = routing_metrics.expert_overlap(stats_of_domains(idle, 100 * idle))
  assert float(overlap[0]) == pytest.approx(1)


def test_output_metrics_against_definitions():
  y_PAM, expert_PA, _, weights_P = OUTPUTS
  sums = jax.tree.map(lambda x: x[None], stats_of_outputs(OUTPUTS))
  stats = stats_of(BATCH)._replace(
    outputs=sums, tokens_L=jnp.full(1, weights_P.sum())
  )
  counted = [p for p in range(40) if weights_P[p]]
  cosines = [
    (y_PAM[p, j] @ y_PAM[p, k]) ** 2
    / (y_PAM[p, j] @ y_PAM[p, j])
    / (y_PAM[p, k] @ y_PAM[p, k])
    for p in counted
    for j in range(3)
    for k in range(j)
  ]
  assert float(routing_metrics.output_similarity(stats)[0]) == pytest.approx(
    np.mean(cosines), rel=1e-5
  )
  clusters = [
    [y_PAM[p, a] for p in counted for a in range(3) if expert_PA[p, a] == e]
    for e in range(5)
  ]
  assert not clusters[4]
  centres = [np.mean(cluster, 0) for cluster in clusters[:4]]
  values = []
  for e in range(4):
    own, *others = (
      np.mean([np.sum((y - centres[f]) ** 2) for y in clusters[e]])
      for f in (e, *(f for f in range(4) if f != e))
    )
    values += [(min(others) - own) / max(min(others), own)] * len(clusters[e])
  assert float(routing_metrics.silhouette(stats)[0]) == pytest.approx(
    np.mean(values), rel=1e-4
  )


def test_token_information_needs_assignments_by_token():
  stats = stats_of(BATCH)
  assert "token_mutual_information" not in routing_metrics.metrics_by_layer(
    stats
  )
  with pytest.raises(ValueError, match="not counted by token"):
    routing_metrics.token_mutual_information(stats)
