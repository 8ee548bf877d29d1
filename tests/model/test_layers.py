"""Norm and SwiGLU, with their own derivatives, against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model import layers
from edl_jax.model.layers import (
  RMSNorm,
  SwiGLU,
  fan_in_normal,
  swiglu,
  weighted_swiglu,
)


def test_norm_against_autodiff_of_its_formula():
  random = np.random.default_rng(0)
  norm = RMSNorm(12, 1e-3)
  x = random.standard_normal((3, 5, 12), np.float32)
  scale = random.standard_normal(12, np.float32)
  dy = random.standard_normal(x.shape, np.float32)

  norm.scale[...] = jnp.asarray(scale)

  def formula(x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale

  y, pull_back = jax.vjp(lambda x, norm: norm(x), x, norm)
  want, formula_pull_back = jax.vjp(formula, x, scale)
  np.testing.assert_allclose(y, want, rtol=1e-5)
  dx, dnorm = pull_back(dy)
  got_and_want = zip((dx, dnorm.scale[...]), formula_pull_back(dy), strict=True)
  for got, want in got_and_want:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def check_derivative(function, formula, arguments, dy):
  y, pull_back = jax.vjp(function, *arguments)
  want, formula_pull_back = jax.vjp(formula, *arguments)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  for got, want in zip(pull_back(dy), formula_pull_back(dy), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def gated(both):
  gate, up = jnp.split(both, 2, axis=-1)
  return gate / (1 + jnp.exp(-gate)) * up


def test_swiglu_against_autodiff_of_its_formula():
  random = np.random.default_rng(0)
  both, dy = (
    random.standard_normal(shape, np.float32) for shape in ((3, 10), (3, 5))
  )
  check_derivative(swiglu, gated, [both], dy)


def test_weighted_swiglu_against_autodiff_of_its_formula():
  random = np.random.default_rng(1)
  both, weight, dy = (
    random.standard_normal(shape, np.float32) for shape in ((3, 10), 3, (3, 5))
  )
  check_derivative(
    weighted_swiglu,
    lambda both, weight: gated(both) * weight[:, None],
    [both, weight],
    dy,
  )


def test_both_ways_to_join_halves():
  """TPUs take one, other platforms the other."""
  first, second = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
  want = np.concatenate([first, second], axis=-1)
  for join in (layers._join, layers._join_in_place):
    np.testing.assert_array_equal(jax.jit(join)(first, second), want)
  joined = jax.jit(jax.grad(lambda both: swiglu(both).sum())).trace(want)
  for platform, in_place in (("tpu", True), ("cpu", False)):
    text = joined.lower(lowering_platforms=(platform,)).as_text()
    assert ("dynamic_update_slice" in text) == in_place


def test_both_ways_to_add_along_rows():
  x = np.random.default_rng(0).random((3, 4, 50), np.float32)
  for add in (layers._row_sums, layers._row_sums_by_product):
    np.testing.assert_allclose(jax.jit(add)(x), x.sum(-1), rtol=1e-5)


def test_weights_stay_float32_beside_bfloat16():
  both, weight = jnp.ones((4, 6), jnp.bfloat16), jnp.full(4, 0.3)
  y, pull_back = jax.vjp(weighted_swiglu, both, weight)
  dboth, dweight = pull_back(y)
  assert y.dtype == dboth.dtype == jnp.bfloat16
  assert dweight.dtype == jnp.float32


def test_dense_layer_against_matrix_products():
  layer = SwiGLU(ModelConfig(width=6), 10, jax.random.key(0))
  x = np.random.default_rng(0).standard_normal((2, 3, 6))
  weights = np.asarray(layer.gate_up_M2F[...], np.float64)
  gate, up = x @ weights[:, 0], x @ weights[:, 1]
  hidden = gate / (1 + np.exp(-gate)) * up
  want = hidden @ np.asarray(layer.down_FM[...], np.float64)
  got = layer(jnp.asarray(x, jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    layer(jnp.asarray(x, jnp.float32)), want, rtol=1e-4
  )


@pytest.mark.parametrize(("fan_in", "scale"), [(16, 1.0), (64, 0.25)])
def test_initialisation_is_a_normal_cut_at_three_deviations(fan_in, scale):
  drawn = np.asarray(
    fan_in_normal(jax.random.key(0), (400, 400), fan_in, scale)
  )
  deviation = scale / fan_in**0.5
  assert np.abs(drawn).max() <= 3 * deviation * (1 + 1e-6)
  # A normal cut at three standard deviations has 0.9866 of its deviation.
  assert drawn.std() == pytest.approx(0.9866 * deviation, rel=0.01)
