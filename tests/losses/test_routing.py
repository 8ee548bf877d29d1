import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import LossesConfig
from edl_jax.losses import objective as losses
from edl_jax.losses import routing, routing_metrics

NUM_DOMAINS = 4


def entropy(p):
  p = np.asarray(p, np.float64)
  return -sum(x * math.log(x) for x in p.ravel() if x > 0)


def jensen_shannon(p, q):
  m = (p + q) / 2
  return entropy(m) - (entropy(p) + entropy(q)) / 2


@pytest.fixture(scope="module")
def batch():
  """Two layers, rows of three of four domains, one row of padding only."""
  random = np.random.default_rng(0)
  logits = random.standard_normal((2, 7, 5, 6)) * 1.5
  weights = (random.random((7, 5)) < 0.8).astype(np.float64)
  weights[4] = 0
  domain = np.array([0, 1, 1, 3, 0, 0, 3])
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expert = np.argsort(-probs, -1)[..., :2]
  gate = np.take_along_axis(probs, expert, -1)
  gate /= gate.sum(-1, keepdims=True)
  return logits, probs, expert, gate, weights, domain


def stats_of(batch, rows=slice(None), num_domains=NUM_DOMAINS):
  logits, probs, expert, gate, weights, domain = (
    jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else jnp.asarray(x)
    for x in batch
  )
  by_layer = [
    routing.row_routing(
      logits[layer, rows],
      probs[layer, rows],
      expert[layer, rows],
      gate[layer, rows],
      weights[rows],
    )
    for layer in range(2)
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *by_layer)
  return routing.collect(stacked, domain[rows], num_domains)


def sequences(batch, layer):
  """(domain, mean probabilities, mean token entropy) of each counted row."""
  _, probs, _, _, weights, domain = batch
  for b in range(len(domain)):
    tokens = [probs[layer, b, t] for t in range(5) if weights[b, t]]
    if tokens:
      yield domain[b], np.mean(tokens, 0), np.mean([entropy(p) for p in tokens])


def domain_means(batch, layer):
  means = {}
  for d in range(NUM_DOMAINS):
    own = [p for domain, p, _ in sequences(batch, layer) if domain == d]
    if own:
      means[d] = np.mean(own, 0)
  return means


def assignments(batch, layer):
  _, _, expert, _, weights, domain = batch
  table = np.zeros((NUM_DOMAINS, 6))
  for b in range(len(domain)):
    for t in range(5):
      for e in expert[layer, b, t]:
        table[domain[b], e] += weights[b, t]
  return table


def sparse_gates(batch, layer):
  """Routing weights over all experts of every counted token."""
  _, _, expert, gate, weights, _ = batch
  gates = []
  for b, t in zip(*np.nonzero(weights)):
    s = np.zeros(6)
    s[expert[layer, b, t]] = gate[layer, b, t]
    gates.append(s)
  return gates


def test_sums_against_loops(batch):
  logits, probs, *_, weights, _ = batch
  stats = stats_of(batch)
  for layer in range(2):
    rows = list(sequences(batch, layer))
    for d in range(NUM_DOMAINS):
      own = [(p, h) for domain, p, h in rows if domain == d]
      assert float(stats.sequences_LD[layer, d]) == len(own)
      np.testing.assert_allclose(
        stats.probability_LDE[layer, d],
        sum((p for p, _ in own), np.zeros(6)),
        rtol=1e-5,
      )
      assert float(stats.sequence_entropy_LD[layer, d]) == pytest.approx(
        sum(entropy(p) for p, _ in own), rel=1e-5
      )
      assert float(stats.token_entropy_LD[layer, d]) == pytest.approx(
        sum(h for _, h in own), rel=1e-5
      )
    np.testing.assert_array_equal(
      stats.assignments_LDE[layer], assignments(batch, layer)
    )
    np.testing.assert_allclose(
      stats.token_probability_LE[layer],
      np.einsum("bte,bt->e", probs[layer], weights),
      rtol=1e-5,
    )
    squared = np.log(np.exp(logits[layer]).sum(-1)) ** 2
    assert float(stats.squared_logsumexp_L[layer]) == pytest.approx(
      (squared * weights).sum(), rel=1e-5
    )
    assert float(stats.tokens_L[layer]) == weights.sum()
    np.testing.assert_allclose(
      stats.squared_probability_L[layer],
      ((probs[layer] ** 2).sum(-1) * weights).sum(),
      rtol=1e-5,
    )
    gates = sparse_gates(batch, layer)
    np.testing.assert_allclose(
      stats.gate_LE[layer], sum(gates), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      stats.squared_gate_LE[layer], sum(s**2 for s in gates), rtol=1e-5
    )


