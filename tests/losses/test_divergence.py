import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.divergence_accuracy import (
  exact_jensen_shannon,
  largest_errors,
  near_pair,
)
from edl_jax.losses import divergence as module
from edl_jax.losses.divergence import (
  DIVERGENCES,
  LN_2,
  domain_routing,
  expert_divergence_loss,
  hierarchical_divergence_loss,
  jensen_shannon,
  pairwise_jensen_shannon,
)
from tests.losses.programs import largest_array

FUNCTIONS = {name: getattr(module, name) for name in DIVERGENCES}


def derivatives(function, p, q):
  """The value, the gradient, and that of a function of the gradient."""

  def slope(p, q):
    value, gradient = jax.value_and_grad(function, (0, 1))(p, q)
    return jnp.sum(gradient[0] ** 2), (value, gradient)

  second, (value, gradient) = jax.grad(slope, (0, 1), has_aux=True)(p, q)
  return value, gradient, second


# All divergences in one program, compiled once for each shape.
@jax.jit
def values(p, q):
  return {name: function(p, q) for name, function in FUNCTIONS.items()}


@jax.jit
def everything(p, q):
  return {name: derivatives(f, p, q) for name, f in FUNCTIONS.items()}


compiled_jensen_shannon = jax.jit(jensen_shannon)


def reference(name: str, p, q) -> float:
  """The definition of each divergence in float64."""
  p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
  if name == "jensen_shannon":
    return exact_jensen_shannon(p, q)
  if name == "hellinger":
    return math.sqrt(sum((a**0.5 - b**0.5) ** 2 for a, b in zip(p, q)) / 2)
  if name == "total_variation":
    return sum(abs(a - b) for a, b in zip(p, q)) / 2
  if name == "symmetric_kl":
    p, q = np.maximum(p, 1e-12), np.maximum(q, 1e-12)
    return sum((a - b) * math.log(a / b) for a, b in zip(p, q))
  return sum(abs(p[:e].sum() - q[:e].sum()) for e in range(1, len(p))) / (
    len(p) - 1
  )


def reference_loss(p_DE, present, name="jensen_shannon", eps=1e-8):
  """The loss in float64, pair by pair."""
  domains = [d for d in range(len(p_DE)) if present[d]]
  losses = [
    -math.log(reference(name, p_DE[j], p_DE[k]) + eps)
    for j in domains
    for k in domains
    if j < k
  ]
  return float(np.mean(losses)) if losses else 0.0


def central_differences(function, p, step=1e-6) -> np.ndarray:
  """The gradient of a function of float64 rows along which no mass is made.

  Mass moves between an expert and the next, so that rows remain distributions.
  """
  p = np.asarray(p, np.float64)
  slopes = np.zeros((len(p), p.shape[1] - 1))
  for row, expert in np.ndindex(slopes.shape):
    moved = np.zeros_like(p)
    moved[row, expert], moved[row, expert + 1] = step, -step
    slopes[row, expert] = (function(p + moved) - function(p - moved)) / 2 / step
  return slopes


@st.composite
def distributions(draw, size=7):
  weight = st.one_of(st.just(0.0), st.floats(1e-30, 1.0))
  row = draw(
    st.lists(weight, min_size=size, max_size=size).filter(lambda x: sum(x) > 0)
  )
  return np.asarray(np.asarray(row) / np.sum(row), np.float32)


pairs = st.tuples(distributions(), distributions())


@pytest.mark.parametrize("num_experts", [2, 64, 512])
@pytest.mark.parametrize("divergence", [1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 0.1])
def test_value_against_fifty_digits(num_experts, divergence):
  for seed in range(3):
    p, q = near_pair(divergence, num_experts, seed)
    got = float(compiled_jensen_shannon(p, q))
    assert got == pytest.approx(exact_jensen_shannon(p, q), rel=1e-5)


def test_textbook_forms_fail_where_the_loss_is_steepest():
  """Why the stable form is used; `benchmarks/divergence_accuracy.py`."""
  near = largest_errors(1.4e-7)
  assert near["entropy"] > 0.3
  assert near["Kullback-Leibler"] > 0.01
  assert near["edl_jax"] < 1e-5
  nearer = largest_errors(1e-9)
  assert min(nearer["entropy"], nearer["Kullback-Leibler"]) > 1
  assert nearer["edl_jax"] < 1e-5


def test_gradient_against_closed_form():
  for divergence in (1e-11, 1e-7, 1e-3, 0.3):
    p, q = near_pair(divergence, 64, 3)
    # log(2p/(p+q))/2 in float64, from the float32 inputs.
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    want = np.log1p((p64 - q64) / (p64 + q64)) / 2
    got = np.asarray(jax.jit(jax.grad(jensen_shannon))(p, q))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)


