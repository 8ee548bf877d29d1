"""Dispatch, experts, combine: how tokens and experts come together.

Experts are spread over the mesh axis `expert`, in order. One form of dispatch
brings experts to tokens, the others bring tokens to experts; all do the same
sums, but for the tokens that `capacity` drops:

  gather             every device is given all experts; nothing is exchanged
  ragged_all_to_all  each token travels to its active experts' devices and back
  ring               all tokens pass by all devices, and outputs add on the way
  capacity           as ragged_all_to_all, in blocks of fixed size, with drops

Functions here run where every mesh axis is manual, or outside a mesh, which
stands for an `expert` axis of size 1. The experts' hidden width may be spread
over `tensor`: outputs are then partial, and it is for the caller to add them.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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

  Rows beyond the last group are not computed: what is in them, in the outputs
  and in the gradient of `x_RM`, is arbitrary, and stays in them.
  """
  num_experts, width, _, hidden = gate_up_EM2F.shape
  # Gate and up projection are one product.
  both_RG = grouped_matmul(
    x_RM, gate_up_EM2F.reshape(num_experts, width, 2 * hidden), sizes_E
  )
  both_RG = checkpoint_name(both_RG, "experts")
  return grouped_matmul(
    swiglu(both_RG.reshape(-1, 2, hidden)), down_EFM, sizes_E
  )


# --- Rows of routed tokens ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _move(x, source, target, holes=False, lost=False):
  """Moves rows of `x`, each repeated A times; A may be 1.

  Both directions are gathers: deterministic, and faster than the scatter that
  autodiff would use.

  Args:
    x: (N, M).
    source: of each row of the result, which of the A N repeated rows it is.
    target: the inverse: of each repeated row, its place in the result.
    holes: whether `source` has indices beyond the end, for rows of zeros.
    lost: whether `target` has, for rows that are not in the result.
  """
  del lost
  return _rows(x, source // (target.shape[0] // x.shape[0]), holes)


def _rows(x, index, beyond):
  # Zeros only where need be: XLA makes a pass over all rows of it, unless the
  # consumer is a sum.
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


_move.defvjp(_move_forward, _move_backward)


def _sort(expert_R, num_experts):
  """Sorts rows by expert, and by place for the same expert.

  Returns:
    order_R, the row that comes to each place; place_R, its inverse; sizes_E,
    rows of each expert. Rows of other experts than 0 to E - 1 come last and
    are in no group.
  """
  order_R = jnp.argsort(expert_R, stable=True)
  place_R = jnp.argsort(order_R)
  sizes_E = (expert_R[:, None] == jnp.arange(num_experts)).sum(0, jnp.int32)
  return order_R, place_R, sizes_E


# --- Forms of dispatch -------------------------------------------------------


def _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, others=False):
  """Outputs of the experts at hand, y_PAM.

  Args:
    others: whether there are experts out of [0, E), whose outputs are zero.
  """
  tokens, width = x_PM.shape
  num_experts, num_rows = gate_up_EM2F.shape[0], expert_PA.size
  expert_R = expert_PA.reshape(-1)
  if others:
    known_R = (expert_R >= 0) & (expert_R < num_experts)
    expert_R = jnp.where(known_R, expert_R, num_experts)
  order_R, place_R, sizes_E = _sort(expert_R, num_experts)
  if others:
    # These rows are in no group: what becomes of them is arbitrary.
    place_R = jnp.where(known_R, place_R, num_rows)
  x_RM = _move(x_PM, order_R, place_R, lost=others)
  y_RM = _experts(x_RM, sizes_E, gate_up_EM2F, down_EFM)
  y_RM = _move(y_RM, place_R, order_R, holes=others)
  return y_RM.reshape(tokens, -1, width)


class _Route(NamedTuple):
  """Which rows go where: arguments of `jax.lax.ragged_all_to_all`."""

  input_offsets_X: jax.Array
  send_sizes_X: jax.Array
  output_offsets_X: jax.Array
  recv_sizes_X: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(x, there, back, num_rows):
  """Sends rows by the route `there`; `back` is the same way in reverse.

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


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _routes(counts_XE):
  """The ways to the experts' devices and back, from what each one sends.

  Args:
    counts_XE: rows that each device has for each expert, sorted by expert.
  """
  devices = len(counts_XE)
  me = jax.lax.axis_index(_AXIS)
  # By sender and receiver. Rows arrive sorted by sender.
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
  """Brings rows sorted by sender, then expert, into order by expert.

  Args:
    counts_XE: rows from each sender for each expert of this device.

  Returns:
    `source` and `target` of `_move`, which leave further rows where they are.
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
  # Every row of every device may come here.
  most_rows = devices * len(order_R)
  source, target = _regroup(local_XE, most_rows)

  x_RM = _exchange(_move(x_PM, order_R, place_R), there, back, most_rows)
  y_RM = _experts(
    _move(x_RM, source, target), local_XE.sum(0), gate_up_EM2F, down_EFM
  )
  y_RM = _exchange(_move(y_RM, target, source), back, there, len(order_R))
  return _move(y_RM, place_R, order_R).reshape(*expert_PA.shape, -1)


