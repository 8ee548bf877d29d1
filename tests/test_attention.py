"""Attention and normalisation, with their own derivatives, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.attention import RMSNorm, causal_attention


def naive_attention(q, k, v, segments):
  """Float64, query by query."""
  rows, length, heads, width = q.shape
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  y = np.zeros_like(q)
  for b, t, n in np.ndindex(rows, length, heads):
    seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
    key_head = n * k.shape[2] // heads
    logits = k[b, seen, key_head] @ q[b, t, n] / np.sqrt(width)
    weights = np.exp(logits - logits.max())
    y[b, t, n] = weights / weights.sum() @ v[b, seen, key_head]
  return y


def library_attention(q, k, v, segments):
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)


def differentiated(function, inputs, dy):
  """The value and the gradients."""

  def both(inputs, dy):
    y, pull_back = jax.vjp(function, *inputs)
    return y, pull_back(dy)

  return jax.jit(both)(inputs, dy)


def inputs(length, heads=4, key_heads=2, width=6):
  random = np.random.default_rng(length)
  q, k, v, dy = (
    random.standard_normal((2, length, n, width), np.float32)
    for n in (heads, key_heads, key_heads, heads)
  )
  # Segments end within blocks, at their ends, and padding has its own.
  segments = np.sort(random.integers(0, 4, (2, length)), axis=1)[:, ::-1]
  return q, k, v, dy, np.ascontiguousarray(segments, np.int32)


# 160 and 128 go by blocks of queries, the others do not.
@pytest.mark.parametrize("length", [1, 7, 70, 128, 160])
def test_values_against_a_loop_and_gradients_against_autodiff(length):
  q, k, v, dy, segments = inputs(length)
  y, gradients = differentiated(
    lambda *x: causal_attention(*x, segments), (q, k, v), dy
  )
  np.testing.assert_allclose(
    y, naive_attention(q, k, v, segments), rtol=1e-5, atol=2e-6
  )
  _, wanted = differentiated(
    lambda *x: library_attention(*x, segments), (q, k, v), dy
  )
  for got, want in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=5e-6)


def test_large_logits_neither_overflow_nor_vanish():
  q, k, v, dy, segments = inputs(128)
  y, gradients = differentiated(
    lambda *x: causal_attention(*x, segments), (100 * q, k, v), dy
  )
  np.testing.assert_allclose(
    y, naive_attention(100 * q, k, v, segments), rtol=1e-3, atol=1e-4
  )
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_keeps_its_dtype_and_float32_softmax():
  q, k, v, dy, segments = inputs(128)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  y, gradients = differentiated(
    lambda *x: causal_attention(*x, segments),
    low,
    jnp.asarray(dy, jnp.bfloat16),
  )
  assert {x.dtype for x in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
  exact = naive_attention(*(np.asarray(x, np.float32) for x in low), segments)
  # A weight and an output are rounded to 8 bits.
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.02)


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