def test_stats_add_over_any_split_of_rows(batch):
  whole = stats_of(batch)
  parts = [stats_of(batch, np.array([i])) for i in (6, 0, 3, 4, 1, 5, 2)]
  total = jax.tree.map(lambda *x: sum(x), *parts)
  for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(whole)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_diversity_and_divergence_against_pairs(batch):
  stats = stats_of(batch)
  for layer in range(2):
    means = domain_means(batch, layer)
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
def test_decomposition_against_loops(batch, unit):
  total_L, inter_L = routing_metrics.diversity_decomposition(
    stats_of(batch), unit
  )
  for layer in range(2):
    rows = list(sequences(batch, layer))
    mean = np.mean([p for _, p, _ in rows], 0)
    units = [entropy(p) if unit == "sequence" else h for _, p, h in rows]
    means = domain_means(batch, layer)
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


def test_rows_without_a_domain_count_in_sums_over_all_rows_alone(batch):
  *layers, weights, domain = batch
  without = domain == 3
  assert without.any() and (weights[without] > 0).any()
  left_out = weights * ~without[:, None]
  unlabelled = stats_of((*layers, weights, np.where(without, -1, domain)))
  absent = stats_of((*layers, left_out, domain))
  labelled = stats_of(batch)
  # Bit by bit: by domain as if the rows were not there ...
  names = [name for name in unlabelled._fields if name != "outputs"]
  by_domain = [name for name in names if "_LD" in name]
  assert len(by_domain) == 5
  for name in names:
    got, gone, all_there = (
      np.asarray(getattr(stats, name))
      for stats in (unlabelled, absent, labelled)
    )
    # ... and in all else as if they had one.
    same, other = gone, all_there
    if name not in by_domain:
      same, other = all_there, gone
    np.testing.assert_array_equal(got, same, err_msg=name)
    assert not np.array_equal(got, other), name
  config = LossesConfig()
  np.testing.assert_array_equal(
    losses.divergence_loss(unlabelled, config),
    losses.divergence_loss(absent, config),
  )
  for scope in ("global", "sequence"):
    np.testing.assert_array_equal(
      losses.load_balance_loss(unlabelled, scope),
      losses.load_balance_loss(labelled, scope),
    )


