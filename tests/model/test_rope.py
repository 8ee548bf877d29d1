"""Rotary frequencies against the formulas of the papers, in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model import rope

LONG = ModelConfig(head_width=64, rope_theta=1e6, rope_original_length=32768)


def plain():
  return np.array([1e6 ** (-2 * i / 64) for i in range(32)])


def test_rotation_is_by_position_times_frequency():
  x_BTNH = np.zeros((1, 1, 1, 64), np.float32)
  x_BTNH[..., 3] = 2
  y_BTNH = rope.rotary_embedding(x_BTNH, np.array([[5]]), LONG)
  angle = 5 * plain()[3]
  want = np.zeros(64)
  want[3], want[3 + 32] = 2 * math.cos(angle), 2 * math.sin(angle)
  np.testing.assert_allclose(y_BTNH[0, 0, 0], want, atol=1e-6)


def test_linear_scaling_slows_all_features():
  config = dataclasses.replace(LONG, rope_scaling="linear", rope_factor=4.0)
  found = rope.frequencies(config)
  np.testing.assert_allclose(found, plain() / 4, rtol=1e-5)
  assert rope.temperature(config) == 1


def test_yarn_keeps_fast_features_and_slows_the_slow_ones():
  config = dataclasses.replace(LONG, rope_scaling="yarn", rope_factor=4.0)
  rotations = 32768 * plain() / (2 * math.pi)
  ratio = np.asarray(rope.frequencies(config)) / plain()
  # The ends of the ramp are rounded outwards to whole features.
  step = 1e6 ** (2 / 64)
  np.testing.assert_allclose(ratio[rotations > 32 * step], 1, rtol=1e-5)
  np.testing.assert_allclose(ratio[rotations < 1 / step], 1 / 4, rtol=1e-5)
  between = ratio[(rotations < 32) & (rotations > 1)]
  assert len(between) > 5
  # A ramp: its slope over the features is constant.
  slope = np.diff(between)
  np.testing.assert_allclose(slope, slope.mean(), rtol=1e-3)
  assert -0.2 < slope[0] < 0
  x_BTNH = np.ones((1, 1, 1, 64), np.float32)
  rotated = rope.rotary_embedding(x_BTNH, np.array([[7]]), config)
  assert np.linalg.norm(rotated) == pytest.approx(
    8 * (0.1 * math.log(4) + 1), rel=1e-5
  )


def by_autodiff(x_BTNH, positions_BT, config):
  """The rotation as complex products."""
  x_BTNF, y_BTNF = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  angle_BTF = positions_BT[..., None] * rope.frequencies(config)
  turned = (x_BTNF + 1j * y_BTNF) * jnp.exp(1j * angle_BTF)[:, :, None]
  return jnp.concatenate([turned.real, turned.imag], axis=-1)


def test_gradient_is_that_of_the_formula():
  random = np.random.default_rng(0)
  x_BTNH, dy_BTNH = random.standard_normal((2, 2, 5, 3, 64), np.float32)
  positions_BT = random.integers(0, 99, (2, 5))
  got, want = (
    jax.vjp(lambda x, f=f: f(x, positions_BT, LONG), x_BTNH)
    for f in (rope.rotary_embedding, by_autodiff)
  )
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    got[1](dy_BTNH)[0], want[1](dy_BTNH)[0], rtol=1e-4, atol=1e-5
  )


def test_tpus_exchange_halves_exactly_by_a_product():
  """The form for TPUs, run here, to the bit."""
  x_BTNH = jax.random.normal(jax.random.key(0), (2, 3, 4, 128), jnp.bfloat16)
  by_product = rope._swap_by_product(x_BTNH)
  assert by_product.dtype == jnp.float32
  np.testing.assert_array_equal(by_product, rope._swap_by_roll(x_BTNH))


@pytest.mark.parametrize(
  ("dtype", "platform", "products"),
  [("bfloat16", "tpu", 1), ("bfloat16", "cpu", 0), ("float32", "tpu", 0)],
)
def test_only_bfloat16_on_tpus_takes_the_product(dtype, platform, products):
  x_BTNH = jnp.ones((1, 4, 2, 64), dtype)
  positions_BT = jnp.zeros((1, 4), jnp.int32)
  rotate = jax.jit(lambda x: rope.rotary_embedding(x, positions_BT, LONG))
  lowered = rotate.trace(x_BTNH).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count("dot_general") == products
