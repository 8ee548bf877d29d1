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
from jax.ad_checkpoint import checkpoint_name

from edl_jax.config import MoEConfig
from edl_jax.model.grouped_matmul import grouped_matmul
from edl_jax.model.layers import swiglu

_AXIS = "expert"


def _num_devices() -> int:
  """The size X of the `expert` axis."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[_AXIS]


# --- Experts -----------------------------------------------------------------


@jax.named_scope("experts")
def _experts(x_RM, sizes_E, gate_up_EM2F, down_EFM):
  """Sends rows, sorted by expert, through their experts.

  Rows beyond the last group are not computed. They hold arbitrary values, in
  the outputs and in the gradient of `x_RM`, which reach no other row.
  """
  num_experts, width, _, hidden = gate_up_EM2F.shape
  # One product for gate and up: (R, 2 F).
  merged = grouped_matmul(
    x_RM, gate_up_EM2F.reshape(num_experts, width, 2 * hidden), sizes_E
  )
  merged = checkpoint_name(merged, "experts")
  return grouped_matmul(
    swiglu(merged.reshape(-1, 2, hidden)), down_EFM, sizes_E
  )


# --- Rows of routed tokens ---------------------------------------------------


def _move_primal(x, source, target, holes=False, lost=False) -> jax.Array:
  """Moves rows of `x`, each repeated A times; A may be 1.

  Both directions are gathers: deterministic, and faster than the scatter that
  autodiff would use.

  Args:
    x: rows, a matrix.
    source: for each row of the result, its index among the repeated rows.
    target: the inverse: for each repeated row, its index in the result.
    holes: whether `source` has indices beyond the end, which give zero rows.
    lost: whether `target` has them, for rows that the result lacks.
  """
  del lost
  return _rows(x, source // (target.shape[0] // x.shape[0]), holes)


def _rows(x, index, beyond):
  # Fill with zeros only if an index may lie beyond the end: it costs XLA a
  # pass over all rows, unless a sum consumes them.
  if beyond:
    return x.at[index].get(mode="fill", fill_value=0)
  return x.at[index].get(mode="promise_in_bounds")


def _move_forward(x, source, target, holes, lost):
  return _move(x, source, target, holes, lost), (x.shape, target)


def _move_backward(holes, lost, residuals, dy):
  del holes
  (num_rows, width), target = residuals
  dx = _rows(dy, target, lost).reshape(num_rows, -1, width).sum(1)
  return dx, None, None


_move = jax.custom_vjp(_move_primal, nondiff_argnums=(3, 4))
_move.defvjp(_move_forward, _move_backward)


def _sort(expert_R, num_experts):
  """Sorts rows by expert, and keeps the order among rows of one expert.

  Returns:
    order_R, the row that comes to each place; place_R, its inverse; sizes_E,
    the number of rows of each expert. Rows of experts outside [0, E) come last
    and belong to no group.
  """
  order_R = jnp.argsort(expert_R, stable=True)
  place_R = jnp.argsort(order_R)
  sizes_E = (expert_R[:, None] == jnp.arange(num_experts)).sum(0, jnp.int32)
  return order_R, place_R, sizes_E


# --- Ways of dispatch --------------------------------------------------------


def _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, others=False):
  """Returns the outputs y_PAM of the experts on this device.

  Args:
    others: whether `expert_PA` names experts outside [0, E), whose outputs are
      zero.
  """
  tokens, width = x_PM.shape
  num_experts, num_rows = gate_up_EM2F.shape[0], expert_PA.size
  expert_R = expert_PA.reshape(-1)
  if others:
    local_R = (expert_R >= 0) & (expert_R < num_experts)
    expert_R = jnp.where(local_R, expert_R, num_experts)
  order_R, place_R, sizes_E = _sort(expert_R, num_experts)
  if others:
    # Rows of other experts hold arbitrary values; make them holes, so zeros.
    place_R = jnp.where(expert_R < num_experts, place_R, num_rows)
  x_RM = _move(x_PM, order_R, place_R, lost=others)
  y_RM = _experts(x_RM, sizes_E, gate_up_EM2F, down_EFM)
  y_RM = _move(y_RM, place_R, order_R, holes=others)
  return y_RM.reshape(tokens, -1, width)


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
    `source` and `target` of `_move`, which leave all further rows in place.
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
  order_R, place_R, sizes_E = _sort(expert_PA.reshape(-1), devices * num_local)
  counts_XE = jax.lax.all_gather(sizes_E, _AXIS)
  there, back = _routes(counts_XE)
  local_XE = jax.lax.dynamic_slice_in_dim(
    counts_XE, jax.lax.axis_index(_AXIS) * num_local, num_local, axis=1
  )
  # At worst every row of every device comes here.
  most_rows = devices * len(order_R)
  source, target = _regroup(local_XE, most_rows)

  x_RM = _exchange(_move(x_PM, order_R, place_R), there, back, most_rows)
  y_RM = _experts(
    _move(x_RM, source, target), local_XE.sum(0), gate_up_EM2F, down_EFM
  )
  y_RM = _exchange(_move(y_RM, target, source), back, there, len(order_R))
  return _move(y_RM, place_R, order_R).reshape(*expert_PA.shape, -1)


def _ring_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
  """Returns sums of outputs, y_PM: tokens and their sums go round all devices.

  While a device works on some tokens, it receives the next ones, and the sums
  of those it worked on before. The scan is not unrolled, so that XLA keeps only
  one turn's rows in memory and overlaps sending with work.
  """
  devices, num_local = _num_devices(), gate_up_EM2F.shape[0]
  if devices == 1:
    y_PAM = _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM)
    return combine(y_PAM, gate_PA)
  first = jax.lax.axis_index(_AXIS) * num_local

  # The backward pass keeps tokens only, and computes the rest again.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def local_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
    y_PAM = _local_outputs(
      x_PM, expert_PA - first, gate_up_EM2F, down_EFM, others=True
    )
    return combine(y_PAM, gate_PA)

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
  """Returns outputs y_PAM, zero for tokens beyond the capacity of an expert.

  Each device fills C places of every expert, earlier tokens first.
  """
  devices = _num_devices()
  num_experts = devices * gate_up_EM2F.shape[0]
  num_rows, width = expert_PA.size, x_PM.shape[1]
  # An expert gets a token once at most, so more places would stay empty.
  capacity = min(math.ceil(capacity_factor * num_rows / num_experts), len(x_PM))
  expert_R = expert_PA.reshape(-1)
  order_R, place_R, sizes_E = _sort(expert_R, num_experts)
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

  x_UM = _move(x_PM, row_U, index_R, lost=True)
  x_ECM = x_UM.reshape(num_experts, capacity, width)
  if devices > 1:
    x_ECM = jax.lax.all_to_all(x_ECM, _AXIS, 0, 1, tiled=True)
  with jax.named_scope("experts"):
    both_EC2F = jnp.einsum("ECM,EMOF->ECOF", x_ECM, gate_up_EM2F)
    y_ECM = jnp.einsum("ECF,EFM->ECM", swiglu(both_EC2F), down_EFM)
  if devices > 1:
    y_ECM = jax.lax.all_to_all(y_ECM, _AXIS, 1, 0, tiled=True)
  # Mask empty places, so that no gradient enters through them.
  y_ECM = jnp.where(taken_EC[..., None], y_ECM, 0)
  y_UM = y_ECM.reshape(num_places, width)
  y_RM = _move(y_UM, index_R, row_U, holes=True)
  return y_RM.reshape(*expert_PA.shape, width)


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
    y_PAM, what each active expert returns, in the dtype of `x_PM`; zeros where
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
def combine(y_PAM: jax.Array, gate_PA: jax.Array) -> jax.Array:
  """Adds active experts' outputs by their float32 routing weights, (P, M)."""
  return jnp.einsum("PAM,PA->PM", y_PAM, gate_PA.astype(y_PAM.dtype))


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
  if config.dispatch == "ring":
    return _ring_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM)
  y_PAM = expert_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, config)
  return combine(y_PAM, gate_PA)


