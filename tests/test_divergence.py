import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edl_jax.divergence import (
  LN_2,
  domain_routing,
  expert_divergence_loss,
  jensen_shannon,
  pairwise_jensen_shannon,
)


def exact_jensen_shannon(p, q) -> float:
  """JSD in 50-digit arithmetic, by its definition."""
  with decimal.localcontext() as context:
    context.prec = 50
    total = decimal.Decimal(0)
    for a, b in zip(map(float, p), map(float, q)):
      a, b = decimal.Decimal(a), decimal.Decimal(b)
      m = (a + b) / 2
      total += a * (a / m).ln() / 2 if a else 0
      total += b * (b / m).ln() / 2 if b else 0
    return float(total)


def near_pair(divergence: float, num_experts: int, seed: int):
  """float32 distributions whose JSD is about `divergence`."""
  random = np.random.default_rng(seed)
  p = random.dirichlet(np.full(num_experts, 2.0))
  direction = random.standard_normal(num_experts)
  direction -= direction.mean()
  # JSD is about sum d^2 / (8 p) for small d.
  scale = math.sqrt(8 * divergence / np.sum(direction**2 / p))
  q = np.abs(p + scale * direction)
  return p.astype(np.float32), (q / q.sum()).astype(np.float32)


@pytest.mark.parametrize("num_experts", [2, 64, 512])
@pytest.mark.parametrize("divergence", [1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 0.1])
def test_value_against_fifty_digits(num_experts, divergence):
  for seed in range(5):
    p, q = near_pair(divergence, num_experts, seed)
    want = exact_jensen_shannon(p, q)
    assert float(jax.jit(jensen_shannon)(p, q)) == pytest.approx(want, rel=1e-5)


def test_textbook_forms_fail_where_the_loss_is_steepest():
  """Why the stable form is used: METHOD's figures, reproduced in float32."""
  p, q = near_pair(1.4e-7, 64, 0)
  want = exact_jensen_shannon(p, q)
  m = (p + q) / 2

  def entropy(x):
    return -jnp.sum(x * jnp.log(x))

  entropy_form = float(entropy(m) - (entropy(p) + entropy(q)) / 2)
  assert abs(entropy_form - want) > 0.3 * want
  assert float(jensen_shannon(p, q)) == pytest.approx(want, rel=1e-5)


def test_gradient_against_closed_form():
  for divergence in (1e-11, 1e-7, 1e-3, 0.3):
    p, q = near_pair(divergence, 64, 3)
    # log(2p/(p+q))/2 in float64, from the float32 inputs.
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    want = np.log1p((p64 - q64) / (p64 + q64)) / 2
    got = np.asarray(jax.grad(jensen_shannon)(p, q))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)


def test_equal_is_exactly_zero_and_disjoint_is_ln_2():
  p = jnp.array([0.3, 0.7, 0.0, 0.0])
  assert float(jensen_shannon(p, p)) == 0.0
  assert not jnp.any(jax.grad(jensen_shannon)(p, p))
  q = jnp.array([0.0, 0.0, 0.5, 0.5])
  assert float(jensen_shannon(p, q)) == pytest.approx(LN_2, rel=1e-6)


# Compiled once for each length.
compiled = jax.jit(jensen_shannon)
compiled_gradient = jax.jit(jax.grad(jensen_shannon, (0, 1)))
compiled_second = jax.jit(
  jax.grad(lambda p, q: jnp.sum(jax.grad(jensen_shannon)(p, q) ** 2), (0, 1))
)

