"""Sums of routing statistics against loops in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import LossesConfig
from edl_jax.losses import objective as losses
from edl_jax.losses import routing
from edl_jax.losses.objective import LossContext
from tests.losses.routing_cases import (
  BATCH,
  NUM_DOMAINS,
  OUTPUTS,
  assignments,
  entropy,
  sequences,
  sparse_gates,
  stats_of,
  stats_of_outputs,
)


def test_sums_against_loops():
  logits, probs, *_, weights, _ = BATCH
  stats = stats_of(BATCH)
  for layer in range(2):
    rows = list(sequences(BATCH, layer))
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
      stats.assignments_LDE[layer], assignments(BATCH, layer)
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
    gates = sparse_gates(BATCH, layer)
    np.testing.assert_allclose(
      stats.gate_LE[layer], sum(gates), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      stats.squared_gate_LE[layer], sum(s**2 for s in gates), rtol=1e-5
    )


def test_stats_add_over_any_split_of_rows():
  whole = stats_of(BATCH)
  parts = [stats_of(BATCH, np.array([i])) for i in (6, 0, 3, 4, 1, 5, 2)]
  total = jax.tree.map(lambda *x: sum(x), *parts)
  for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(whole)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_rows_without_a_domain_count_in_sums_over_all_rows_alone():
  *layers, weights, domain = BATCH
  without = domain == 3
  assert without.any() and (weights[without] > 0).any()
  left_out = weights * ~without[:, None]
  unlabelled = stats_of((*layers, weights, np.where(without, -1, domain)))
  absent = stats_of((*layers, left_out, domain))
  labelled = stats_of(BATCH)
  # Bit by bit: by domain as if the rows were not there ...
  on_demand = ("outputs", "token_pairs_L22", "token_assignments_LVE")
  names = [name for name in unlabelled._fields if name not in on_demand]
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
  for scope in ("global", "sequence"):
    context = LossContext(LossesConfig(balance_scope=scope))
    np.testing.assert_array_equal(
      losses.divergence_loss(unlabelled, context),
      losses.divergence_loss(absent, context),
    )
    np.testing.assert_array_equal(
      losses.load_balance_loss(unlabelled, context),
      losses.load_balance_loss(labelled, context),
    )


def naive_projection(outputs, form):
  y_PAM, _, _, weights_P = outputs
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
def test_projection_against_definitions(form):
  got = float(stats_of_outputs(OUTPUTS, form).projection)
  assert got == pytest.approx(naive_projection(OUTPUTS, form), rel=1e-4)
  # The gradient against a central difference along a random direction.
  y_PAM, *rest = OUTPUTS
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
  gate = jnp.array([[0.7, 0.3]])

  def projection(y):
    return routing.output_stats(y, expert, gate, weights, 5, form).projection

  orthogonal = jnp.array([[[1.0, 0, 0], [0, 2, 0]]])
  parallel = jnp.array([[[1.0, 0, 0], [1, 0, 0]]])
  assert float(projection(orthogonal)) == 0
  assert float(projection(parallel)) == pytest.approx(1, rel=1e-5)
  for y in (orthogonal, parallel, jnp.zeros((1, 2, 3))):
    assert jnp.all(jnp.isfinite(jax.grad(projection)(y)))
  # One active expert has nothing to be orthogonal to.
  alone = routing.output_stats(
    jnp.ones((1, 1, 3)),
    jnp.zeros((1, 1), int),
    jnp.ones((1, 1)),
    weights,
    5,
    form,
  )
  assert float(alone.projection) == 0 and float(alone.squared_cosine) == 0


def test_gated_norms_against_a_loop():
  norms = np.zeros(5)
  for y_AM, expert_A, gate_A, counted in zip(*OUTPUTS):
    for y_M, expert, gate in zip(y_AM, expert_A, gate_A):
      norms[expert] += counted * gate * np.linalg.norm(y_M)
  got = stats_of_outputs(OUTPUTS).gated_norm_E
  np.testing.assert_allclose(got, norms, rtol=1e-5)


def test_unknown_form_raises():
  with pytest.raises(ValueError, match="'papers': must be 'paper' or"):
    stats_of_outputs(OUTPUTS, "papers")