def _ring_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
  """Sums of outputs, y_PM: tokens go round all devices, and sums with them.

  While a device works on one device's tokens the next ones arrive, and the
  sums of those it worked on before. A loop, not copies of its body: only so
  does XLA keep one turn's rows in memory at a time, and send during the work.
  """
  devices, num_local = _num_devices(), gate_up_EM2F.shape[0]
  if devices == 1:
    y_PAM = _local_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM)
    return combine(y_PAM, gate_PA)
  first = jax.lax.axis_index(_AXIS) * num_local

  # Only tokens are kept for the backward pass.
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
  # Sums are one turn behind their tokens.
  return to_next(y_PM)


def _capacity_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, capacity_factor):
  """Zero outputs for what is beyond the capacity of an expert.

  Each device fills C places of every expert, earlier tokens first.
  """
  devices = _num_devices()
  num_experts = devices * gate_up_EM2F.shape[0]
  num_rows, width = expert_PA.size, x_PM.shape[1]
  # No expert gets a token twice.
  capacity = min(math.ceil(capacity_factor * num_rows / num_experts), len(x_PM))
  expert_R = expert_PA.reshape(-1)
  order_R, place_R, sizes_E = _sort(expert_R, num_experts)
  start_E = jnp.cumsum(sizes_E) - sizes_E
  # A row's turn at its expert, and from that its slot among all E C ones.
  turn_R = place_R - start_E[expert_R]
  slots = num_experts * capacity
  slot_R = jnp.where(turn_R < capacity, expert_R * capacity + turn_R, slots)
  turn_C = jnp.arange(capacity)
  taken_EC = turn_C < sizes_E[:, None]
  # Any row does where no slot is taken.
  row_EC = order_R.at[start_E[:, None] + turn_C].get(mode="clip")
  row_S = row_EC.reshape(-1)

  x_SM = _move(x_PM, row_S, slot_R, lost=True)
  x_ECM = x_SM.reshape(num_experts, capacity, width)
  if devices > 1:
    x_ECM = jax.lax.all_to_all(x_ECM, _AXIS, 0, 1, tiled=True)
  with jax.named_scope("experts"):
    both_EC2F = jnp.einsum("ECM,EMGF->ECGF", x_ECM, gate_up_EM2F)
    y_ECM = jnp.einsum("ECF,EFM->ECM", swiglu(both_EC2F), down_EFM)
  if devices > 1:
    y_ECM = jax.lax.all_to_all(y_ECM, _AXIS, 1, 0, tiled=True)
  # For the backward pass: gradients must not enter by slots not taken.
  y_ECM = jnp.where(taken_EC[..., None], y_ECM, 0)
  y_SM = y_ECM.reshape(slots, width)
  y_RM = _move(y_SM, slot_R, row_S, holes=True)
  return y_RM.reshape(*expert_PA.shape, width)


@jax.named_scope("dispatch")
def expert_outputs(
  x_PM: jax.Array,
  expert_PA: jax.Array,
  gate_up_EM2F: jax.Array,
  down_EFM: jax.Array,
  form: str = "gather",
  capacity_factor: float = 1.25,
) -> jax.Array:
  """Sends each token through its active experts.

  Args:
    x_PM: this device's tokens.
    expert_PA: int32 active experts of each token, distinct.
    gate_up_EM2F, down_EFM: weights of this device's share of the experts, for
      `gather` of all of them, in the dtype of `x_PM`.
    form: form of dispatch. Not `ring`, which returns no token's outputs.
    capacity_factor: of the form `capacity`: places of an expert over the
      tokens of this device that it would get if all got alike.

  Returns:
    y_PAM, what each active expert returns, in the dtype of `x_PM`; zeros where
    a token was dropped.
  """
  arguments = (x_PM, expert_PA, gate_up_EM2F, down_EFM)
  if form == "capacity":
    return _capacity_outputs(*arguments, capacity_factor)
  if form == "ragged_all_to_all":
    return _ragged_outputs(*arguments)
  assert form == "gather", form
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
  form: str = "gather",
  capacity_factor: float = 1.25,
) -> jax.Array:
  """Adds what each token's active experts return.

  Args:
    gate_PA: routing weights, float32.
    x_PM, expert_PA, gate_up_EM2F, down_EFM, capacity_factor: as in
      `expert_outputs`.
    form: any form of dispatch.

  Returns:
    y_PM, in the dtype of `x_PM`.
  """
  if form == "ring":
    return _ring_sums(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM)
  y_PAM = expert_outputs(
    x_PM, expert_PA, gate_up_EM2F, down_EFM, form, capacity_factor
  )
  return combine(y_PAM, gate_PA)
