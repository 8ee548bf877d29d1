"""Attention, with its own derivative, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  PartitionSpec,
)

from edl_jax.model import splash
from edl_jax.model.attention import BACKENDS, causal_attention


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


@pytest.fixture
def small_kernels(monkeypatch):
  """The kernels of the TPU in Pallas's interpreter, on blocks of 128."""
  interpreted = functools.partial(splash.attention, interpret=True)
  monkeypatch.setitem(BACKENDS, "tpu", interpreted)
  monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)


@pytest.mark.parametrize(
  ("heads", "key_heads", "gradient_parts"), [(4, 1, 2), (4, 2, 1), (2, 2, 2)]
)
def test_kernels_against_a_loop_and_autodiff(
  small_kernels, monkeypatch, heads, key_heads, gradient_parts
):
  # With one part for two blocks of keys the backward pass is two kernels.
  monkeypatch.setattr(splash, "_MOST_GRADIENT_PARTS", gradient_parts)
  q, k, v, dy, segments = inputs(256, heads, key_heads, width=16)
  assert 0 in segments
  y, gradients = differentiated(
    lambda *x: causal_attention(*x, segments, backend="tpu"), (q, k, v), dy
  )
  np.testing.assert_allclose(
    y, naive_attention(q, k, v, segments), rtol=1e-5, atol=2e-6
  )
  _, wanted = differentiated(
    lambda *x: library_attention(*x, segments), (q, k, v), dy
  )
  for got, want in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=5e-6)


def test_the_kernels_add_partial_gradients_of_queries_one_by_one(small_kernels):
  """The TPU's compiler prices a reduction at a tenth of the bandwidth."""
  q, k, v, dy, segments = inputs(512, width=16)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, dy)]

  def pulled(q, k, v, dy):
    attend = functools.partial(causal_attention, backend="tpu")
    return jax.vjp(lambda *x: attend(*x, segments), q, k, v)[1](dy)

  jaxpr = jax.make_jaxpr(pulled)(*low).jaxpr
  # Four blocks of keys, whose parts are added in float32.
  assert count(jaxpr, "reduce_sum") == 0
  assert count(jaxpr, "add", jnp.float32, (2, 4, 512, 16)) == 3


def count(jaxpr, primitive, dtype=None, shape=None):
  """How often a primitive occurs outside of kernels, in what is of use."""
  found = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == primitive:
      (aval, *_) = [x.aval for x in equation.outvars]
      found += dtype in (None, aval.dtype) and shape in (None, aval.shape)
    elif equation.primitive.name != "pallas_call" and equation.outvars:
      for inner in jaxprs_in_params(equation.params):
        found += count(inner, primitive, dtype, shape)
  return found


def traced(length, function=causal_attention):
  q, k, v, _, segments = inputs(length, width=16)
  return jax.make_jaxpr(function)(q, k, v, segments).jaxpr


@pytest.mark.parametrize(
  ("length", "platform", "kernels"),
  [
    (256, "tpu", 1),
    (256, "cpu", 0),
    (256, "cuda", 0),
    (200, "tpu", 0),
    # Known only after tracing, which goes both ways.
    (256, None, 1),
    (200, None, 0),
  ],
)
def test_platform_and_length_choose_the_kernels(length, platform, kernels):
  device = platform and AbstractDevice("some", num_cores=1, platform=platform)
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = traced(length)
  assert count(jaxpr, "pallas_call") == kernels
  both = platform is None and kernels
  assert bool(count(jaxpr, "dot_general")) == (both or not kernels)


@pytest.mark.parametrize(
  ("backend", "primitive"), [("tpu", "pallas_call"), ("default", "dot_general")]
)
def test_its_output_can_be_saved_by_name(backend, primitive):
  def gradient(policy):
    def loss(*x):
      return causal_attention(*x, backend=backend).sum()

    rematerialized = jax.checkpoint(loss, policy=policy)
    jaxpr = traced(256, jax.grad(rematerialized, (0, 1, 2)))
    return count(jaxpr, primitive)

  names = jax.checkpoint_policies.save_only_these_names
  # The kernel's whole forward pass; of XLA's the last product in four blocks.
  spared = gradient(names()) - gradient(names("attention"))
  assert spared == {"tpu": 1, "default": 4}[backend]


@pytest.mark.parametrize(
  ("shards", "length", "backend"),
  [(2, 10, "default"), (8, 64, "default"), (2, 512, "tpu"), (1, 128, "tpu")],
)
def test_a_spread_sequence_is_attended_as_a_whole_one(
  small_kernels, shards, length, backend
):
  q, k, v, dy, segments = inputs(length, heads=2, key_heads=1, width=8)
  rows = PartitionSpec(None, "sequence")
  spread = jax.shard_map(
    lambda *x: causal_attention(*x, "sequence", backend),
    mesh=jax.make_mesh((shards,), ("sequence",), (AxisType.Auto,)),
    in_specs=(rows,) * 4,
    out_specs=rows,
    check_vma=False,
  )
  y, gradients = differentiated(lambda *x: spread(*x, segments), (q, k, v), dy)
  whole, wanted = differentiated(
    lambda *x: library_attention(*x, segments), (q, k, v), dy
  )
  np.testing.assert_allclose(y, whole, rtol=1e-5, atol=2e-6)
  for got, want in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=5e-6)
