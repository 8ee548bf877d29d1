import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model.expert_parallel import combine, expert_outputs
from edl_jax.model.moe import GATHER, MoE

CONFIG = ModelConfig(
  width=16, num_experts=5, num_active_experts=2, expert_width=12, num_layers=2
)


def naive_experts(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
  """Every expert on every token, then a weighted choice; float64 if given."""
  y_PM = jnp.zeros_like(x_PM)
  for e in range(gate_up_EM2F.shape[0]):
    gate_PF = x_PM @ gate_up_EM2F[e, :, 0]
    up_PF = x_PM @ gate_up_EM2F[e, :, 1]
    out_PM = (gate_PF * jax.nn.sigmoid(gate_PF) * up_PF) @ down_EFM[e]
    weight_P = jnp.where(expert_PA == e, gate_PA, 0).sum(1)
    y_PM += weight_P[:, None] * out_PM
  return y_PM


@pytest.mark.parametrize(
  ("num_experts", "num_active", "idle"),
  [(5, 2, ()), (1, 1, ()), (4, 4, ()), (6, 2, (0, 3, 5)), (3, 1, (1, 2))],
)
def test_dispatch_against_a_loop(num_experts, num_active, idle):
  """Values and all gradients; `idle` experts get no token."""
  random = np.random.default_rng(0)
  tokens, width, hidden = 33, 16, 12
  used = [e for e in range(num_experts) if e not in idle]
  expert_PA = np.stack(
    [random.permutation(used)[:num_active] for _ in range(tokens)]
  ).astype(np.int32)
  arguments = [
    random.standard_normal(shape).astype(np.float32) / 3
    for shape in (
      (tokens, width),
      (tokens, num_active),
      (num_experts, width, 2, hidden),
      (num_experts, hidden, width),
    )
  ]

  def run(function):
    def loss(x, gate, gate_up, down):
      return jnp.sum(jnp.sin(function(x, expert_PA, gate, gate_up, down)))

    x, *rest = arguments
    value = jax.jit(function)(x, expert_PA, *rest)
    return value, jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)

  def ours(x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM):
    y_APM = expert_outputs(x_PM, expert_PA, gate_up_EM2F, down_EFM, GATHER)
    return combine(y_APM, gate_PA)

  got, got_gradients = run(ours)
  with jax.default_matmul_precision("highest"):
    want, want_gradients = run(naive_experts)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  for g, w in zip(got_gradients, want_gradients):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
  for e in idle:
    assert not jnp.any(got_gradients[2][e]) and not jnp.any(got_gradients[3][e])


def test_layer_against_a_naive_layer_with_shared_expert():
  config = dataclasses.replace(CONFIG, num_shared_experts=1)
  layer = MoE(config, jax.random.key(0))
  x_BTM = jax.random.normal(jax.random.key(1), (3, 7, config.width))
  weights_BT = jnp.ones((3, 7)).at[1, 4:].set(0)
  y_BTM, rows, outputs = jax.jit(lambda layer: layer(x_BTM, weights_BT))(layer)
  assert outputs is None

  probs = jax.nn.softmax(np.asarray(x_BTM) @ layer.router_ME[...])
  expert = np.argsort(-probs, axis=-1)[..., : config.num_active_experts]
  gate = np.take_along_axis(np.asarray(probs), expert, -1)
  gate /= gate.sum(-1, keepdims=True)
  want = naive_experts(
    x_BTM.reshape(-1, config.width),
    expert.reshape(-1, 2),
    gate.reshape(-1, 2),
    layer.gate_up_EM2F[...],
    layer.down_EFM[...],
  ).reshape(x_BTM.shape)
  both = jnp.einsum("BTM,MOF->BTOF", x_BTM, layer.shared.gate_up_M2F[...])
  want += (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ layer.shared.down_FM[
    ...
  ]
  np.testing.assert_allclose(y_BTM, want, rtol=1e-4, atol=1e-5)

  # Routing by row, token by token.
  for b in range(3):
    counted = [t for t in range(7) if weights_BT[b, t]]
    assert float(rows.tokens_B[b]) == len(counted)
    np.testing.assert_allclose(
      rows.probability_BE[b],
      np.mean([probs[b, t] for t in counted], axis=0),
      rtol=1e-5,
    )
    loads = np.bincount(
      np.concatenate([expert[b, t] for t in counted]),
      minlength=config.num_experts,
    )
    np.testing.assert_array_equal(rows.assignments_BE[b], loads)


def test_router_is_float32_under_bfloat16():
  layer = MoE(CONFIG, jax.random.key(0))
  x_BTM = jnp.ones((1, 2, CONFIG.width), jnp.bfloat16)
  logits, probs, _, gate = layer.route(x_BTM)
  assert {a.dtype for a in (logits, probs, gate)} == {jnp.dtype("float32")}
  y_BTM, rows, _ = layer(x_BTM, jnp.ones((1, 2)))
  assert y_BTM.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in rows)