pairs = st.sampled_from([2, 7, 40]).flatmap(
  lambda n: st.tuples(
    *[
      st.lists(
        st.one_of(st.just(0.0), st.floats(1e-30, 1.0)), min_size=n, max_size=n
      ).filter(lambda x: sum(x) > 0)
    ]
    * 2
  )
)


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_any_pair_is_bounded_symmetric_and_finite(pair):
  p, q = (np.asarray(np.asarray(x) / np.sum(x), np.float32) for x in pair)
  value = float(compiled(p, q))
  assert 0 <= value <= LN_2 * (1 + 1e-5)
  assert value == float(compiled(q, p))
  assert value == pytest.approx(exact_jensen_shannon(p, q), rel=1e-5, abs=1e-30)
  order = np.random.default_rng(0).permutation(len(p))
  assert float(compiled(p[order], q[order])) == pytest.approx(value, rel=1e-5)
  for derivative in (compiled_gradient, compiled_second):
    assert np.all(np.isfinite(derivative(p, q)))


def test_pairwise_equals_pairs_when_tiled(monkeypatch):
  p_DE = np.random.default_rng(0).dirichlet(np.ones(8), 13).astype(np.float32)

  def value_and_gradient():
    return jax.value_and_grad(
      lambda p: expert_divergence_loss(p, jnp.ones(13))
    )(p_DE)

  whole, whole_gradient = value_and_gradient()
  monkeypatch.setattr("edl_jax.divergence._TILE_ELEMENTS", 13 * 8 * 3)
  table = pairwise_jensen_shannon(p_DE)
  for j in range(13):
    for k in range(13):
      want = exact_jensen_shannon(p_DE[j], p_DE[k])
      assert float(table[j, k]) == pytest.approx(want, rel=1e-5)
  tiled, tiled_gradient = value_and_gradient()
  assert tiled == pytest.approx(float(whole), rel=1e-6)
  np.testing.assert_allclose(tiled_gradient, whole_gradient, rtol=1e-4)


def test_domain_routing_against_loops():
  random = np.random.default_rng(1)
  probs = random.dirichlet(np.ones(5), (6, 7))
  weights = (random.random((6, 7)) < 0.7).astype(np.float64)
  weights[2] = 0
  domain = np.array([0, 2, 2, 0, 3, 3])
  p_DE, count_D = domain_routing(probs, weights, domain, 5)
  for d in range(5):
    rows = [b for b in range(6) if domain[b] == d and weights[b].any()]
    assert int(count_D[d]) == len(rows)
    want = np.zeros(5)
    for b in rows:
      want += (probs[b] * weights[b][:, None]).sum(0) / weights[b].sum()
    np.testing.assert_allclose(p_DE[d], want / max(1, len(rows)), rtol=1e-5)


def test_loss_against_loops_and_absent_domains():
  random = np.random.default_rng(2)
  p_DE = random.dirichlet(np.ones(6), 5).astype(np.float32)
  p_DE[3] = 0
  present = np.array([1, 1, 1, 0, 1])
  losses = [
    -math.log(exact_jensen_shannon(p_DE[j], p_DE[k]) + 1e-8)
    for j in range(5)
    for k in range(j)
    if present[j] and present[k]
  ]
  loss, gradient = jax.value_and_grad(expert_divergence_loss)(p_DE, present)
  assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
  assert jnp.all(jnp.isfinite(gradient)) and not jnp.any(gradient[3])


@pytest.mark.parametrize("present", [[0, 0, 0], [0, 1, 0]])
def test_fewer_than_two_domains_is_exactly_zero(present):
  p_DE = jnp.array([[0.0, 0.0], [0.2, 0.8], [0.0, 0.0]])
  loss, gradient = jax.value_and_grad(expert_divergence_loss)(
    p_DE, jnp.array(present)
  )
  assert float(loss) == 0.0
  assert not jnp.any(gradient)


def test_collapsed_routing_has_a_finite_gradient():
  p_DE = jnp.full((3, 4), 0.25)
  loss, gradient = jax.value_and_grad(expert_divergence_loss)(p_DE, jnp.ones(3))
  assert float(loss) == pytest.approx(-math.log(1e-8), rel=1e-6)
  assert jnp.all(jnp.isfinite(gradient))