def stats_of_domains(p_DE, assignments_DE=None) -> routing.RoutingStats:
  """One sequence a domain, with the given means."""
  p_DE = np.asarray(p_DE, np.float64)
  if assignments_DE is None:
    assignments_DE = p_DE
  zeros = jnp.zeros((1, len(p_DE)))
  return routing.RoutingStats(
    probability_LDE=jnp.asarray(p_DE, jnp.float32)[None],
    sequences_LD=zeros + 1,
    sequence_entropy_LD=jnp.array([[entropy(p) for p in p_DE]]),
    token_entropy_LD=zeros,
    assignments_LDE=jnp.asarray(assignments_DE, jnp.float32)[None],
    sequences_L=zeros.sum(-1) + len(p_DE),
    assignments_LE=jnp.asarray(assignments_DE, jnp.float32).sum(0)[None],
    sequence_balance_L=jnp.zeros(1),
    squared_probability_L=jnp.zeros(1),
    gate_LE=jnp.asarray(p_DE.sum(0), jnp.float32)[None],
    squared_gate_LE=jnp.asarray(p_DE.sum(0), jnp.float32)[None],
    token_probability_LE=jnp.asarray(p_DE.sum(0), jnp.float32)[None],
    squared_logsumexp_L=jnp.zeros(1),
    tokens_L=jnp.full(1, float(len(p_DE))),
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


def test_assignment_metrics_against_definitions(batch):
  stats = stats_of(batch)
  for layer in range(2):
    table = assignments(batch, layer)
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


def test_specialisation_metrics_against_definitions(batch):
  stats = stats_of(batch)
  for layer in range(2):
    gates = sparse_gates(batch, layer)
    assert float(
      routing_metrics.routing_variance(stats)[layer]
    ) == pytest.approx(np.mean([np.var(s) for s in gates]), rel=1e-5)
    table = assignments(batch, layer)
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


@pytest.fixture(scope="module")
def outputs():
  """Outputs of 3 of 5 experts for 40 tokens, a quarter not counted."""
  random = np.random.default_rng(3)
  expert_PA = np.stack([random.permutation(4)[:3] for _ in range(40)])
  centre_EM = random.standard_normal((5, 8))
  y_PAM = centre_EM[expert_PA] + random.standard_normal((40, 3, 8))
  weights_P = (random.random(40) < 0.75).astype(np.float64)
  return y_PAM, expert_PA, weights_P


def stats_of_outputs(outputs, form="paper"):
  y_PAM, expert_PA, weights_P = outputs
  return routing.output_stats(
    jnp.asarray(y_PAM, jnp.float32),
    jnp.asarray(expert_PA),
    jnp.asarray(weights_P, jnp.float32),
    5,
    form,
  )


def naive_projection(outputs, form):
  y_PAM, _, weights_P = outputs
  total = 0.0
  for y_AM in y_PAM[weights_P > 0]:
    active = len(y_AM)
    terms = []
    for j in range(active):
      rest = [y_AM[k] for k in range(active) if k != j]
      if form == "paper":
        for x in rest:
          terms.append(np.sum((y_AM[j] @ x / (x @ x + 1e-8) * x) ** 2))
      else:
        # The projection by least squares, not by Gram-Schmidt.
        basis = np.array(rest).T
        fitted = basis @ np.linalg.lstsq(basis, y_AM[j], rcond=None)[0]
        terms.append(np.sum(fitted**2))
    total += np.mean(terms)
  return total


@pytest.mark.parametrize("form", ["paper", "released"])
def test_projection_against_definitions(outputs, form):
  got = float(stats_of_outputs(outputs, form).projection)
  assert got == pytest.approx(naive_projection(outputs, form), rel=1e-4)
  # The gradient against a central difference along a random direction.
  y_PAM, *rest = outputs
  direction = np.random.default_rng(4).standard_normal(y_PAM.shape)
  slope = (
    sum(
      sign * naive_projection((y_PAM + sign * 1e-6 * direction, *rest), form)
      for sign in (1, -1)
    )
    / 2e-6
  )
  gradient = jax.grad(lambda y: stats_of_outputs((y, *rest), form).projection)(
    jnp.asarray(y_PAM, jnp.float32)
  )
  assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_projection_of_extremes(form):
  weights, expert = jnp.ones(1), jnp.array([[0, 1]])

  def projection(y):
    return routing.output_stats(y, expert, weights, 5, form).projection

  orthogonal = jnp.array([[[1.0, 0, 0], [0, 2, 0]]])
  parallel = jnp.array([[[1.0, 0, 0], [1, 0, 0]]])
  assert float(projection(orthogonal)) == 0
  assert float(projection(parallel)) == pytest.approx(1, rel=1e-5)
  for y in (orthogonal, parallel, jnp.zeros((1, 2, 3))):
    assert jnp.all(jnp.isfinite(jax.grad(projection)(y)))
  # One active expert has nothing to be orthogonal to.
  alone = routing.output_stats(
    jnp.ones((1, 1, 3)), jnp.zeros((1, 1), int), weights, 5, form
  )
  assert float(alone.projection) == 0 and float(alone.squared_cosine) == 0


def test_unknown_form_raises(outputs):
  with pytest.raises(ValueError, match="'papers': must be 'paper' or"):
    stats_of_outputs(outputs, "papers")


def test_output_metrics_against_definitions(outputs, batch):
  y_PAM, expert_PA, weights_P = outputs
  sums = jax.tree.map(lambda x: x[None], stats_of_outputs(outputs))
  stats = stats_of(batch)._replace(
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
