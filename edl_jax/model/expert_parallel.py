"""Dispatch, experts, combine: how tokens and experts come together.

Experts are spread over the mesh axis `expert`, in order. There are four ways of
dispatch, named by `MoEConfig.dispatch`. All compute the same sums, except for
the tokens that "capacity" drops:

  gather             every device gathers all experts; tokens stay
  ragged_all_to_all  each token travels to its active experts' devices and back
  ring               tokens pass all devices in turn, and outputs add up
  capacity           an all-to-all of blocks of fixed size; drops what exceeds

Generation has few tokens at a time and a way of its own, `few_mixed_outputs`.

The functions here run where every mesh axis is manual. Outside a mesh they run
as on an `expert` axis of size 1. The experts' hidden width may be spread over
`tensor`: outputs are then partial, and the caller adds them.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from edl_jax.config import MoEConfig
from edl_jax.model import rows
from edl_jax.model.experts import grouped_swiglu
from edl_jax.model.layers import swiglu

_AXIS = "expert"


def _num_devices() -> int:
  """The size X of the `expert` axis."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[_AXIS]


# --- Ways of dispatch --------------------------------------------------------


def _sort_local(expert_PA, num_experts, others):
  """Sorts rows by expert on this device; see `rows.sort`.

  Args:
    others: whether `expert_PA` names experts outside [0, E). The places of
      their rows are beyond the end.
  """
  expert_R = rows.by_row(expert_PA)
  if not others:
    return rows.sort(expert_R, num_experts)
  is_local_R = (expert_R >= 0) & (expert_R < num_experts)
  order_R, place_R, sizes_E = rows.sort(
    jnp.where(is_local_R, expert_R, num_experts), num_experts
  )
  # Rows of other experts hold arbitrary values, which nothing may read.
  return order_R, jnp.where(is_local_R, place_R, len(expert_R)), sizes_E


def _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM):
  """Returns the outputs y_APM of the experts, all of them on this device."""
  order_R, place_R, sizes_E = _sort_local(expert_PA, len(down_EFM), False)
  x_RM = rows.move(x_PM, order_R, place_R)
  y_RM = grouped_swiglu(x_RM, sizes_E, gate_up_EM2F, down_EFM)
  y_RM = rows.move(y_RM, place_R, order_R)
  return y_RM.reshape(-1, *x_PM.shape)


def _local_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM, others=False):
  """Returns the sums of weighted outputs y_PM of the experts on this device.

  Args:
    others: whether `expert_PA` names experts outside [0, E), which add nothing.
  """
  order_R, place_R, sizes_E = _sort_local(expert_PA, len(down_EFM), others)
  x_RM = rows.move(x_PM, order_R, place_R, lost=others)
  gate_R = rows.move(rows.by_row(gate_PA), order_R, place_R, lost=others)
  y_RM = grouped_swiglu(x_RM, sizes_E, gate_up_EM2F, down_EFM, gate_R)
  return rows.collect(y_RM, order_R, place_R, len(x_PM), lost=others)


class _Route(NamedTuple):
  """Where rows go: the arguments of `jax.lax.ragged_all_to_all`."""

  input_offsets_X: jax.Array
  send_sizes_X: jax.Array
  output_offsets_X: jax.Array
  recv_sizes_X: jax.Array


def _exchange_primal(x, there, back, num_rows) -> jax.Array:
  """Sends rows along the route `there`, of which `back` is the reverse.

  Returns:
    (num_rows, M); rows that no device sends to are arbitrary.
  """
  del back
  result = jax.lax.empty((num_rows, x.shape[1]), x.dtype)
  return jax.lax.ragged_all_to_all(x, result, *there, axis_name=_AXIS)


def _exchange_forward(x, there, back, num_rows):
  return _exchange(x, there, back, num_rows), (x.shape[0], there, back)


def _exchange_backward(num_rows, residuals, dy):
  del num_rows
  num_sent, there, back = residuals
  return _exchange(dy, back, there, num_sent), None, None


_exchange = jax.custom_vjp(_exchange_primal, nondiff_argnums=(3,))
_exchange.defvjp(_exchange_forward, _exchange_backward)


def _routes(counts_XE):
  """Returns the routes to the experts' devices and back.

  Args:
    counts_XE: rows that each device has for each expert, sorted by expert.
  """
  devices = len(counts_XE)
  me = jax.lax.axis_index(_AXIS)
  # Axes are sender and receiver. Rows arrive sorted by sender.
  size_XX = counts_XE.reshape(devices, devices, -1).sum(-1)
  at_sender_XX = jnp.cumsum(size_XX, axis=1) - size_XX
  at_receiver_XX = jnp.cumsum(size_XX, axis=0) - size_XX
  there = _Route(
    at_sender_XX[me], size_XX[me], at_receiver_XX[me], size_XX[:, me]
  )
  back = _Route(
    at_receiver_XX[:, me], size_XX[:, me], at_sender_XX[:, me], size_XX[me]
  )
  return there, back


