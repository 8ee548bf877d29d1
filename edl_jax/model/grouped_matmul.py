"""One grouped matrix product: rows sorted by group, one matrix per group.

A backend implements two products, `rows_product` and `weights_product`. The
derivative of the first consists of both, so one derivative serves all backends.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Backend(NamedTuple):
  """The two products of an implementation."""

  # (x_RM, w_EMF, group_sizes_E, transposed) -> y_RF: each row times the matrix
  # of its group. If transposed, the rows are (R, F) and the result is (R, M).
  rows_product: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
  # (x_RM, dy_RF, group_sizes_E) -> dw_EMF: for each group, the sum of its rows'
  # outer products, added up in float32 and returned in the dtype of the rows;
  # zero for empty groups.
  weights_product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_RM: jax.Array,
  w_EMF: jax.Array,
  group_sizes_E: jax.Array,
  backend: str | None = None,
) -> jax.Array:
  """Multiplies each group of rows with the matrix of its group.

  Differentiable in `x_RM` and `w_EMF`. The work grows with the rows in groups,
  and the memory with R, however rows are spread over groups; only the reference
  on a CPU needs more. Rows behind the last group are not computed: there the
  result and the gradient of `x_RM` are arbitrary, even NaN. Nothing else
  depends on them.

  Args:
    x_RM: rows, sorted by group.
    w_EMF: one matrix per group, of the same dtype.
    group_sizes_E: int32 rows in each group; at most R in all.
    backend: a name of `BACKENDS`. By default the one of the platform that the
      program is compiled for, which need not be the default platform.

  Returns:
    y_RF, of the same dtype.
  """
  return _product("rows_product", backend)(
    x_RM, w_EMF, group_sizes_E, transposed=False
  )


def _forward(x_RM, w_EMF, group_sizes_E, backend):
  y_RF = grouped_matmul(x_RM, w_EMF, group_sizes_E, backend)
  return y_RF, (x_RM, w_EMF, group_sizes_E)


def _backward(backend, residuals, dy_RF):
  x_RM, w_EMF, group_sizes_E = residuals
  dx_RM = _product("rows_product", backend)(
    dy_RF, w_EMF, group_sizes_E, transposed=True
  )
  dw_EMF = _product("weights_product", backend)(x_RM, dy_RF, group_sizes_E)
  return dx_RM, dw_EMF.astype(w_EMF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _product(name: str, backend: str | None) -> Callable[..., jax.Array]:
  if backend is not None:
    return getattr(BACKENDS[backend], name)

  def by_platform(*arrays: jax.Array, **settings: Any) -> jax.Array:
    tpu, cpu, reference = (
      functools.partial(getattr(BACKENDS[key], name), **settings)
      for key in ("tpu", "cpu", "reference")
    )
    return jax.lax.platform_dependent(
      *arrays, tpu=tpu, cpu=cpu, default=reference
    )

  return by_platform


# --- Reference: XLA's own ----------------------------------------------------
# GPUs run it too. On a CPU it multiplies every row with every matrix.


def _ragged_rows_product(x_RM, w_EMF, group_sizes_E, transposed):
  if transposed:
    w_EMF = w_EMF.swapaxes(1, 2)
  return jax.lax.ragged_dot(x_RM, w_EMF, group_sizes_E)


def _ragged_weights_product(x_RM, dy_RF, group_sizes_E):
  return jax.lax.ragged_dot_general(
    x_RM,
    dy_RF,
    group_sizes_E,
    jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())),
      lhs_ragged_dimensions=[0],
      rhs_group_dimensions=[],
    ),
    preferred_element_type=jnp.float32,
  ).astype(x_RM.dtype)


# --- TPU: Pallas kernels -----------------------------------------------------
# JAX ships the kernels of megablox (Gale et al., arXiv:2211.15841). Their own
# derivative is not used: it applies one tiling to three products that contract
# different dimensions.


def _tile(size: int, largest: int) -> int:
  """Returns the largest multiple of 128 up to `largest` that divides `size`.

  If there is none, the tile is the smaller of `size` and `largest`, and the
  kernels mask what lies beyond the end.
  """
  for tile in range(largest, 0, -128):
    if size % tile == 0:
      return tile
  return min(size, largest)


def _row_tile(num_rows: int, num_groups: int) -> int:
  """Returns the rows of a tile: 512, or fewer where groups are small.

  The kernels multiply a tile once for each group that has rows in it.
  """
  tile = 512
  while tile > 128 and tile * num_groups > num_rows:
    tile //= 2
  return tile


def _padded(x_RM: jax.Array, tile: int) -> jax.Array:
  """Adds rows behind the last group, because the kernels need full tiles."""
  return jnp.pad(x_RM, ((0, -x_RM.shape[0] % tile), (0, 0)))


def _pallas_rows_product(x_RM, w_EMF, group_sizes_E, transposed):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  rows, contracted = x_RM.shape
  num_groups, result = w_EMF.shape[0], w_EMF.shape[1 if transposed else 2]
  row_tile = _row_tile(rows, num_groups)
  y_RF = gmm(
    _padded(x_RM, row_tile),
    w_EMF,
    group_sizes_E,
    preferred_element_type=x_RM.dtype,
    tiling=(row_tile, _tile(contracted, 1024), _tile(result, 1024)),
    transpose_rhs=transposed,
  )
  return y_RF[:rows]


def _pallas_weights_product(x_RM, dy_RF, group_sizes_E):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  # The vector memory of a v5p must hold a tile of the result and of the
  # accumulator too, so larger tiles of rows do not fit.
  largest = 1024 // x_RM.dtype.itemsize
  row_tile = min(_row_tile(x_RM.shape[0], len(group_sizes_E)), largest)
  return tgmm(
    _padded(x_RM, row_tile).T,
    _padded(dy_RF, row_tile),
    group_sizes_E,
    # The kernel adds up in float32 whatever this says.
    preferred_element_type=x_RM.dtype,
    tiling=(row_tile, _tile(x_RM.shape[1], 1024), _tile(dy_RF.shape[1], 1024)),
  )


# --- CPU: loops over blocks of rows ------------------------------------------
# XLA's dense product runs near the machine's peak from a hundred rows on, but
# its shapes must be known at compile time. So each group is cut into full
# blocks of the largest size, and one block for the remainder, of the smallest
# size that holds it. No row is copied into a padded layout, the work is R M F
# plus at most a part of a block for each group, and a group's matrix is read
# once for all its blocks. A block's overhead costs as much as 25 to 70 of its
# rows: hence few blocks, and many sizes.

_BLOCK_SIZES = (512, 384, 256, 160, 128, 64, 32)


def _over_groups(
  num_rows: int,
  group_sizes_E: jax.Array,
  make_body: Callable[[jax.Array], Callable[..., Any]],
  carry: Any,
  overrun: bool,
) -> Any:
  """Runs a function on blocks that cover the rows of every group in turn.

  Args:
    num_rows: R.
    group_sizes_E: rows in each group.
    make_body: takes a group and returns the function that its blocks run. This
      one takes the carry, the first row of a block, its size W, and a mask (W,)
      of the rows that belong to this group and to no other block, or None where
      all do; and returns the carry.
    carry: the initial carry.
    overrun: whether a block without a mask may reach beyond its group, into
      rows that later blocks cover again. If not, the first block of each group
      has a mask, and no other block has one.

  Returns:
    The final carry.
  """
  sizes = [n for n in _BLOCK_SIZES if n <= num_rows] or [num_rows]
  end_E = jnp.cumsum(group_sizes_E)
  start_E = end_E - group_sizes_E
  # The remainder goes first; a non-empty group always has one.
  full_E = jnp.maximum(group_sizes_E - 1, 0) // sizes[0] * sizes[0]
  split_E = end_E - full_E
  # A stage is the blocks of one size: the size, whether they have masks, and
  # the row of each group where they end (their start, if there are none).
  stages = []
  row_E = start_E
  for size, smaller in zip(sizes, [*sizes[1:], 0]):
    takes_E = split_E - row_E > smaller
    if overrun:
      takes_E &= row_E + size <= num_rows
    row_E = jnp.where(takes_E, row_E + size, row_E)
    stages.append((size, not overrun, row_E))
  if overrun:  # A last stage, where a block would reach beyond the last row.
    stages.append((sizes[-1], True, split_E))
  stop_IE = jnp.stack([row_E for _, _, row_E in stages])

  def group(e, carry):
    body = make_body(e)
    state = start_E[e], carry
    for stage, (size, is_masked, _) in enumerate(stages):
      # Use a loop even for one block at most: a conditional copies its result.
      def turn(state, size=size, is_masked=is_masked):
        row, carry = state
        if not is_masked:
          return row + size, body(carry, row, size, None)
        first = jnp.minimum(row, num_rows - size)
        row_W = first + jnp.arange(size)
        inside_W = (row_W >= row) & (row_W < split_E[e])
        return row + size, body(carry, first, size, inside_W)

      state = jax.lax.while_loop(
        lambda state, stage=stage: state[0] < stop_IE[stage, e], turn, state
      )

    def full(state):
      row, carry = state
      return row + sizes[0], body(carry, row, sizes[0], None)

    state = jax.lax.while_loop(
      lambda state: state[0] < end_E[e], full, (split_E[e], state[1])
    )
    return state[1]

  return jax.lax.fori_loop(0, len(group_sizes_E), group, carry)


# Indices are never negative, so XLA need not check.
_rows = functools.partial(
  jax.lax.dynamic_slice_in_dim, allow_negative_indices=False
)


def _block_rows_product(x_RM, w_EMF, group_sizes_E, transposed):
  num_rows = x_RM.shape[0]
  contracted, result = (2, 1) if transposed else (1, 2)

  def group(e):
    w_MF = jax.lax.dynamic_index_in_dim(
      w_EMF, e, keepdims=False, allow_negative_indices=False
    )

    def block(y_RF, row, size, inside_W):
      y_WF = jax.lax.dot_general(
        _rows(x_RM, row, size), w_MF, (((1,), (contracted - 1,)), ((), ()))
      )
      if inside_W is not None:
        y_WF = jnp.where(inside_W[:, None], y_WF, _rows(y_RF, row, size))
      return jax.lax.dynamic_update_slice_in_dim(
        y_RF, y_WF, row, 0, allow_negative_indices=False
      )

    return block

  # Blocks write every row of a group. Rows that a block writes beyond its group
  # are written again by later blocks.
  y_RF = jax.lax.empty((num_rows, w_EMF.shape[result]), x_RM.dtype)
  return _over_groups(num_rows, group_sizes_E, group, y_RF, overrun=True)


def _block_weights_product(x_RM, dy_RF, group_sizes_E):
  num_rows, num_groups = x_RM.shape[0], len(group_sizes_E)

  def group(e):
    def block(dw_EMF, row, size, inside_W):
      x_WM, dy_WF = _rows(x_RM, row, size), _rows(dy_RF, row, size)
      if inside_W is not None:
        # Mask both: a row behind the groups may hold NaN, and 0 NaN is NaN.
        x_WM, dy_WF = (
          jnp.where(inside_W[:, None], rows, 0) for rows in (x_WM, dy_WF)
        )
      dw_MF = jax.lax.dot_general(
        x_WM,
        dy_WF,
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      if inside_W is None:  # Not the first block of its group.
        return dw_EMF.at[e].add(dw_MF, mode="promise_in_bounds")
      return jax.lax.dynamic_update_index_in_dim(
        dw_EMF, dw_MF, e, 0, allow_negative_indices=False
      )

    return block

  dw_EMF = jnp.zeros((num_groups, x_RM.shape[1], dy_RF.shape[1]), jnp.float32)
  dw_EMF = _over_groups(num_rows, group_sizes_E, group, dw_EMF, overrun=False)
  return dw_EMF.astype(x_RM.dtype)


BACKENDS = {
  "tpu": Backend(_pallas_rows_product, _pallas_weights_product),
  "cpu": Backend(_block_rows_product, _block_weights_product),
  "reference": Backend(_ragged_rows_product, _ragged_weights_product),
}
