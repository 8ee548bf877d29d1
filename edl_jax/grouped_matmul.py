"""One grouped matrix product: rows sorted by group, one matrix per group."""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x_RM: jax.Array, w_EMF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
  """Multiplies each group of rows with the matrix of its group.

  The implementation follows the platform that the program is compiled for,
  not the default backend.

  Args:
    x_RM: rows, sorted by group.
    w_EMF: one matrix per group, of the same dtype.
    group_sizes_E: int32 rows in each group; must sum to R.

  Returns:
    y_RF, of the same dtype.
  """
  return jax.lax.platform_dependent(
    x_RM, w_EMF, group_sizes_E, tpu=jax.lax.ragged_dot, default=_block_matmul
  )


# --- CPU: a loop over blocks of rows -----------------------------------------
# Every group is cut into blocks of equal size from its first row on. A group's
# last block reads on into the rows behind it; what it writes there is garbage
# until the blocks of those rows, which come later, write over it. So no row is
# copied into a padded layout, and the work is R M F plus at most one block a
# group, however the rows are spread.


def _block_size(num_rows: int, num_groups: int) -> int:
  """Small blocks waste less at the ends of groups, large ones run faster."""
  quarter = num_rows // num_groups // 4
  return 32 if quarter <= 32 else 64 if quarter <= 64 else 128


def _blocks(num_rows: int, size: int, group_sizes_E: jax.Array):
  """Returns the number of blocks, and start row, end row and group of each.

  The end row is that of the group. Arrays are (G,), G = ceil(R / size) + E,
  enough for any sizes.
  """
  row_end_E = jnp.cumsum(group_sizes_E)
  row_start_E = row_end_E - group_sizes_E
  blocks_E = (group_sizes_E + size - 1) // size
  block_end_E = jnp.cumsum(blocks_E)
  block_G = jnp.arange(-(-num_rows // size) + len(group_sizes_E))
  group_G = jnp.searchsorted(
    block_end_E, block_G, side="right", method="compare_all"
  )
  group_G = jnp.minimum(group_G, len(group_sizes_E) - 1)
  within_G = block_G - (block_end_E - blocks_E)[group_G]
  start_G = row_start_E[group_G] + within_G * size
  return block_end_E[-1], start_G, row_end_E[group_G], group_G


def _rows(x_RM: jax.Array, start: jax.Array, size: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_RM, start, size)


def _padded(x_RM: jax.Array, size: int) -> jax.Array:
  """Adds the rows that the last block may read beyond the end."""
  return jnp.pad(x_RM, ((0, size), (0, 0)))


@jax.custom_vjp
def _block_matmul(x_RM, w_EMF, group_sizes_E):
  num_rows, num_groups = x_RM.shape[0], w_EMF.shape[0]
  size = _block_size(num_rows, num_groups)
  count, start_G, _, group_G = _blocks(num_rows, size, group_sizes_E)
  x_RM = _padded(x_RM, size)

  def body(g, y_RF):
    w_MF = jax.lax.dynamic_index_in_dim(w_EMF, group_G[g], keepdims=False)
    y_CF = jnp.dot(_rows(x_RM, start_G[g], size), w_MF)
    return jax.lax.dynamic_update_slice_in_dim(y_RF, y_CF, start_G[g], 0)

  y_RF = jnp.zeros((num_rows + size, w_EMF.shape[2]), x_RM.dtype)
  return jax.lax.fori_loop(0, count, body, y_RF)[:num_rows]


def _block_matmul_forward(x_RM, w_EMF, group_sizes_E):
  y_RF = _block_matmul(x_RM, w_EMF, group_sizes_E)
  return y_RF, (x_RM, w_EMF, group_sizes_E)


def _block_matmul_backward(residuals, dy_RF):
  x_RM, w_EMF, group_sizes_E = residuals
  dx_RM = _block_matmul(dy_RF, w_EMF.swapaxes(1, 2), group_sizes_E)

  num_rows, num_groups = x_RM.shape[0], w_EMF.shape[0]
  size = _block_size(num_rows, num_groups)
  count, start_G, end_G, group_G = _blocks(num_rows, size, group_sizes_E)
  x_RM, dy_RF = _padded(x_RM, size), _padded(dy_RF, size)

  def body(g, dw_EMF):
    x_CM = _rows(x_RM, start_G[g], size)
    inside_C = start_G[g] + jnp.arange(size) < end_G[g]
    x_CM = jnp.where(inside_C[:, None], x_CM, 0)
    dw_MF = jnp.dot(
      x_CM.T,
      _rows(dy_RF, start_G[g], size),
      preferred_element_type=jnp.float32,
    )
    return dw_EMF.at[group_G[g]].add(dw_MF)

  dw_EMF = jnp.zeros(w_EMF.shape, jnp.float32)
  dw_EMF = jax.lax.fori_loop(0, count, body, dw_EMF)
  return dx_RM, dw_EMF.astype(w_EMF.dtype), None


_block_matmul.defvjp(_block_matmul_forward, _block_matmul_backward)