def _matrix(w, layer, expert):
  """Returns the parameter of one expert, of those of all layers."""
  start = (layer, expert, *(0 for _ in w.shape[2:]))
  return jax.lax.dynamic_slice(w, start, (1, 1, *w.shape[2:]))[0, 0]


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
  one layer would be a copy of all its experts. With as many routed tokens as
  experts it uses a grouped product, and makes that copy. Along `expert`, all
  devices see all tokens and add up what their own experts return.

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
    expert_R = jnp.clip(expert_PA, 0, num_local - 1).reshape(-1)
    active = expert_PA.shape[1]

    # A loop reads a matrix where it lies. XLA would gather them all into a new
    # array, and on TPUs lay all experts' parameters out anew for that.
    @jax.named_scope("experts")
    def one(row, y_RM):
      gate_up_M2F, down_FM = (
        _matrix(w, layer, expert_R[row]) for w in (gate_up_LEM2F, down_LEFM)
      )
      both_2F = jnp.einsum("M,MOF->OF", x_PM[row // active], gate_up_M2F)
      y_M = jnp.einsum("F,FM->M", swiglu(both_2F[None])[0], down_FM)
      return y_RM.at[row].set(y_M)

    y_RM = jnp.zeros((len(expert_R), x_PM.shape[1]), x_PM.dtype)
    y_RM = jax.lax.fori_loop(0, len(expert_R), one, y_RM)
    y_PAM = y_RM.reshape(*expert_PA.shape, -1)
  else:
    y_PAM = _local_outputs(
      *(x_PM, expert_PA, gate_up_LEM2F[layer], down_LEFM[layer]),
      others=devices > 1,
    )
  y_PM = combine(y_PAM, gate_PA)
  if devices > 1:
    y_PM = jax.lax.psum_scatter(y_PM, _AXIS, tiled=True)
  return y_PM
