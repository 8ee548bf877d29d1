"""Rows of routed tokens: sorted by expert, moved there, and added up.

Row a P + p is that of token p for its active expert a. A sum over a token's
rows then adds whole matrices (P, M). If A came last instead, TPUs would add
within tiles, which hold 8 rows.
"""

import functools

import jax
import jax.numpy as jnp


def by_row(x_PA: jax.Array) -> jax.Array:
  """Returns what tokens have for each active expert by row, (R,)."""
  return x_PA.T.reshape(-1)


def _rows(x, index, beyond):
  # Fill with zeros only if an index may lie beyond the end: it costs XLA a
  # pass over all rows, unless a sum consumes them.
  if beyond:
    return x.at[index].get(mode="fill", fill_value=0)
  return x.at[index].get(mode="promise_in_bounds")


def _repeated_rows(x, source, num_repeated, holes):
  if num_repeated == len(x):
    return _rows(x, source, holes)
  assert not holes
  return _rows(x, source % len(x), holes)


def _sums_of_rows(x, target, num_sums, lost):
  """Adds up in float32 what `_repeated_rows` repeats."""
  if target.shape[0] == num_sums:
    return _rows(x, target, lost)
  # One gather for each repetition, which the sum consumes.
  repeated = (
    _rows(x, part, lost).astype(jnp.float32)
    for part in target.reshape(-1, num_sums)
  )
  return functools.reduce(jnp.add, repeated).astype(x.dtype)


def _move_primal(x, source, target, holes=False, lost=False) -> jax.Array:
  """Moves rows of `x`, each repeated A times; A may be 1.

  Both directions are gathers: deterministic, and faster than the scatter that
  autodiff would use.

  Args:
    x: rows, a matrix; or one number a row.
    source: for each row of the result, its index among the repeated rows.
    target: the inverse: for each repeated row, its index in the result.
    holes: whether `source` has indices beyond the end, which give zero rows; A
      is then 1.
    lost: whether `target` has them, for rows that the result lacks.
  """
  del lost
  return _repeated_rows(x, source, target.shape[0], holes)


def _move_forward(x, source, target, holes, lost):
  return move(x, source, target, holes, lost), (x.shape[0], target)


def _move_backward(holes, lost, residuals, dy):
  del holes
  num_rows, target = residuals
  return _sums_of_rows(dy, target, num_rows, lost), None, None


move = jax.custom_vjp(_move_primal, nondiff_argnums=(3, 4))
move.defvjp(_move_forward, _move_backward)


def _collect_primal(y, source, target, num_rows, lost=False) -> jax.Array:
  """Adds up the rows of each token, the transpose of `move`.

  Args:
    y: rows where `move` puts them.
    source, target, lost: as in `move`.
    num_rows: of the result.
  """
  del source
  return _sums_of_rows(y, target, num_rows, lost)


def _collect_forward(y, source, target, num_rows, lost):
  return collect(y, source, target, num_rows, lost), (source, target.shape[0])


def _collect_backward(num_rows, lost, residuals, dx):
  del num_rows, lost
  source, num_repeated = residuals
  return _repeated_rows(dx, source, num_repeated, False), None, None


collect = jax.custom_vjp(_collect_primal, nondiff_argnums=(3, 4))
collect.defvjp(_collect_forward, _collect_backward)


def sort(
  expert_R: jax.Array, num_experts: int, token_R: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sorts rows by expert, and keeps the order among rows of one expert.

  Args:
    expert_R: int32 expert of each row.
    num_experts: E.
    token_R: if given, rows of one expert come in the order of their tokens.

  Returns:
    int32 order_R, the row that comes to each place; place_R, its inverse;
    sizes_E, the number of rows of each expert. Rows of experts outside [0, E)
    come last and belong to no group.
  """
  if token_R is None:
    order_R = jnp.argsort(expert_R, stable=True)
  else:
    order_R = jnp.lexsort((token_R, expert_R))
  place_R = jnp.argsort(order_R)
  sizes_E = (expert_R[:, None] == jnp.arange(num_experts)).sum(0, jnp.int32)
  return order_R, place_R, sizes_E
