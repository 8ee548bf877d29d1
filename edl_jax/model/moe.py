"""The mixture-of-experts layer: router, routed experts, shared expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from edl_jax import sharding
from edl_jax.config import ModelConfig, MoEConfig
from edl_jax.losses.routing import OutputStats, output_stats, row_routing
from edl_jax.model.expert_parallel import (
  combine,
  expert_outputs,
  mixed_outputs,
)
from edl_jax.model.layers import SwiGLU, fan_in_normal


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
    # Of a matrix: of more axes XLA makes a full sort on CPUs.
    top = jax.lax.top_k(
      probs_BTE.reshape(-1, self._num_experts), self._num_active
    )
    top_BTA, expert_BTA = (x.reshape(*probs_BTE.shape[:-1], -1) for x in top)
    gate_BTA = top_BTA / top_BTA.sum(-1, keepdims=True)
    return logits_BTE, probs_BTE, expert_BTA, gate_BTA

  def __call__(
    self,
    x_BTM: jax.Array,
    weights_BT: jax.Array,
    summarize: Callable[..., Any] = row_routing,
    outputs_form: str | None = None,
    config: MoEConfig = MoEConfig(),  # noqa: B008 (never changed)
  ) -> tuple[jax.Array, Any, OutputStats | None]:
    """Runs the layer.

    Args:
      x_BTM: normalised residual stream.
      weights_BT: 1 where a token counts.
      summarize: takes the arguments of `row_routing`; what it returns stands
        in for the routing by row.
      outputs_form: sums the experts' outputs too, in this form of
        `routing.output_stats`.
      config: how tokens and experts come together.

    Returns:
      The layer's output (B, T, M), its routing by row, and the sums of the
      experts' outputs over these rows if these were asked for.
    """
    logits_BTE, probs_BTE, expert_BTA, gate_BTA = self.route(x_BTM)
    y_BTM, outputs = self._dispatch(
      x_BTM, expert_BTA, gate_BTA, weights_BT, outputs_form, config
    )
    if self.shared is not None:
      with jax.named_scope("experts"):
        y_BTM += self.shared(x_BTM)
    with jax.named_scope("router"):
      rows = summarize(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT)
    return y_BTM, rows, outputs

  def _dispatch(
    self, x_BTM, expert_BTA, gate_BTA, weights_BT, outputs_form, config
  ):
    """Brings weights and tokens together.

    The hidden width stays spread over `tensor`, whose partial outputs add.
    """
    width, active = x_BTM.shape[-1], expert_BTA.shape[-1]
    x_PM = x_BTM.reshape(-1, width)
    expert_PA = expert_BTA.reshape(-1, active)
    gate_PA = gate_BTA.reshape(-1, active)
    gate_up_EMG = self.gate_up_EM2F[...].astype(x_BTM.dtype)
    # Side by side before they are sent: then the whole is not copied.
    gate_up_EMG = gate_up_EMG.reshape(*gate_up_EMG.shape[:2], -1)
    # Other forms leave experts where they are.
    axes = sharding.STORAGE_AXES if config.dispatch == "gather" else ("fsdp",)
    gate_up_EMG = sharding.gather("gate_up_EM2F", gate_up_EMG, axes)
    gate_up_EM2F = gate_up_EMG.reshape(*gate_up_EMG.shape[:2], 2, -1)
    down_EFM = self.down_EFM[...].astype(x_BTM.dtype)
    down_EFM = sharding.gather("down_EFM", down_EFM, axes)
    form = (config.dispatch, config.capacity_factor)
    if outputs_form is None:
      y_PM = mixed_outputs(
        x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM, *form
      )
      y_PM = sharding.sum_over(y_PM, ("tensor",))
      return y_PM.reshape(x_BTM.shape), None
    y_PAM = expert_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, *form)
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