def _regroup(counts_XE, num_rows):
  """Sorts by expert the rows that arrived sorted by sender, then by expert.

  Args:
    counts_XE: rows from each sender for each expert of this device.

  Returns:
    `source` and `target` of `rows.move`, which leave all further rows in place.
  """

  def starts(sizes):
    return (jnp.cumsum(sizes) - sizes.reshape(-1)).reshape(sizes.shape)

  first_XE, sorted_XE = starts(counts_XE), starts(counts_XE.T).T
  row_R = jnp.arange(num_rows)

  def shift_of_rows(start_XE):
    since_RXE = row_R[:, None, None] - start_XE
    inside_RXE = (since_RXE >= 0) & (since_RXE < counts_XE)
    return jnp.where(inside_RXE, sorted_XE - first_XE, 0).sum((1, 2))

  return row_R - shift_of_rows(sorted_XE), row_R + shift_of_rows(first_XE)


def _ragged_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM):
  devices, num_local = _num_devices(), gate_up_EM2F.shape[0]
  if devices == 1:
    return _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM)
  order_R, place_R, sizes_E = rows.sort(
    rows.by_row(expert_PA), devices * num_local
  )
  counts_XE = jax.lax.all_gather(sizes_E, _AXIS)
  there, back = _routes(counts_XE)
  local_XE = jax.lax.dynamic_slice_in_dim(
    counts_XE, jax.lax.axis_index(_AXIS) * num_local, num_local, axis=1
  )
  # At worst every row of every device comes here.
  most_rows = devices * len(order_R)
  source, target = _regroup(local_XE, most_rows)

  x_RM = _exchange(rows.move(x_PM, order_R, place_R), there, back, most_rows)
  y_RM = grouped_swiglu(
    rows.move(x_RM, source, target), local_XE.sum(0), gate_up_EM2F, down_EFM
  )
  y_RM = _exchange(rows.move(y_RM, target, source), back, there, len(order_R))
  return rows.move(y_RM, place_R, order_R).reshape(-1, *x_PM.shape)


def _ring_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
  """Returns sums of outputs, y_PM: tokens and their sums go round all devices.

  While a device works on some tokens, it receives the next ones, and the sums
  of those it worked on before. The scan is not unrolled, so that XLA keeps only
  one turn's rows in memory and overlaps sending with work.
  """
  devices, num_local = _num_devices(), gate_up_EM2F.shape[0]
  if devices == 1:
    return _local_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM)
  first = jax.lax.axis_index(_AXIS) * num_local

  # The backward pass keeps tokens only, and computes the rest again.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def local_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
    return _local_sums(
      x_PM, expert_PA - first, gate_PA, gate_up_EM2F, down_EFM, others=True
    )

  def to_next(arrays):
    ways = [(x, (x + 1) % devices) for x in range(devices)]
    return jax.lax.ppermute(arrays, _AXIS, ways)

  def turn(carry, _):
    tokens, y_PM = carry
    local_PM = local_sums(*tokens, gate_up_EM2F, down_EFM)
    return (to_next(tokens), to_next(y_PM) + local_PM), None

  start = ((x_PM, expert_PA, gate_PA), jnp.zeros_like(x_PM))
  (_, y_PM), _ = jax.lax.scan(turn, start, length=devices)
  # Sums travel one turn behind their tokens.
  return to_next(y_PM)


