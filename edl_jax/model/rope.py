"""Rotary position embeddings, and their scaling to longer rows."""

import math

import jax
import jax.numpy as jnp

from edl_jax.config import ModelConfig

# Rotations over the original length: from this many on a feature keeps its
# frequency under yarn, and below the second number it is slowed down whole
# (Peng et al., arXiv:2309.00071, section 3.2).
_FAST, _SLOW = 32, 1


def frequencies(config: ModelConfig) -> jax.Array:
  """Returns the angle by position of each pair of features, float32 (H/2,)."""
  half = config.head_width // 2
  theta = config.rope_theta
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling == "linear":
    # Chen et al., arXiv:2306.15595.
    return frequency_H / config.rope_factor
  if config.rope_scaling == "yarn":
    # The place, counted from 0, of the feature that rotates so often.
    fast, slow = (
      half
      * math.log(config.rope_original_length / (rotations * 2 * math.pi))
      / math.log(theta)
      for rotations in (_FAST, _SLOW)
    )
    first = max(math.floor(fast), 0)
    last = min(math.ceil(slow), config.head_width - 1)
    ramp_H = (jnp.arange(half) - first) / max(last - first, 0.001)
    ramp_H = jnp.clip(ramp_H, 0, 1)
    slowed_H = frequency_H / config.rope_factor
    return frequency_H * (1 - ramp_H) + slowed_H * ramp_H
  return frequency_H


def temperature(config: ModelConfig) -> float:
  """Returns the factor of queries and of keys after their rotation.

  Yarn sharpens attention in long rows: Peng et al., section 3.3.
  """
  if config.rope_scaling != "yarn":
    return 1.0
  return 0.1 * math.log(config.rope_factor) + 1


def rotary_embedding(
  x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig
) -> jax.Array:
  """Rotates pairs of features by position (Su et al., arXiv:2104.09864).

  Feature i is paired with feature i + H/2, as the Qwen and Llama families do.
  Angles are float32; the dtype of `x_BTNH` is kept.
  """
  frequency_H = frequencies(config)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  cos_BTH, sin_BTH = jnp.cos(angle_BTH), jnp.sin(angle_BTH)
  if (factor := temperature(config)) != 1:
    cos_BTH, sin_BTH = factor * cos_BTH, factor * sin_BTH
  # One formula for both halves: a CPU takes three times as long to join them
  # afterwards.
  cos_BTH = jnp.concatenate([cos_BTH, cos_BTH], axis=-1)
  sin_BTH = jnp.concatenate([-sin_BTH, sin_BTH], axis=-1)
  return _rotate(x_BTNH, cos_BTH, sin_BTH)


def _swap_by_roll(x_BTNH):
  half = x_BTNH.shape[-1] // 2
  return jnp.roll(x_BTNH.astype(jnp.float32), half, axis=-1)


def _swap_by_product(x_BTNH):
  """Multiplies with a permutation, which is exact: a TPU rolls slowly."""
  width = x_BTNH.shape[-1]
  swap_HH = jnp.roll(jnp.eye(width, dtype=x_BTNH.dtype), width // 2, axis=-1)
  return jnp.einsum(
    "BTNH,Hh->BTNh", x_BTNH, swap_HH, preferred_element_type=jnp.float32
  )


def _rotate_primal(x_BTNH, cos_BTH, sin_BTH) -> jax.Array:
  """Returns x cos + y sin, where y is x with its halves exchanged."""
  if x_BTNH.dtype == jnp.bfloat16:
    swapped_BTNH = jax.lax.platform_dependent(
      x_BTNH, tpu=_swap_by_product, default=_swap_by_roll
    )
  else:
    # TPUs round the factors of products to bfloat16.
    swapped_BTNH = _swap_by_roll(x_BTNH)
  rotated = (
    x_BTNH.astype(jnp.float32) * cos_BTH[:, :, None]
    + swapped_BTNH * sin_BTH[:, :, None]
  )
  return rotated.astype(x_BTNH.dtype)


def _rotate_forward(x_BTNH, cos_BTH, sin_BTH):
  return _rotate(x_BTNH, cos_BTH, sin_BTH), (cos_BTH, sin_BTH)


def _rotate_backward(residuals, dy_BTNH):
  cos_BTH, sin_BTH = residuals
  return _rotate(dy_BTNH, cos_BTH, -sin_BTH), None, None


_rotate = jax.custom_vjp(_rotate_primal)
_rotate.defvjp(_rotate_forward, _rotate_backward)
