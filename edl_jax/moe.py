"""The mixture-of-experts layer: router, routed experts, shared expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.attention import fan_in_normal
from edl_jax.config import ModelConfig
from edl_jax.expert_parallel import combine, expert_outputs, swiglu
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
    both_BT2F = jnp.einsum(
      "BTM,MGF->BTGF", x_BTM, self.gate_up_M2F[...].astype(dtype)
    )
    return jnp.einsum(
      "BTF,FM->BTM", swiglu(both_BT2F), self.down_FM[...].astype(dtype)
    )


class MoE(nnx.Module):
  """Softmax top-k router with renormalised weights, and SwiGLU experts."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    router, up, down, shared = jax.random.split(key, 4)
    e, m, f = config.num_experts, config.width, config.expert_width
    residual_scale = (2 * config.num_layers) ** -0.5
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
      self.router_ME[...],
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
      experts' outputs over the global batch if these were asked for.
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
    rows = PartitionSpec(sharding.ROW_AXES)

    def local(x_BTM, expert_BTA, gate_BTA, weights_BT, gate_up_EM2F, down_EFM):
      width, active = x_BTM.shape[-1], expert_BTA.shape[-1]
      expert_PA = expert_BTA.reshape(-1, active)
      gate_PA = gate_BTA.reshape(-1, active)
      y_PAM = expert_outputs(
        x_BTM.reshape(-1, width), expert_PA, gate_up_EM2F, down_EFM
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
        gate_up_EM2F.shape[0],
        outputs_form,
      )
      return (
        combine(y_PAM, gate_PA).reshape(x_BTM.shape),
        sharding.sum_over(outputs, sharding.ROW_AXES),
      )

    return sharding.per_shard(
      local,
      (
        rows,
        rows,
        rows,
        rows,
        PartitionSpec(None, None, None, "tensor"),
        PartitionSpec(None, "tensor", None),
      ),
      (rows, PartitionSpec()),
    )(
      x_BTM,
      expert_BTA,
      gate_BTA,
      weights_BT,
      self.gate_up_EM2F[...].astype(x_BTM.dtype),
      self.down_EFM[...].astype(x_BTM.dtype),
    )
