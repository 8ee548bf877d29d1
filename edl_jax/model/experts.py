"""The experts of a layer, each a SwiGLU, on rows that are sorted by expert."""

import jax
from jax.ad_checkpoint import checkpoint_name

from edl_jax.model.grouped_matmul import grouped_matmul
from edl_jax.model.layers import swiglu, weighted_swiglu


@jax.named_scope("experts")
def grouped_swiglu(
  x_RM: jax.Array,
  sizes_E: jax.Array,
  gate_up_EM2F: jax.Array,
  down_EFM: jax.Array,
  gate_R: jax.Array | None = None,
) -> jax.Array:
  """Sends rows, sorted by expert, through their experts.

  Rows beyond the last group are not computed. They hold arbitrary values, in
  the outputs and in the gradients of `x_RM` and `gate_R`, which reach no other
  row.

  Args:
    x_RM: the rows.
    sizes_E: int32 number of each expert's rows.
    gate_up_EM2F, down_EFM: weights, in the dtype of `x_RM`; "2" is for gate and
      up.
    gate_R: if given, outputs are multiplied with it.

  Returns:
    (R, M), in the dtype of `x_RM`.
  """
  num_experts, width, _, hidden = gate_up_EM2F.shape
  # One product for gate and up: (R, 2 F).
  merged = grouped_matmul(
    x_RM, gate_up_EM2F.reshape(num_experts, width, 2 * hidden), sizes_E
  )
  return _down(merged, gate_R, sizes_E, down_EFM)


def _down_primal(merged, gate_R, sizes_E, down_EFM):
  """Applies SwiGLU, the gate and the down product."""
  if gate_R is None:
    hidden_RF = swiglu(merged)
  else:
    hidden_RF = weighted_swiglu(merged, gate_R)
  return grouped_matmul(hidden_RF, down_EFM, sizes_E)


def _down_forward(merged, gate_R, sizes_E, down_EFM):
  # What `model.remat=experts` keeps. `jax.checkpoint` rounds a kept array, in a
  # pass of its own, unless the backward pass alone reads it. So the forward
  # pass reads `merged`, and XLA merges what both compute.
  kept = checkpoint_name(merged, "experts")

  def down(merged, gate_R, down_EFM):
    return _down_primal(merged, gate_R, sizes_E, down_EFM)

  _, transpose = jax.vjp(down, kept, gate_R, down_EFM)
  return _down_primal(merged, gate_R, sizes_E, down_EFM), transpose


def _down_backward(transpose, dy_RM):
  dmerged, dgate_R, ddown_EFM = transpose(dy_RM)
  return dmerged, dgate_R, None, ddown_EFM


_down = jax.custom_vjp(_down_primal)
_down.defvjp(_down_forward, _down_backward)
