"""The mixture-of-experts layer: router, routed experts, shared expert."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from edl_jax import sharding
from edl_jax.config import ModelConfig, MoEConfig
from edl_jax.losses.routing import ROUTING_ONLY, OutputStats, Summaries
from edl_jax.model.choice import EVERY_EXPERT, Choice, document_pools, masked
from edl_jax.model.expert_parallel import (
  combine,
  expert_outputs,
  few_mixed_outputs,
  mixed_outputs,
)
from edl_jax.model.layers import SwiGLU, fan_in_normal

# The dispatch that computes the model's function anywhere, without drops.
GATHER = MoEConfig(dispatch="gather")


class MoE(nnx.Module):
  """Top-k router and SwiGLU experts.

  What changes the function of the layer is in `config`, which every caller
  shares. `MoEConfig`, an argument of each call, says how tokens and experts
  meet.
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    router, up, down, shared = jax.random.split(key, 4)
    e, m, f = config.num_experts, config.width, config.expert_width
    residual_scale = (2 * config.num_layers) ** -0.5
    self.config = config
    self.router_ME = nnx.Param(fan_in_normal(router, (m, e), m))
    if config.balancing != "loss":
      self.bias_E = nnx.Param(jnp.zeros(e, jnp.float32))
    else:
      self.bias_E = None
    self.gate_up_EM2F = nnx.Param(fan_in_normal(up, (e, m, 2, f), m))
    self.down_EFM = nnx.Param(fan_in_normal(down, (e, f, m), f, residual_scale))
    if config.num_shared_experts:
      self.shared = SwiGLU(config, config.num_shared_experts * f, shared)
    else:
      self.shared = None
    if config.shared_expert_gate:
      gate = jax.random.fold_in(shared, 0)
      self.shared_gate_M = nnx.Param(fan_in_normal(gate, (m,), m))

  @jax.named_scope("router")
  def route(
    self,
    x_BTM: jax.Array,
    weights_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    choice: Choice = EVERY_EXPERT,
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses the active experts of each token.

    A pool restricts the choice alone. The logits and probabilities returned,
    which statistics and losses see, are those without it, as in evaluation.
    Otherwise two domains would differ because their pools were drawn so, and
    the divergence loss, the balance and the z-loss would have no gradient for
    experts outside the pool.

    Args:
      x_BTM: normalised residual stream.
      weights_BT, segments_BT: which tokens count, and their documents; only
        pools need them.
      choice: the experts that may be chosen in this layer.

    Returns:
      logits_BTE and probs_BTE, float32, the latter each token's scores divided
      by their sum; expert_BTA, int32, by falling score plus bias; gate_BTA, the
      weights of these experts, which the bias does not enter.
    """
    # float32 throughout, and on TPUs without bfloat16 passes: the choice
    # depends on small differences.
    logits_BTE = jnp.einsum(
      "BTM,ME->BTE",
      x_BTM.astype(jnp.float32),
      sharding.gather("router_ME", self.router_ME[...]),
      precision=jax.lax.Precision.HIGHEST,
    )
    if cap := self.config.router_softcap:
      logits_BTE = cap * jnp.tanh(logits_BTE / cap)
    if choice.kept_LE is not None:
      logits_BTE = masked(logits_BTE, choice.kept_LE)
    if choice.kept_LBE is not None:
      logits_BTE = masked(logits_BTE, choice.kept_LBE[:, None])
    probs_BTE = scores_BTE = self._scores(logits_BTE)
    if self.config.router_scores != "softmax":
      probs_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    allowed_BTE = logits_BTE
    if choice.pool_size_LBI is not None:
      if weights_BT is None or segments_BT is None:
        raise ValueError("pools need weights_BT and segments_BT")
      pool_BTE = document_pools(
        probs_BTE, weights_BT, segments_BT, choice.pool_size_LBI
      )
      allowed_BTE = masked(logits_BTE, pool_BTE)
      scores_BTE = self._scores(allowed_BTE)
    expert_BTA, gate_BTA = self._top(scores_BTE, allowed_BTE)
    if self.config.gates == "renormalized":
      gate_BTA = gate_BTA / gate_BTA.sum(-1, keepdims=True)
    if self.config.gate_scale != 1:
      gate_BTA *= self.config.gate_scale
    return logits_BTE, probs_BTE, expert_BTA, gate_BTA

  def _scores(self, logits_BTE: jax.Array) -> jax.Array:
    """Returns the score of every expert; 0 where a logit is masked."""
    if self.config.router_scores == "sigmoid":
      return jax.nn.sigmoid(logits_BTE)
    return jax.nn.softmax(logits_BTE, axis=-1)

  def _top(
    self, scores_BTE: jax.Array, logits_BTE: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the active experts of each token and their scores, (B, T, A).

    The bias enters the choice alone (Wang et al., arXiv:2408.15664), and has
    no gradient.

    Args:
      scores_BTE: score of every expert.
      logits_BTE: minus infinity where an expert may not be chosen.
    """
    rank_BTE = scores_BTE
    if self.bias_E is not None:
      bias_E = jax.lax.stop_gradient(self.bias_E[...])
      # A large bias must not bring back an expert that is masked.
      rank_BTE = masked(scores_BTE + bias_E, logits_BTE > -jnp.inf)
    # top_k takes a matrix: with more axes XLA makes a full sort on CPUs.
    top = jax.lax.top_k(
      rank_BTE.reshape(-1, self.config.num_experts),
      self.config.num_active_experts,
    )
    top_BTA, expert_BTA = (x.reshape(*scores_BTE.shape[:-1], -1) for x in top)
    if self.bias_E is not None:
      top_BTA = jnp.take_along_axis(scores_BTE, expert_BTA, axis=-1)
    return expert_BTA, top_BTA

  def __call__(
    self,
    x_BTM: jax.Array,
    weights_BT: jax.Array,
    summaries: Summaries = ROUTING_ONLY,
    moe: MoEConfig = GATHER,
    segments_BT: jax.Array | None = None,
    choice: Choice = EVERY_EXPERT,
  ) -> tuple[jax.Array, Any, OutputStats | None]:
    """Runs the layer.

    Args:
      x_BTM: normalised residual stream.
      weights_BT: 1 where a token counts.
      summaries: what else to return.
      moe: how tokens and experts meet.
      segments_BT, choice: see `route`.

    Returns:
      The layer's output (B, T, M), and the results of `summaries.routing` and
      of `summaries.outputs`, None without the latter.
    """
    logits_BTE, probs_BTE, expert_BTA, gate_BTA = self.route(
      x_BTM, weights_BT, segments_BT, choice
    )
    y_BTM, outputs = self._dispatch(
      x_BTM, expert_BTA, gate_BTA, weights_BT, summaries, moe
    )
    y_BTM = self._with_shared(x_BTM, y_BTM)
    with jax.named_scope("router"):
      rows = summaries.routing(
        logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT
      )
    return y_BTM, rows, outputs

  def few(
    self,
    x_BTM: jax.Array,
    choice: Choice,
    experts_L: tuple[jax.Array, jax.Array],
    layer: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs the layer on a few tokens, without reading idle experts.

    Parameters that are spread over `fsdp` are gathered nevertheless.

    Args:
      x_BTM: normalised residual stream.
      choice: see `route`.
      experts_L: the parameters gate_up_LEM2F and down_LEFM of all layers.
      layer: index of this layer in them.

    Returns:
      The layer's output (B, T, M), and the active experts expert_BTA.
    """
    _, _, expert_BTA, gate_BTA = self.route(x_BTM, choice=choice)
    if sharding.spread_axes(("fsdp",)):
      # Any dispatch that leaves the experts on their devices.
      gate_up_EM2F, down_EFM = self._gathered_experts(
        x_BTM.dtype, MoEConfig(dispatch="ring")
      )
      experts_L, layer = (gate_up_EM2F[None], down_EFM[None]), jnp.int32(0)
    gate_up_LEM2F, down_LEFM = (x.astype(x_BTM.dtype) for x in experts_L)
    y_PM = few_mixed_outputs(
      x_BTM.reshape(-1, x_BTM.shape[-1]),
      expert_BTA.reshape(-1, expert_BTA.shape[-1]),
      gate_BTA.reshape(-1, gate_BTA.shape[-1]),
      *(gate_up_LEM2F, down_LEFM, layer),
    )
    y_BTM = sharding.sum_over(y_PM, ("tensor",)).reshape(x_BTM.shape)
    return self._with_shared(x_BTM, y_BTM), expert_BTA

  def _with_shared(self, x_BTM, y_BTM):
    """Adds what shared experts make of x_BTM to y_BTM, of routed experts."""
    if self.shared is None:
      return y_BTM
    with jax.named_scope("experts"):
      shared_BTM = self.shared(x_BTM)
      if self.config.shared_expert_gate:
        gate_BT = jnp.einsum(
          "BTM,M->BT",
          x_BTM.astype(jnp.float32),
          self.shared_gate_M[...],
          precision=jax.lax.Precision.HIGHEST,
        )
        gate_BT = jax.nn.sigmoid(gate_BT).astype(x_BTM.dtype)
        shared_BTM *= gate_BT[..., None]
      return y_BTM + shared_BTM

  def _dispatch(self, x_BTM, expert_BTA, gate_BTA, weights_BT, summaries, moe):
    """Runs the routed experts, and sums their outputs up if that is asked.

    The experts' hidden width stays spread over `tensor`, and each device's
    partial outputs are added.
    """
    width, active = x_BTM.shape[-1], expert_BTA.shape[-1]
    x_PM = x_BTM.reshape(-1, width)
    expert_PA = expert_BTA.reshape(-1, active)
    gate_PA = gate_BTA.reshape(-1, active)
    weights = self._gathered_experts(x_BTM.dtype, moe)
    if summaries.outputs is None:
      y_PM = mixed_outputs(x_PM, expert_PA, gate_PA, *weights, moe)
      y_PM = sharding.sum_over(y_PM, ("tensor",))
      return y_PM.reshape(x_BTM.shape), None
    y_APM = expert_outputs(x_PM, expert_PA, *weights, moe)
    # The sums hold products of outputs, so they need complete outputs.
    y_APM = sharding.sum_over(y_APM, ("tensor",))
    outputs = summaries.outputs(
      y_APM.swapaxes(0, 1),
      expert_PA,
      gate_PA,
      weights_BT.reshape(-1),
      self.config.num_experts,
    )
    return combine(y_APM, gate_PA).reshape(x_BTM.shape), outputs

  def _gathered_experts(
    self, dtype: jnp.dtype, moe: MoEConfig
  ) -> tuple[jax.Array, jax.Array]:
    """Returns gate_up_EM2F and down_EFM of the experts that run here."""
    gate_up_EM2F = self.gate_up_EM2F[...].astype(dtype)
    # Merge gate and up before the all-gather, which then needs no copy.
    merged = gate_up_EM2F.reshape(*gate_up_EM2F.shape[:2], -1)
    axes = sharding.gathered_axes("gate_up_EM2F", moe)
    merged = sharding.gather("gate_up_EM2F", merged, axes)
    gate_up_EM2F = merged.reshape(*merged.shape[:2], 2, -1)
    down_EFM = self.down_EFM[...].astype(dtype)
    axes = sharding.gathered_axes("down_EFM", moe)
    return gate_up_EM2F, sharding.gather("down_EFM", down_EFM, axes)
