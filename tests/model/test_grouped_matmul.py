"""Every backend of the grouped product against one product per group."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.experimental.pallas import tpu

from edl_jax.model import grouped_matmul as module
from edl_jax.model.grouped_matmul import BACKENDS, grouped_matmul


def naive(x, w, sizes):
  """One product per group, in float64."""
  ends = np.cumsum(sizes)
  return np.concatenate(
    [
      np.asarray(x[end - size : end], np.float64) @ np.asarray(w[e], np.float64)
      for e, (size, end) in enumerate(zip(sizes, ends))
    ]
  )


def differentiated(x, w, sizes, dy, backend=None):
  """The value and the gradients."""

  @jax.jit
  def all_three(x, w, sizes, dy):
    y, pull_back = jax.vjp(
      lambda x, w: grouped_matmul(x, w, sizes, backend), x, w
    )
    return y, *pull_back(dy)

  return all_three(x, w, sizes, dy)


def check(sizes, width, hidden, backend, more_rows=0):
  """Values and both gradients; `more_rows` of NaN are in no group."""
  random = np.random.default_rng(len(sizes))
  rows = sum(sizes)
  x = random.standard_normal((rows, width), np.float32)
  w = random.standard_normal((len(sizes), width, hidden), np.float32)
  dy = random.standard_normal((rows, hidden), np.float32)
  x, dy = (
    np.pad(a, ((0, more_rows), (0, 0)), constant_values=np.nan) for a in (x, dy)
  )
  # The kernels of the TPU run in Pallas's interpreter.
  with contextlib.ExitStack() as stack:
    if backend == "tpu":
      stack.enter_context(tpu.force_tpu_interpret_mode())
    y, dx, dw = differentiated(x, w, jnp.array(sizes, jnp.int32), dy, backend)
  np.testing.assert_allclose(y[:rows], naive(x, w, sizes), rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(
    dx[:rows], naive(dy, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-4
  )
  ends = np.cumsum(sizes)
  for e, (size, end) in enumerate(zip(sizes, ends)):
    own = slice(end - size, end)
    want = x[own].T.astype(np.float64) @ dy[own]
    np.testing.assert_allclose(dw[e], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
  "sizes",
  [
    [37],
    [0, 300, 0],
    [1, 128, 129, 0, 42],
    [0, 0, 0, 5],
    [700, 0, 33],
    [3] * 16,
  ],
)
def test_values_and_gradients_against_a_loop(sizes, backend):
  check(sizes, 24, 10, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[1, 128, 0, 42], [0, 0, 5, 0], [0, 0]])
def test_rows_behind_the_groups_do_not_matter(sizes, backend):
  check(sizes, 24, 10, backend, more_rows=150)


def test_tpu_kernels_of_several_tiles():
  # Two tiles of rows within a group, and of both widths, one of them ragged.
  check([1, 300, 0, 211], 256, 1152, "tpu")


@settings(max_examples=15, deadline=None)
@given(
  strategies.lists(strategies.integers(0, 70), min_size=1, max_size=6),
  strategies.sampled_from([(4,), (16, 4), (32, 8, 3)]),
)
def test_any_sizes_of_groups_and_blocks(sizes, block_sizes):
  if not sum(sizes):
    sizes = [*sizes, 1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "_BLOCK_SIZES", block_sizes)
    check(sizes, 5, 3, "cpu")


def test_keeps_bfloat16():
  x = jnp.ones((8, 4), jnp.bfloat16)
  w = jnp.ones((2, 4, 3), jnp.bfloat16)
  dy = jnp.ones((8, 3), jnp.bfloat16)
  for array in differentiated(x, w, jnp.array([3, 5], jnp.int32), dy):
    assert array.dtype == jnp.bfloat16