def _capacity_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, capacity_factor):
  """Returns outputs y_APM, zero for tokens beyond the capacity of an expert.

  Each device fills C places of every expert, earlier tokens first.
  """
  devices = _num_devices()
  num_experts = devices * gate_up_EM2F.shape[0]
  num_rows, (tokens, width) = expert_PA.size, x_PM.shape
  # An expert gets a token once at most, so more places would stay empty.
  capacity = min(math.ceil(capacity_factor * num_rows / num_experts), tokens)
  expert_R = rows.by_row(expert_PA)
  token_R = jnp.tile(jnp.arange(tokens), expert_PA.shape[1])
  order_R, place_R, sizes_E = rows.sort(expert_R, num_experts, token_R)
  start_E = jnp.cumsum(sizes_E) - sizes_E
  # The turn of a row at its expert gives its place among all E C places.
  turn_R = place_R - start_E[expert_R]
  num_places = num_experts * capacity
  index_R = jnp.where(
    turn_R < capacity, expert_R * capacity + turn_R, num_places
  )
  turn_C = jnp.arange(capacity)
  taken_EC = turn_C < sizes_E[:, None]
  # Empty places may hold any row; they are masked below.
  row_EC = order_R.at[start_E[:, None] + turn_C].get(mode="clip")
  row_U = row_EC.reshape(-1)

  x_UM = rows.move(x_PM, row_U, index_R, lost=True)
  x_ECM = x_UM.reshape(num_experts, capacity, width)
  if devices > 1:
    x_ECM = jax.lax.all_to_all(x_ECM, _AXIS, 0, 1, tiled=True)
  with jax.named_scope("experts"):
    # One product for gate and up: (E, C, 2 F).
    merged = jnp.matmul(
      x_ECM, gate_up_EM2F.reshape(*gate_up_EM2F.shape[:2], -1)
    )
    y_ECM = jnp.einsum("ECF,EFM->ECM", swiglu(merged), down_EFM)
  if devices > 1:
    y_ECM = jax.lax.all_to_all(y_ECM, _AXIS, 1, 0, tiled=True)
  # Mask empty places, so that no gradient enters through them.
  y_ECM = jnp.where(taken_EC[..., None], y_ECM, 0)
  y_UM = y_ECM.reshape(num_places, width)
  y_RM = rows.move(y_UM, index_R, row_U, holes=True)
  return y_RM.reshape(-1, tokens, width)


@jax.named_scope("dispatch")
def expert_outputs(
  x_PM: jax.Array,
  expert_PA: jax.Array,
  gate_up_EM2F: jax.Array,
  down_EFM: jax.Array,
  config: MoEConfig,
) -> jax.Array:
  """Sends each token through its active experts.

  Args:
    x_PM: this device's tokens.
    expert_PA: int32 active experts of each token, distinct.
    gate_up_EM2F, down_EFM: weights of this device's share of the experts (for
      "gather", of all experts), in the dtype of `x_PM`.
    config: the dispatch; not "ring", which returns no token's outputs.

  Returns:
    y_APM, what each active expert returns, in the dtype of `x_PM`; zeros where
    a token was dropped.
  """
  arguments = (x_PM, expert_PA, gate_up_EM2F, down_EFM)
  if config.dispatch == "capacity":
    return _capacity_outputs(*arguments, config.capacity_factor)
  if config.dispatch == "ragged_all_to_all":
    return _ragged_outputs(*arguments)
  assert config.dispatch == "gather", config
  return _local_outputs(*arguments)


@jax.named_scope("dispatch")
def combine(y_APM: jax.Array, gate_PA: jax.Array) -> jax.Array:
  """Adds active experts' outputs by their routing weights, in float32.

  Returns:
    y_PM, in the dtype of `y_APM`.
  """
  weighted_APM = y_APM.astype(jnp.float32) * gate_PA.T[..., None]
  return weighted_APM.sum(0).astype(y_APM.dtype)


@jax.named_scope("dispatch")
def mixed_outputs(
  x_PM: jax.Array,
  expert_PA: jax.Array,
  gate_PA: jax.Array,
  gate_up_EM2F: jax.Array,
  down_EFM: jax.Array,
  config: MoEConfig,
) -> jax.Array:
  """Adds what each token's active experts return.

  Args:
    x_PM, expert_PA, gate_up_EM2F, down_EFM: as in `expert_outputs`.
    gate_PA: routing weights, float32.
    config: any dispatch.

  Returns:
    y_PM, in the dtype of `x_PM`.
  """
  arguments = (x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM)
  if config.dispatch == "gather":
    return _local_sums(*arguments)
  if config.dispatch == "ring":
    return _ring_sums(*arguments)
  # Weights stay with the tokens; only rows travel.
  y_APM = expert_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, config)
  return combine(y_APM, gate_PA)


def _matrix(w, layer, expert):
  """Returns the parameter of one expert, of those of all layers."""
  start = (layer, expert, *(0 for _ in w.shape[2:]))
  return jax.lax.dynamic_slice(w, start, (1, 1, *w.shape[2:]))[0, 0]


