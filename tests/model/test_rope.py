"""Rotary frequencies against the formulas of the papers, in float64."""

import dataclasses
import math

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
