"""Rows of routed tokens, against loops and the derivative by scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.model import rows

TOKENS, ACTIVE, EXPERTS, WIDTH = 7, 3, 5, 4


def routed(tokens=TOKENS, active=ACTIVE):
  random = np.random.default_rng(0)
  chosen = [random.permutation(EXPERTS)[:active] for _ in range(tokens)]
  return np.array(chosen, np.int32)


def test_rows_come_expert_by_expert():
  expert_PA = routed()
  order_R, place_R, sizes_E = rows.sort(rows.by_row(expert_PA), EXPERTS)
  # Row a P + p is that of token p for its active expert a.
  pairs = [(p, a) for a in range(ACTIVE) for p in range(TOKENS)]
  want = sorted(range(len(pairs)), key=lambda r: expert_PA[pairs[r]])
  np.testing.assert_array_equal(order_R, want)
  np.testing.assert_array_equal(order_R[place_R], np.arange(len(pairs)))
  np.testing.assert_array_equal(sizes_E, np.bincount(expert_PA.reshape(-1)))


def test_rows_of_one_expert_in_the_order_of_tokens():
  expert_PA = routed()
  token_R = jnp.tile(jnp.arange(TOKENS), ACTIVE)
  order_R, _, _ = rows.sort(rows.by_row(expert_PA), EXPERTS, token_R)
  want = sorted((e, p) for p in range(TOKENS) for e in expert_PA[p])
  got = zip(rows.by_row(expert_PA)[order_R].tolist(), token_R[order_R].tolist())
  assert list(got) == want


@pytest.mark.parametrize("active", [1, ACTIVE])
@pytest.mark.parametrize("lost", [False, True])
def test_move_and_collect_are_each_others_transposes(active, lost):
  random = np.random.default_rng(1)
  expert_PA = routed(active=active)
  order_R, place_R, _ = rows.sort(rows.by_row(expert_PA), EXPERTS)
  count = len(order_R)
  if lost:  # The result lacks its last two rows.
    order_R, place_R = (
      order_R[:-2],
      jnp.where(place_R < count - 2, place_R, count),
    )
  # Entry (r, p) is 1 where row r of the result is of token p.
  matrix_RP = np.zeros((len(order_R), TOKENS), np.float32)
  for row, source in enumerate(np.asarray(order_R)):
    matrix_RP[row, source % TOKENS] = 1
  x_PM, y_RM = (
    jnp.asarray(random.standard_normal((n, WIDTH), np.float32))
    for n in matrix_RP.shape[::-1]
  )
  moved, pull_back = jax.vjp(
    lambda x: rows.move(x, order_R, place_R, False, lost), x_PM
  )
  np.testing.assert_allclose(moved, matrix_RP @ x_PM, rtol=1e-6)
  np.testing.assert_allclose(
    pull_back(y_RM)[0], matrix_RP.T @ y_RM, rtol=1e-5, atol=1e-6
  )
  collected, pull_back = jax.vjp(
    lambda y: rows.collect(y, order_R, place_R, TOKENS, lost), y_RM
  )
  np.testing.assert_allclose(
    collected, matrix_RP.T @ y_RM, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(pull_back(x_PM)[0], matrix_RP @ x_PM, rtol=1e-6)


def test_holes_are_zero_rows():
  x = jnp.ones((3, 2))
  source, target = jnp.array([2, 3, 0]), jnp.array([2, 3, 0])
  y = rows.move(x, source, target, True, True)
  np.testing.assert_array_equal(y, [[1, 1], [0, 0], [1, 1]])


def test_sums_are_float32():
  """In bfloat16 a half would vanish beside 256."""
  y = jnp.array([[256.0], [0.5], [0.5], [256.0]], jnp.bfloat16)
  identity = jnp.arange(4)
  total = rows.collect(y, identity, identity, 1)
  assert total.dtype == jnp.bfloat16
  assert float(total[0, 0]) == float(jnp.bfloat16(513.0))