def _tile_rows(num_rows: int, num_experts: int) -> int:
  """Returns the rows of a tile: what an expert has on average, or more."""
  mean = -(-num_rows // num_experts)
  return max(8, 1 << (mean - 1).bit_length())


@jax.named_scope("experts")
def _tiled_experts(x_RM, gate_R, sizes_E, gate_up_LEM2F, down_LEFM, layer):
  """Sends rows, sorted by expert, through their experts, tile by tile.

  It reads the matrices of experts that have rows, and of no other, where they
  lie. Rows beyond the last group hold arbitrary values.

  Args:
    gate_R: what outputs are multiplied with.
    gate_up_LEM2F, down_LEFM: weights of all layers.
    layer: index of this one in them.
  """
  num_rows, width = x_RM.shape
  hidden, tile = down_LEFM.shape[2], _tile_rows(num_rows, len(sizes_E))
  tiles_E = -(-sizes_E // tile)
  tile_end_E, row_end_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
  row_of_first_E = row_end_E - sizes_E - tile * (tile_end_E - tiles_E)

  # A tile may reach into the next group. The next tile begins there and writes
  # those rows anew.
  def one(index, y_RM):
    expert = (index >= tile_end_E).sum()
    start = row_of_first_E[expert] + tile * index
    x_TM, gate_T = (
      jax.lax.dynamic_slice_in_dim(x, start, tile) for x in (x_RM, gate_R)
    )
    # Two products: for one, TPUs or CPUs would lay out the matrices anew.
    gate_up_2MF = [
      jax.lax.dynamic_slice(
        gate_up_LEM2F, (layer, expert, 0, half, 0), (1, 1, width, 1, hidden)
      ).reshape(width, hidden)
      for half in range(2)
    ]
    curved_TF, up_TF = (x_TM @ w_MF for w_MF in gate_up_2MF)
    hidden_TF = jax.nn.silu(curved_TF) * up_TF
    hidden_TF *= gate_T[:, None].astype(x_TM.dtype)
    y_TM = hidden_TF @ _matrix(down_LEFM, layer, expert)
    return jax.lax.dynamic_update_slice_in_dim(y_RM, y_TM, start, 0)

  # The last tile may reach beyond the end.
  x_RM, gate_R = jnp.pad(x_RM, ((0, tile), (0, 0))), jnp.pad(gate_R, (0, tile))
  y_RM = jax.lax.fori_loop(0, tile_end_E[-1], one, jnp.zeros_like(x_RM))
  return y_RM[:num_rows]


@jax.named_scope("dispatch")
def few_mixed_outputs(
  x_PM: jax.Array,
  expert_PA: jax.Array,
  gate_PA: jax.Array,
  gate_up_LEM2F: jax.Array,
  down_LEFM: jax.Array,
  layer: jax.Array | int,
) -> jax.Array:
  """Does what `mixed_outputs` does, for a few tokens.

  It reads the matrices of active experts out of those of all layers: a slice of
  one layer would be a copy of all its experts. It takes one routed token after
  another if they are fewer than the experts, else tiles of one expert's. Along
  `expert`, all devices see all tokens and add up what their own experts return.

  Args:
    x_PM, expert_PA, gate_PA: as in `mixed_outputs`.
    gate_up_LEM2F, down_LEFM: weights of this device's share of the experts.
    layer: index of this layer in them.
  """
  devices, num_local = _num_devices(), gate_up_LEM2F.shape[1]
  if devices > 1:
    x_PM, expert_PA, gate_PA = (
      jax.lax.all_gather(x, _AXIS, tiled=True)
      for x in (x_PM, expert_PA, gate_PA)
    )
    expert_PA -= jax.lax.axis_index(_AXIS) * num_local
  if expert_PA.size < num_local:
    here_PA = (expert_PA >= 0) & (expert_PA < num_local)
    gate_PA = jnp.where(here_PA, gate_PA, 0)
    expert_R = rows.by_row(jnp.clip(expert_PA, 0, num_local - 1))

    # A loop reads a matrix where it lies. XLA would gather them all into a new
    # array, and on TPUs lay all experts' parameters out anew for that.
    @jax.named_scope("experts")
    def one(row, y_RM):
      gate_up_M2F, down_FM = (
        _matrix(w, layer, expert_R[row]) for w in (gate_up_LEM2F, down_LEFM)
      )
      both_2F = jnp.einsum("M,MOF->OF", x_PM[row % len(x_PM)], gate_up_M2F)
      y_M = jnp.einsum("F,FM->M", swiglu(both_2F.reshape(-1)), down_FM)
      return y_RM.at[row].set(y_M)

    y_RM = jnp.zeros((len(expert_R), x_PM.shape[1]), x_PM.dtype)
    y_RM = jax.lax.fori_loop(0, len(expert_R), one, y_RM)
    y_PM = combine(y_RM.reshape(-1, *x_PM.shape), gate_PA)
  else:
    others = devices > 1
    order_R, place_R, sizes_E = _sort_local(expert_PA, num_local, others)
    x_RM, gate_R = (
      rows.move(x, order_R, place_R, lost=others)
      for x in (x_PM, rows.by_row(gate_PA))
    )
    y_RM = _tiled_experts(
      x_RM, gate_R, sizes_E, gate_up_LEM2F, down_LEFM, layer
    )
    y_PM = rows.collect(y_RM, order_R, place_R, len(x_PM), lost=others)
  if devices > 1:
    y_PM = jax.lax.psum_scatter(y_PM, _AXIS, tiled=True)
  return y_PM
