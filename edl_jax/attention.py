"""Grouped-query attention with rotary positions and normalised queries, keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from edl_jax.config import ModelConfig


def fan_in_normal(
  key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0
) -> jax.Array:
  """Truncated normal of standard deviation scale / sqrt(fan_in), float32.

  LeCun et al., *Efficient BackProp*, 1998.
  """
  initializer = jax.nn.initializers.truncated_normal(
    scale / fan_in**0.5, lower=-3.0, upper=3.0
  )
  return initializer(key, shape, jnp.float32)


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467)."""

  def __init__(self, width: int, epsilon: float):
    self.scale = nnx.Param(jnp.ones((width,)))
    self._epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis in float32; keeps the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normal = x32 * jax.lax.rsqrt(mean_square + self._epsilon)
    return (normal * self.scale[...]).astype(x.dtype)


def rotary_embedding(
  x_BTNH: jax.Array, positions_BT: jax.Array, theta: float
) -> jax.Array:
  """Rotates pairs of features by position (Su et al., arXiv:2104.09864).

  Feature i is paired with feature i + H/2, as the Qwen and Llama families do.
  Angles are float32; the dtype of `x_BTNH` is kept.
  """
  half = x_BTNH.shape[-1] // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  cos_BT1H = jnp.cos(angle_BTH)[:, :, None]
  sin_BT1H = jnp.sin(angle_BTH)[:, :, None]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [
      first * cos_BT1H - second * sin_BT1H,
      second * cos_BT1H + first * sin_BT1H,
    ],
    axis=-1,
  )
  return rotated.astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Causal attention within documents."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    m, h = config.width, config.head_width
    n, k = config.num_heads, config.num_kv_heads
    query, key_, value, out = jax.random.split(key, 4)
    self._theta = config.rope_theta
    self.query_MNH = nnx.Param(fan_in_normal(query, (m, n, h), m))
    self.key_MKH = nnx.Param(fan_in_normal(key_, (m, k, h), m))
    self.value_MKH = nnx.Param(fan_in_normal(value, (m, k, h), m))
    # Residual branches start small: Radford et al., 2019 (GPT-2), section 2.3.
    residual_scale = (2 * config.num_layers) ** -0.5
    self.out_NHM = nnx.Param(
      fan_in_normal(out, (n, h, m), n * h, residual_scale)
    )
    self.query_norm = RMSNorm(h, config.norm_epsilon)
    self.key_norm = RMSNorm(h, config.norm_epsilon)

  def __call__(
    self, x_BTM: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array
  ) -> jax.Array:
    """Returns the attention branch's output, (B, T, M), dtype of `x_BTM`."""
    dtype = x_BTM.dtype

    def project(weight):
      return jnp.einsum("BTM,MNH->BTNH", x_BTM, weight[...].astype(dtype))

    q_BTNH = self.query_norm(project(self.query_MNH))
    k_BSKH = self.key_norm(project(self.key_MKH))
    v_BSKH = project(self.value_MKH)
    q_BTNH = rotary_embedding(q_BTNH, positions_BT, self._theta)
    k_BSKH = rotary_embedding(k_BSKH, positions_BT, self._theta)
    same_document_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    y_BTNH = jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, mask=same_document_BTS[:, None], is_causal=True
    )
    return jnp.einsum("BTNH,NHM->BTM", y_BTNH, self.out_NHM[...].astype(dtype))