def test_equal_is_exactly_zero_without_a_gradient():
  p = np.array([0.3, 0.0, 0.7, 0.0, 0, 0, 0], np.float32)
  for value, gradient, _ in everything(p, p).values():
    assert float(value) == 0
    assert not np.any(gradient)


def test_disjoint_is_the_largest():
  p, q = np.eye(7, dtype=np.float32)[[0, 6]]
  got = everything(p, q)
  largest = {
    "jensen_shannon": LN_2,
    "hellinger": 1,
    "total_variation": 1,
    "symmetric_kl": 2 * math.log(1e12),
    "wasserstein": 1,
  }
  for name, want in largest.items():
    assert float(got[name][0]) == pytest.approx(want, rel=1e-6)
  lowest = float(got["jensen_shannon"][1][0][6])
  assert lowest == pytest.approx(-43.7, abs=0.1)


@settings(max_examples=80, deadline=None)
@given(pairs)
def test_any_pair_is_exact_bounded_symmetric_and_finite(pair):
  p, q = pair
  swapped = values(q, p)
  order = np.random.default_rng(0).permutation(len(p))
  permuted = values(p[order], q[order])
  for name, (value, *slopes) in everything(p, q).items():
    value = float(value)
    largest = {"jensen_shannon": LN_2, "symmetric_kl": 55.3}.get(name, 1)
    assert 0 <= value <= largest * (1 + 1e-5)
    assert value == pytest.approx(float(swapped[name]), rel=1e-5)
    # Roots of probabilities below 1e-16, and sums of what cancels, are lost.
    absolute = {"jensen_shannon": 1e-30, "hellinger": 1e-7}.get(name, 1e-6)
    want = reference(name, p, q)
    assert value == pytest.approx(want, rel=1e-5, abs=absolute)
    assert value > 0 or want <= absolute
    if name != "wasserstein":
      assert float(permuted[name]) == pytest.approx(value, rel=1e-5)
    assert all(np.all(np.isfinite(x)) for x in slopes)


def test_finite_with_subnormals():
  row = np.array([0, 1e-45, 1e-39, 2e-38, 1e-20, 1e-12, 1], np.float32)
  p_NE = np.stack([np.roll(row, shift) for shift in range(7)])
  p_NE = np.concatenate([p_NE, np.eye(7, dtype=np.float32)])
  for p in p_NE:
    for q in p_NE:
      for x in jax.tree.leaves(everything(p, q)):
        assert np.all(np.isfinite(x))


def test_vmap():
  rows = np.random.default_rng(7).dirichlet(np.full(7, 0.5), (2, 4))
  p, q = rows.astype(np.float32)
  for name, got in jax.vmap(values)(p, q).items():
    want = [reference(name, *pair) for pair in zip(p, q)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[distributions()] * 4), st.floats(0, 1, width=32))
def test_jointly_convex(rows, share):
  p, q, r, s = rows
  first, second = values(p, q), values(r, s)
  mixed = values(share * p + (1 - share) * r, share * q + (1 - share) * s)
  for name in ("jensen_shannon", "total_variation", "symmetric_kl"):
    chord = share * first[name] + (1 - share) * second[name]
    assert float(mixed[name]) <= float(chord) * (1 + 1e-5) + 1e-6


