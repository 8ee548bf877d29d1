"""Router, dispatch, experts, combine: the mixture-of-experts layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from edl_jax import sharding
from edl_jax.attention import fan_in_normal
from edl_jax.config import ModelConfig
from edl_jax.grouped_matmul import grouped_matmul
from edl_jax.routing import OutputStats, output_stats, row_routing


class SwiGLU(nnx.Module):
  """Gated feed-forward layer (Shazeer, arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, hidden: int, key: jax.Array):
    up, down = jax.random.split(key)
    residual_scale = (2 * config.num_layers) ** -0.5
    self.gate_up_M2F = nnx.Param(
      fan_in_normal(up, (config.width, 2, hidden), config.width)
    )
    self.down_FM = nnx.Param(
      fan_in_normal(down, (hidden, config.width), hidden, residual_scale)
    )

  def __call__(self, x_BTM: jax.Array) -> jax.Array:
    dtype = x_BTM.dtype
    gate_up_M2F = sharding.gather(
      "gate_up_M2F", self.gate_up_M2F[...].astype(dtype)
    )
    down_FM = sharding.gather("down_FM", self.down_FM[...].astype(dtype))
    both_BT2F = jnp.einsum("BTM,MGF->BTGF", x_BTM, gate_up_M2F)
    y_BTM = jnp.einsum("BTF,FM->BTM", swiglu(both_BT2F), down_FM)
    return sharding.sum_over(y_BTM, ("tensor",))


@jax.custom_vjp
def swiglu(both: jax.Array) -> jax.Array:
  """Multiplies `up` by the SiLU of `gate` (Shazeer, arXiv:2002.05202).

  Keeps its argument and nothing else for the backward pass.

  Args:
    both: gate and up, (..., 2, F).

  Returns:
    The hidden activations (..., F).
  """
  return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]


def _swiglu_forward(both):
  return swiglu(both), both


