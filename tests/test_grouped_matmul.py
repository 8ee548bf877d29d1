import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.grouped_matmul import grouped_matmul


def naive(x, w, sizes):
  """One product per group, in float64."""
  ends = np.cumsum(sizes)
  return np.concatenate(
    [
      np.asarray(x[end - size : end], np.float64) @ np.asarray(w[e], np.float64)
      for e, (size, end) in enumerate(zip(sizes, ends))
    ]
  )


@pytest.mark.parametrize(
  "sizes",
  [
    [37],
    [0, 300, 0],
    [1, 128, 129, 0, 42],
    [0, 0, 0, 5],
    [256, 0, 0, 0],
    [3] * 16,
  ],
)
def test_values_and_gradients_against_a_loop(sizes):
  rows, width, hidden = sum(sizes), 24, 10
  random = np.random.default_rng(0)
  x = random.standard_normal((rows, width), np.float32)
  w = random.standard_normal((len(sizes), width, hidden), np.float32)
  dy = random.standard_normal((rows, hidden), np.float32)
  y, pull_back = jax.vjp(
    lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32)), x, w
  )
  np.testing.assert_allclose(y, naive(x, w, sizes), rtol=1e-5, atol=1e-5)
  dx, dw = pull_back(jnp.asarray(dy))
  np.testing.assert_allclose(
    dx, naive(dy, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5
  )
  ends = np.cumsum(sizes)
  for e, (size, end) in enumerate(zip(sizes, ends)):
    rows_of_group = slice(end - size, end)
    want = x[rows_of_group].T.astype(np.float64) @ dy[rows_of_group]
    np.testing.assert_allclose(dw[e], want, rtol=1e-5, atol=1e-4)


def test_keeps_bfloat16():
  x = jnp.ones((8, 4), jnp.bfloat16)
  w = jnp.ones((2, 4, 3), jnp.bfloat16)
  y, pull_back = jax.vjp(
    lambda x, w: grouped_matmul(x, w, jnp.array([3, 5], jnp.int32)), x, w
  )
  assert y.dtype == jnp.bfloat16
  assert [g.dtype for g in pull_back(y)] == [jnp.bfloat16] * 2