def test_gradients_against_central_differences():
  rows = np.random.default_rng(5).dirichlet(np.full(7, 3.0), 2)
  rows = rows.astype(np.float32)
  for name, (_, gradient, _) in everything(*rows).items():
    got = np.asarray(gradient)
    want = central_differences(lambda x, name=name: reference(name, *x), rows)
    np.testing.assert_allclose(
      got[:, :-1] - got[:, 1:], want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_computed_in_float32(dtype):
  p, q = (jnp.asarray(x, dtype) for x in near_pair(1e-2, 7, 0))
  for name, value in values(p, q).items():
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(reference(name, p, q), rel=1e-5)
  gradient = jax.jit(jax.grad(jensen_shannon))(p, q)
  assert gradient.dtype == dtype and np.all(np.isfinite(gradient))


def test_float64():
  rows = np.random.default_rng(6).dirichlet(np.full(7, 3.0), 2)
  with jax.enable_x64(True):
    for name, value in values(*rows).items():
      assert value.dtype == jnp.float64
      assert float(value) == pytest.approx(reference(name, *rows), rel=1e-12)
    gradient = jax.jit(jax.grad(jensen_shannon))(*rows)
    want = np.log(2 * rows[0] / (rows[0] + rows[1])) / 2
    np.testing.assert_allclose(gradient, want, rtol=1e-12)


def test_pairwise_equals_pairs_when_tiled(monkeypatch):
  p_DE = np.random.default_rng(0).dirichlet(np.ones(8), 13).astype(np.float32)
  weight_DD = np.random.default_rng(1).random((13, 13)).astype(np.float32)

  def run():
    def total(p_DE):
      table = pairwise_jensen_shannon(p_DE)
      return jnp.sum(weight_DD * table), table

    return jax.jit(jax.grad(total, has_aux=True))(p_DE)

  whole, _ = run()
  monkeypatch.setattr(module, "_TILE_ELEMENTS", 13 * 8 * 3)
  tiled, table = run()
  for j, k in np.ndindex(13, 13):
    want = exact_jensen_shannon(p_DE[j], p_DE[k])
    assert float(table[j, k]) == pytest.approx(want, rel=1e-5)
  np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(
  "domain",
  [
    np.array([0, -1, 2, 7]),
    np.array([0, 2**40, 2, 7]),
    jnp.array([0, 3, 2, 7]),
  ],
)
def test_domain_label_out_of_range_is_refused(domain):
  probs, weights = jnp.full((4, 2, 3), 1 / 3), jnp.ones((4, 2))
  message = rf"domain label {int(domain[1])} is not in \[0, 3\)"
  with pytest.raises(ValueError, match=message):
    domain_routing(probs, weights, domain, 3)
  # Known while another function is traced, too.
  with pytest.raises(ValueError, match=message):
    jax.jit(lambda x: domain_routing(x, weights, domain, 3))(probs)


def test_traced_domain_label_out_of_range_counts_nowhere():
  probs, weights = jnp.full((4, 2, 3), 1 / 3), jnp.ones((4, 2))
  route = jax.jit(lambda domain: domain_routing(probs, weights, domain, 3))
  _, count_D = route(jnp.array([0, -1, 2, 7]))
  np.testing.assert_array_equal(count_D, [1, 0, 1])


@jax.jit
def all_losses(p_DE, present_D):
  """Every loss, its gradient, and that of a function of the gradient."""
  results = {}
  for name in DIVERGENCES:

    def loss(p, name=name):
      return expert_divergence_loss(p, present_D, divergence=name)

    def slope(p, loss=loss):
      value, gradient = jax.value_and_grad(loss)(p)
      return jnp.sum(jnp.sin(gradient)), (value, gradient)

    # The gradients of the others hold no derivative of a divergence.
    if name in ("jensen_shannon", "hellinger", "symmetric_kl"):
      second, first = jax.grad(slope, has_aux=True)(p_DE)
      results[name] = (*first, second)
    else:
      results[name] = jax.value_and_grad(loss)(p_DE)
  return results


def check_loss(loss, gradient, p_DE, present, name):
  """Against loops, with domain 3 absent."""

  def want(p):
    return reference_loss(p, present, name)

  assert float(loss) == pytest.approx(want(p_DE), rel=1e-5, abs=1e-5)
  assert not np.any(gradient[3])
  gradient = np.asarray(gradient)
  np.testing.assert_allclose(
    gradient[:, :-1] - gradient[:, 1:],
    central_differences(want, p_DE),
    rtol=1e-3,
    atol=1e-4,
  )


def five_domains():
  p_DE = np.random.default_rng(2).dirichlet(np.full(5, 3.0), 5)
  p_DE[3] = 0
  return p_DE.astype(np.float32), np.array([1, 1, 1, 0, 1])


def test_loss_and_gradient_against_loops_with_an_absent_domain():
  p_DE, present_D = five_domains()
  for name, (loss, gradient, *_) in all_losses(p_DE, present_D).items():
    check_loss(loss, gradient, p_DE, present_D, name)


def test_tiled_loss_equals_untiled(monkeypatch):
  random = np.random.default_rng(3)
  p_DE = random.dirichlet(np.ones(6), 11).astype(np.float32)
  present_D = random.random(11) < 0.8

  def run():
    return jax.jit(
      jax.value_and_grad(lambda p: expert_divergence_loss(p, present_D))
    )(p_DE)

  whole, whole_gradient = run()
  # Four tiles of 3 domains, the last with one for padding.
  monkeypatch.setattr(module, "_TILE_ELEMENTS", 9 * 6)
  tiled, tiled_gradient = run()
  assert float(tiled) == pytest.approx(float(whole), rel=1e-6)
  np.testing.assert_allclose(
    tiled_gradient, whole_gradient, rtol=1e-4, atol=1e-6
  )


def test_memory_does_not_grow_with_pairs(monkeypatch):
  """O(D E) and a tile: no array of D * D elements, and gigabytes are far."""

  def program(num_domains, num_experts):
    shape = jax.ShapeDtypeStruct((num_domains, num_experts), jnp.float32)
    return jax.jit(jax.value_and_grad(expert_divergence_loss)).trace(
      shape, jax.ShapeDtypeStruct((num_domains,), jnp.float32)
    )

  compiled = program(4096, 64).lower().compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1 << 28
  monkeypatch.setattr(module, "_TILE_ELEMENTS", 1 << 12)
  assert (
    512 * 64 <= largest_array(program(512, 64).jaxpr.jaxpr) < 512 * 512 // 4
  )


@pytest.mark.parametrize("max_present", [3, 9])
def test_only_as_many_as_can_be_present_are_compared(max_present):
  """Of fine and of coarse domains, whose parents merge two of the present."""
  p_DE = np.random.default_rng(5).dirichlet(np.ones(5), 8).astype(np.float32)
  parent = (0, 1, 2, 3, 1, 4, 5, 6)

  def loss(p, count_D, limit):
    return hierarchical_divergence_loss(
      p, count_D, parent, coarse_weight=0.3, max_present=limit
    )

  gathered, full = (
    jax.jit(jax.value_and_grad(functools.partial(loss, limit=limit)))
    for limit in (max_present, None)
  )
  for present in ([], [6], [6, 1], [6, 1, 4], [4, 1]):
    count_D = np.zeros(8, np.float32)
    count_D[present] = (2, 1, 3)[: len(present)]
    value, gradient = gathered(p_DE, count_D)
    want, want_gradient = full(p_DE, count_D)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-7)
    assert np.any(gradient) == (len(present) > 1)


