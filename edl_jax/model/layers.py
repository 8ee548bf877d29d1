"""Layers that attention and experts share: norm, SwiGLU, initialisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from edl_jax import sharding
from edl_jax.config import ModelConfig


def fan_in_normal(
  key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0
) -> jax.Array:
  """Draws a normal of deviation scale / sqrt(fan_in), cut at 3, in float32.

  LeCun et al., *Efficient BackProp*, 1998.
  """
  initializer = jax.nn.initializers.truncated_normal(
    scale / fan_in**0.5, lower=-3.0, upper=3.0
  )
  return initializer(key, shape, jnp.float32)


def _rms_normalize_primal(x, scale, epsilon, axes=()) -> jax.Array:
  """Normalises; autodiff's derivative would read x three times as often.

  Args:
    x: (..., W).
    scale: (W,), float32.
    epsilon: added to the mean square.
    axes: mesh axes over which W is spread.
  """
  return _rms_normalize_forward(x, scale, epsilon, axes)[0]


def _rms_normalize_forward(x, scale, epsilon, axes):
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  mean_square = sharding.mean_over(mean_square, axes)
  inverse = jax.lax.rsqrt(mean_square + epsilon)
  return (x32 * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _rms_normalize_backward(axes, residuals, dy):
  x, inverse, scale = residuals
  normal = x.astype(jnp.float32) * inverse
  dy = dy.astype(jnp.float32)
  dscale = (dy * normal).reshape(-1, x.shape[-1]).sum(0)
  dnormal = dy * scale
  along = (dnormal * normal).mean(-1, keepdims=True)
  along = sharding.mean_over(along, axes)
  dx = inverse * (dnormal - normal * along)
  return dx.astype(x.dtype), dscale, None


_rms_normalize = jax.custom_vjp(_rms_normalize_primal, nondiff_argnums=(3,))
_rms_normalize.defvjp(_rms_normalize_forward, _rms_normalize_backward)


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467)."""

  def __init__(self, width: int, epsilon: float):
    self.scale = nnx.Param(jnp.ones((width,)))
    self._epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis in float32; keeps the dtype of `x`."""
    return _rms_normalize(x, self.scale[...], self._epsilon)


class HeadsRMSNorm(nnx.Module):
  """RMSNorm of all heads of a token together, as OLMoE has it.

  Muennighoff et al., arXiv:2409.02060, section 4.2.5. Heads are spread over
  `tensor`.
  """

  def __init__(self, heads: int, width: int, epsilon: float):
    self.scale_NH = nnx.Param(jnp.ones((heads, width)))
    self._epsilon = epsilon

  def __call__(self, x_BTNH: jax.Array) -> jax.Array:
    """Normalises the last two axes in float32; keeps the dtype."""
    flat = x_BTNH.reshape(*x_BTNH.shape[:-2], -1)
    scale = self.scale_NH[...].reshape(-1)
    y: jax.Array = _rms_normalize(flat, scale, self._epsilon, ("tensor",))
    return y.reshape(x_BTNH.shape)


def _halves(both):
  hidden = both.shape[-1] // 2
  return both[..., :hidden], both[..., hidden:]


@jax.custom_vjp
def swiglu(both: jax.Array) -> jax.Array:
  """Multiplies `up` by the SiLU of `gate` (Shazeer, arXiv:2002.05202).

  The backward pass keeps the argument alone.

  Args:
    both: gate and up, one behind the other, (..., 2 F). An axis of their own
      would cost TPUs a transposition, because tiles hold the last two axes.

  Returns:
    The hidden activations (..., F).
  """
  gate, up = _halves(both)
  return jax.nn.silu(gate) * up


def _swiglu_forward(both):
  return swiglu(both), both


def _swiglu_backward(both, dy):
  gate, up = _halves(both)
  sigmoid = jax.nn.sigmoid(gate)
  dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
  dup = dy * gate * sigmoid
  joined = jax.lax.platform_dependent(
    dgate, dup, tpu=_join_in_place, default=_join
  )
  return (joined,)


def _join(first, second):
  """Joins along the last axis: on CPUs half again as fast as concatenation."""
  stacked = jnp.stack([first, second], axis=-2)
  return stacked.reshape(*first.shape[:-1], -1)


def _join_in_place(first, second):
  """Writes each half where it belongs.

  TPUs would write both halves of a concatenation, and then copy them.
  """
  width = first.shape[-1]
  joined = jax.lax.empty((*first.shape[:-1], 2 * width), first.dtype)
  for half, start in ((first, 0), (second, width)):
    joined = jax.lax.dynamic_update_slice_in_dim(joined, half, start, axis=-1)
  return joined


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def weighted_swiglu(both: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes `swiglu`, times a weight for each row.

  A linear layer behind it then returns weighted outputs, and the weights'
  gradient does not need the outputs without weights.

  Args:
    both: as in `swiglu`, (..., 2 F).
    weight: float32 (...).

  Returns:
    The weighted hidden activations (..., F), in the dtype of `both`.
  """
  return swiglu(both) * weight[..., None].astype(both.dtype)


def _weighted_swiglu_forward(both, weight):
  return weighted_swiglu(both, weight), (both, weight)


def _weighted_swiglu_backward(residuals, dy):
  both, weight = residuals
  product = dy.astype(jnp.float32) * swiglu(both).astype(jnp.float32)
  dhidden = dy * weight[..., None].astype(dy.dtype)
  dweight = jax.lax.platform_dependent(
    product, tpu=_row_sums, default=_row_sums_by_product
  )
  return *_swiglu_backward(both, dhidden), dweight


def _row_sums(x):
  return x.sum(-1)


def _row_sums_by_product(x):
  """CPUs add along rows faster so than by a reduction."""
  ones = jnp.ones(x.shape[-1], x.dtype)
  return jnp.dot(x, ones, precision=jax.lax.Precision.HIGHEST)


weighted_swiglu.defvjp(_weighted_swiglu_forward, _weighted_swiglu_backward)


class SwiGLU(nnx.Module):
  """Gated feed-forward layer (Shazeer, arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, hidden: int, key: jax.Array):
    up, down = jax.random.split(key)
    residual_scale = (2 * config.num_layers) ** -0.5
    self.gate_up_M2F = nnx.Param(
      fan_in_normal(up, (config.width, 2, hidden), config.width)
    )
    self.down_FM = nnx.Param(
      fan_in_normal(down, (hidden, config.width), hidden, residual_scale)
    )

  def __call__(self, x_BTM: jax.Array) -> jax.Array:
    dtype = x_BTM.dtype
    gate_up_M2F = sharding.gather(
      "gate_up_M2F", self.gate_up_M2F[...].astype(dtype)
    )
    down_FM = sharding.gather("down_FM", self.down_FM[...].astype(dtype))
    # One matrix (M, 2 F).
    both = jnp.dot(x_BTM, gate_up_M2F.reshape(len(gate_up_M2F), -1))
    y_BTM = jnp.einsum("BTF,FM->BTM", swiglu(both), down_FM)
    return sharding.sum_over(y_BTM, ("tensor",))
