"""Cross-entropy of a linear head, in chunks of tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from edl_jax import sharding


def chunked_cross_entropy(
  x_BTM: jax.Array,
  head_MV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk_elements: int = 1 << 22,
  tied: bool = False,
  z_weight: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted cross-entropy of a linear head, without all logits at once.

  Logits exist for one chunk of tokens at a time. The forward pass forms the
  gradient, chunk by chunk, from the same logits. So nothing is computed twice,
  and the backward pass keeps only arrays of the size of `x_BTM` and `head_MV`.

  Inside `sharding.per_shard` the arguments are the device's own rows and its
  piece of the head. The gradient of that piece already sums over all rows, so
  the caller must add the results of all devices with the same weight.

  Args:
    x_BTM: final activations. Matrix products take their dtype; sums are
      float32.
    head_MV: float32 master weights.
    targets_BT: int32 in [0, V).
    weights_BT: float32, 0 for padding; no gradient.
    chunk_elements: elements of the largest array of logits.
    tied: whether the embedding is given in place of the head, (V, M).
    z_weight: the objective's weight of the second result, where that of the
      first is 1. The gradient, which the forward pass forms, rests on it.

  Returns:
    The weighted sum in nats over these rows, and the weighted sum of
    logsumexp(logits)^2, float32 scalars; and weighted nats_BT, float32, for
    reports. No gradient flows through nats_BT.
  """
  total, squares, nats_BT = _cross_entropy(
    x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, tied, z_weight
  )
  return total, squares, jax.lax.stop_gradient(nats_BT)


def _cross_entropy_primal(
  x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, tied, z_weight
) -> tuple[jax.Array, jax.Array, jax.Array]:
  return _in_chunks(
    *(x_BTM, head_MV, targets_BT, weights_BT),
    *(chunk_elements, tied, z_weight),
    with_gradient=False,
  )[0]


def _cross_entropy_forward(
  x_BTM, head_MV, targets_BT, weights_BT, chunk_elements, tied, z_weight
):
  sums, dx_BTM, dhead_MV = _in_chunks(
    *(x_BTM, head_MV, targets_BT, weights_BT),
    *(chunk_elements, tied, z_weight),
    with_gradient=True,
  )
  return sums, (dx_BTM, dhead_MV)


def _cross_entropy_backward(
  chunk_elements, tied, z_weight, residuals, cotangents
):
  # The cotangent of the squares is z_weight times that of the nats, so that the
  # gradient of their weighted sum serves both.
  del chunk_elements, tied, z_weight
  dx_BTM, dhead_MV = residuals
  # Devices along `tensor` hold the same sum, and each a part of its cotangent.
  scale = sharding.sum_over(cotangents[0], ("tensor",))
  return (scale * dx_BTM).astype(dx_BTM.dtype), scale * dhead_MV, None, None


_cross_entropy = jax.custom_vjp(
  _cross_entropy_primal, nondiff_argnums=(4, 5, 6)
)
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_size(tokens: int, most: int) -> int:
  """Returns the tokens of a chunk, at most `most`.

  TPUs multiply whole tiles of 128 rows, and padding copies all rows: take the
  largest multiple of 128 that divides the tokens, unless it is less than half
  of what may be. Otherwise chunks have even sizes.
  """
  if most >= tokens:
    return tokens
  for size in range(most // 128 * 128, most // 2, -128):
    if tokens % size == 0:
      return size
  return -(-tokens // -(-tokens // most))


def _in_chunks(
  x_BTM,
  head_MV,
  targets_BT,
  weights_BT,
  chunk_elements,
  tied,
  z_weight,
  with_gradient,
):
  """Returns (nats, squares, nats_BT), dx_BTM and dhead_MV.

  The last two are the gradient of nats plus `z_weight` times squares, None
  without gradient.

  Each device along `tensor` has the logits of its part of the vocabulary, and
  returns what these contribute to dx_BTM.
  """
  batch, length, width = x_BTM.shape
  name = "embedding_VM" if tied else "head_MV"
  # Devices along `tensor` keep their part of the vocabulary.
  head = sharding.gather(
    name, head_MV.astype(x_BTM.dtype), sharding.STORAGE_AXES
  )
  head = head.T if tied else head
  vocabulary = head.shape[1]
  first = sharding.index_along("tensor") * vocabulary
  tokens = batch * length
  chunk = _chunk_size(tokens, max(1, chunk_elements // vocabulary))
  num_chunks = -(-tokens // chunk)

  def in_chunks(x):
    flat = x.reshape(tokens, *x.shape[2:])
    padding = [(0, num_chunks * chunk - tokens)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding).reshape(num_chunks, chunk, *flat.shape[1:])

  def body(dhead_MV: Any, inputs: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    x_PM, target_P, weight_P = inputs
    logits_PV = jnp.dot(x_PM, head, preferred_element_type=jnp.float32)
    hit_PV = target_P[:, None] - first == jnp.arange(vocabulary)
    # Subtract the largest logit first, so that exp cannot overflow.
    largest_P = sharding.max_over(logits_PV.max(-1), ("tensor",))
    shifted_PV = logits_PV - largest_P[:, None]
    exp_PV = jnp.exp(shifted_PV)
    sum_P, target_logit_P = sharding.sum_over(
      (exp_PV.sum(-1), jnp.where(hit_PV, shifted_PV, 0).sum(-1)), ("tensor",)
    )
    nats_P = (jnp.log(sum_P) - target_logit_P) * weight_P
    logsumexp_P = jnp.log(sum_P) + largest_P
    squares_P = jnp.square(logsumexp_P) * weight_P
    if not with_gradient:
      return dhead_MV, (nats_P, squares_P, None)
    share_P = weight_P / sum_P
    if z_weight:
      share_P *= 1 + 2 * z_weight * logsumexp_P
    dlogits_PV = exp_PV * share_P[:, None]
    dlogits_PV = jnp.where(hit_PV, dlogits_PV - weight_P[:, None], dlogits_PV)
    dlogits_PV = dlogits_PV.astype(x_PM.dtype)
    dx_PM = jnp.dot(dlogits_PV, head.T)
    dhead_MV += jnp.dot(x_PM.T, dlogits_PV, preferred_element_type=jnp.float32)
    return dhead_MV, (nats_P, squares_P, dx_PM)

  dhead_MV = (
    jnp.zeros((width, vocabulary), jnp.float32) if with_gradient else None
  )
  dhead_MV, (nats, squares, dx) = jax.lax.scan(
    body,
    dhead_MV,
    (in_chunks(x_BTM), in_chunks(targets_BT), in_chunks(weights_BT)),
  )
  nats_BT = nats.reshape(-1)[:tokens].reshape(batch, length)
  if with_gradient:
    dx = dx.reshape(-1, width)[:tokens].reshape(x_BTM.shape)
    # Scatter now, so that no device keeps the whole until the backward pass.
    dhead = (dhead_MV.T if tied else dhead_MV).astype(x_BTM.dtype)
    dhead = sharding.scatter(name, dhead, sharding.STORAGE_AXES)
    dhead_MV = dhead.astype(jnp.float32)
  # Padded tokens have no weight.
  return (nats_BT.sum(), squares.sum(), nats_BT), dx, dhead_MV