@pytest.mark.parametrize("present", [[0] * 5, [0, 1, 0, 0, 0]])
def test_fewer_than_two_domains_is_exactly_zero(present):
  p_DE = np.eye(5, dtype=np.float32)
  p_DE[0] = np.nan
  for loss, *slopes in all_losses(p_DE, np.array(present)).values():
    assert float(loss) == 0.0
    assert not np.any(slopes)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_one_expert_or_one_domain_is_exactly_zero(shape):
  loss, gradient = jax.value_and_grad(expert_divergence_loss)(
    jnp.ones(shape), jnp.ones(shape[0])
  )
  assert float(loss) == 0.0
  assert not jnp.any(gradient)


def test_collapsed_and_disjoint_routing_have_finite_derivatives():
  present_D = np.ones(5, int)
  collapsed = np.full((5, 5), 0.2, np.float32)
  for loss, *slopes in all_losses(collapsed, present_D).values():
    assert float(loss) == pytest.approx(-math.log(1e-8))
    assert np.all(np.isfinite(slopes))
  disjoint = np.eye(5, dtype=np.float32)[[0, 0, 1, 2, 2]]
  for arrays in all_losses(disjoint, present_D).values():
    assert all(np.all(np.isfinite(x)) for x in arrays)


def test_unknown_divergence_lists_the_names():
  with pytest.raises(ValueError, match="'kl'.*" + ", ".join(DIVERGENCES)):
    expert_divergence_loss(jnp.ones((2, 2)), jnp.ones(2), divergence="kl")


def test_hierarchical_loss_against_loops():
  random = np.random.default_rng(4)
  fine = random.dirichlet(np.ones(5), 6).astype(np.float32)
  count = np.array([3, 1, 2, 0, 5, 1], np.float32)
  fine[3] = 0
  parent = (0, 2, 0, 1, 2, 3)
  # A coarse mean over sequences, each as its fine domain's mean.
  coarse = np.zeros((4, 5))
  for c in range(4):
    rows = [
      fine[d] for d in range(6) for _ in range(int(count[d])) if parent[d] == c
    ]
    coarse[c] = np.mean(rows, 0) if rows else 0
  want = 0.3 * reference_loss(coarse, [1, 0, 1, 1], "hellinger")
  want += 0.7 * reference_loss(fine, count, "hellinger")

  def loss(p):
    return hierarchical_divergence_loss(
      p, count, parent, coarse_weight=0.3, divergence="hellinger"
    )

  value, gradient = jax.jit(jax.value_and_grad(loss))(fine)
  assert float(value) == pytest.approx(want, rel=1e-5)
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[3])


@pytest.mark.parametrize("parent", [(0, 1), (0, -1, 0)])
def test_hierarchy_that_does_not_fit_is_refused(parent):
  with pytest.raises(ValueError, match="3 domains need as many labels"):
    hierarchical_divergence_loss(jnp.ones((3, 2)), jnp.ones(3), parent)