def _swiglu_backward(both, dy):
  gate, up = both[..., 0, :], both[..., 1, :]
  sigmoid = jax.nn.sigmoid(gate)
  dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
  return (jnp.stack([dgate, dy * gate * sigmoid], axis=-2),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def _repeat_sorted(x_PM, order_R, place_R):
  """Returns row order_R // A of `x_PM`, (R, M), with R = P A.

  `order_R` is a permutation and `place_R` its inverse, so both directions are
  gathers: deterministic, and faster than the scatter that autodiff would use.
  """
  del place_R
  return x_PM[order_R // (order_R.shape[0] // x_PM.shape[0])]


def _repeat_sorted_forward(x_PM, order_R, place_R):
  return _repeat_sorted(x_PM, order_R, place_R), (x_PM.shape, place_R)


def _repeat_sorted_backward(residuals, dx_RM):
  (tokens, width), place_R = residuals
  return dx_RM[place_R].reshape(tokens, -1, width).sum(1), None, None


_repeat_sorted.defvjp(_repeat_sorted_forward, _repeat_sorted_backward)


@jax.custom_vjp
def _unsort(y_RM, order_R, place_R):
  """Undoes the sort: row r of the result is row place_R[r] of `y_RM`."""
  del order_R
  return y_RM[place_R]


def _unsort_forward(y_RM, order_R, place_R):
  return y_RM[place_R], order_R


def _unsort_backward(order_R, dy_RM):
  return dy_RM[order_R], None, None


_unsort.defvjp(_unsort_forward, _unsort_backward)


@jax.named_scope("dispatch")
def expert_outputs(
  x_PM: jax.Array,
  expert_PA: jax.Array,
  gate_up_EM2F: jax.Array,
  down_EFM: jax.Array,
) -> jax.Array:
  """Sends each token through its active experts.

  Dropless: whatever the routing, every token meets all its experts.

  Args:
    x_PM: tokens.
    expert_PA: int32 active experts of each token.
    gate_up_EM2F, down_EFM: expert weights, in the dtype of `x_PM`.

  Returns:
    y_PAM, what each active expert returns, in the dtype of `x_PM`.
  """
  tokens, width = x_PM.shape
  num_experts, _, _, hidden = gate_up_EM2F.shape
  expert_R = expert_PA.reshape(-1)
  order_R = jnp.argsort(expert_R, stable=True)
  place_R = jnp.argsort(order_R)
  sizes_E = (expert_R[:, None] == jnp.arange(num_experts)).sum(0, jnp.int32)

  x_RM = _repeat_sorted(x_PM, order_R, place_R)
  with jax.named_scope("experts"):
    # Gate and up projection are one product.
    both_RG = grouped_matmul(
      x_RM, gate_up_EM2F.reshape(num_experts, width, 2 * hidden), sizes_E
    )
    hidden_RF = swiglu(both_RG.reshape(-1, 2, hidden))
    y_RM = grouped_matmul(hidden_RF, down_EFM, sizes_E)
  return _unsort(y_RM, order_R, place_R).reshape(tokens, -1, width)


@jax.named_scope("dispatch")
def combine(y_PAM: jax.Array, gate_PA: jax.Array) -> jax.Array:
  """Adds active experts' outputs by their float32 routing weights, (P, M)."""
  return jnp.einsum("PAM,PA->PM", y_PAM, gate_PA.astype(y_PAM.dtype))


class MoE(nnx.Module):
  """Softmax top-k router with renormalised weights, and SwiGLU experts."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    router, up, down, shared = jax.random.split(key, 4)
    e, m, f = config.num_experts, config.width, config.expert_width
    residual_scale = (2 * config.num_layers) ** -0.5
    self._num_experts = e
    self._num_active = config.num_active_experts
    self.router_ME = nnx.Param(fan_in_normal(router, (m, e), m))
    self.gate_up_EM2F = nnx.Param(fan_in_normal(up, (e, m, 2, f), m))
    self.down_EFM = nnx.Param(fan_in_normal(down, (e, f, m), f, residual_scale))
    if config.num_shared_experts:
      self.shared = SwiGLU(config, config.num_shared_experts * f, shared)
    else:
      self.shared = None

  @jax.named_scope("router")
  def route(
    self, x_BTM: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decides which experts each token meets.

    Returns:
      logits_BTE and probs_BTE, float32; expert_BTA, int32, by falling
      probability; gate_BTA, the active probabilities renormalised to sum to 1.
    """
    # float32 throughout, and on TPU without bfloat16 passes: ties and tiny
    # divergences decide here.
    logits_BTE = jnp.einsum(
      "BTM,ME->BTE",
      x_BTM.astype(jnp.float32),
      sharding.gather("router_ME", self.router_ME[...]),
      precision=jax.lax.Precision.HIGHEST,
    )
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    top_BTA, expert_BTA = jax.lax.top_k(probs_BTE, self._num_active)
    gate_BTA = top_BTA / top_BTA.sum(-1, keepdims=True)
    return logits_BTE, probs_BTE, expert_BTA, gate_BTA

  def __call__(
    self,
    x_BTM: jax.Array,
    weights_BT: jax.Array,
    summarize: Callable[..., Any] = row_routing,
    outputs_form: str | None = None,
  ) -> tuple[jax.Array, Any, OutputStats | None]:
    """Runs the layer.

    Args:
      x_BTM: normalised residual stream.
      weights_BT: 1 where a token counts.
      summarize: takes the arguments of `row_routing`; what it returns stands
        in for the routing by row.
      outputs_form: sums the experts' outputs too, in this form of
        `routing.output_stats`.

    Returns:
      The layer's output (B, T, M), its routing by row, and the sums of the
      experts' outputs over these rows if these were asked for.
    """
    logits_BTE, probs_BTE, expert_BTA, gate_BTA = self.route(x_BTM)
    y_BTM, outputs = self._gather_dispatch(
      x_BTM, expert_BTA, gate_BTA, weights_BT, outputs_form
    )
    if self.shared is not None:
      with jax.named_scope("experts"):
        y_BTM += self.shared(x_BTM)
    with jax.named_scope("router"):
      rows = summarize(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT)
    return y_BTM, rows, outputs

  def _gather_dispatch(
    self, x_BTM, expert_BTA, gate_BTA, weights_BT, outputs_form
  ):
    """Gathers the weights to the tokens: dispatch is local to each device.

    The hidden width stays spread over `tensor`, whose partial outputs add.
    """
    width, active = x_BTM.shape[-1], expert_BTA.shape[-1]
    expert_PA = expert_BTA.reshape(-1, active)
    gate_PA = gate_BTA.reshape(-1, active)
    gate_up_EMG = self.gate_up_EM2F[...].astype(x_BTM.dtype)
    # Side by side before they are sent: then the whole is not copied.
    gate_up_EMG = gate_up_EMG.reshape(*gate_up_EMG.shape[:2], -1)
    down_EFM = self.down_EFM[...].astype(x_BTM.dtype)
    y_PAM = expert_outputs(
      x_BTM.reshape(-1, width),
      expert_PA,
      sharding.gather("gate_up_EM2F", gate_up_EMG).reshape(
        self._num_experts, width, 2, -1
      ),
      sharding.gather("down_EFM", down_EFM),
    )
    if outputs_form is None:
      y_PM = sharding.sum_over(combine(y_PAM, gate_PA), ("tensor",))
      return y_PM.reshape(x_BTM.shape), None
    # Products of outputs need them whole.
    y_PAM = sharding.sum_over(y_PAM, ("tensor",))
    outputs = output_stats(
      y_PAM,
      expert_PA,
      weights_BT.reshape(-1),
      self._num_experts,
      outputs_form,
    )
    return combine(y_PAM, gate_PA).reshape(x_BTM.shape), outputs
