"""The model as Qwen3-MoE: names and places of its parameters."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from edl_jax.config import Experiment, ModelConfig
from edl_jax.interop import tensors
from edl_jax.interop.architectures import (
  ARCHITECTURES,
  QWEN3_MOE,
  hub_config,
)
from edl_jax.model.transformer import Model, abstract_model

SMALL = ModelConfig(
  vocabulary_size=11,
  num_layers=3,
  width=10,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  num_experts=5,
  num_active_experts=2,
  expert_width=7,
  num_dense_layers=1,
  dense_width=9,
)


def randomised(config):
  """Returns a model without two equal parameters, norms included."""
  model = Model(config, jax.random.key(0))
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(tree, leaves)


def rms_norm(x, scale, epsilon=1e-6):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def rotated(x_TNH, theta):
  half = x_TNH.shape[-1] // 2
  angle = np.arange(len(x_TNH))[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x_TNH[..., :half], x_TNH[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Naive:
  """Qwen3-MoE in float64 for one row, by the names of the hub alone."""

  def __init__(self, tensors, hub):
    self.tensors = {k: v.astype(np.float64) for k, v in tensors.items()}
    self.hub = hub

  def linear(self, x, name):
    return x @ self.tensors[f"{name}.weight"].T

  def norm(self, x, name):
    return rms_norm(x, self.tensors[f"{name}.weight"], self.hub["rms_norm_eps"])

  def attention(self, x, name):
    length, width = len(x), self.hub["head_dim"]
    q, k, v = (
      self.linear(x, f"{name}.{part}_proj").reshape(length, -1, width)
      for part in "qkv"
    )
    theta = self.hub["rope_theta"]
    q = rotated(self.norm(q, f"{name}.q_norm"), theta)
    k = rotated(self.norm(k, f"{name}.k_norm"), theta)
    group = self.hub["num_attention_heads"] // self.hub["num_key_value_heads"]
    k, v = (np.repeat(each, group, axis=1) for each in (k, v))
    logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(width)
    logits[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("nts,snh->tnh", weights, v).reshape(length, -1)
    return self.linear(y, f"{name}.o_proj")

  def swiglu(self, x, name):
    gate = silu(self.linear(x, f"{name}.gate_proj"))
    return self.linear(
      gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj"
    )

  def experts(self, x, name):
    logits = self.linear(x, f"{name}.gate")
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.zeros_like(x)
    for t, prob in enumerate(probs):
      top = np.argsort(-prob)[: self.hub["num_experts_per_tok"]]
      for e in top:
        gate = prob[e] / prob[top].sum()
        y[t] += gate * self.swiglu(x[t], f"{name}.experts.{e}")
    return y

  def logits(self, tokens):
    x = self.tensors["model.embed_tokens.weight"][tokens]
    for layer in range(self.hub["num_hidden_layers"]):
      name = f"model.layers.{layer}"
      h = self.norm(x, f"{name}.input_layernorm")
      x = x + self.attention(h, f"{name}.self_attn")
      h = self.norm(x, f"{name}.post_attention_layernorm")
      is_dense = layer in self.hub["mlp_only_layers"]
      feed_forward = self.swiglu if is_dense else self.experts
      x = x + feed_forward(h, f"{name}.mlp")
    return self.linear(self.norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("num_dense_layers", [0, 1])
def test_a_naive_qwen3_moe_computes_the_same_logits(num_dense_layers):
  config = dataclasses.replace(SMALL, num_dense_layers=num_dense_layers)
  model = randomised(config)
  found = tensors.tensors(QWEN3_MOE, model)
  hub = hub_config(QWEN3_MOE, Experiment(model=config), 3, "float32")
  naive = Naive(found, hub)
  tokens = np.random.default_rng(0).integers(0, 11, 12)
  np.testing.assert_allclose(
    model(tokens[None])[0], naive.logits(tokens), rtol=1e-4, atol=1e-4
  )


def test_tensors_are_views_of_every_parameter():
  model = randomised(SMALL)
  found = tensors.tensors(QWEN3_MOE, model)
  assert sum(x.size for x in found.values()) == sum(
    x.size for x in jax.tree.leaves(model)
  )
  parameters = [np.asarray(x) for x in jax.tree.leaves(model)]
  for name, tensor in found.items():
    assert any(np.shares_memory(tensor, x) for x in parameters), name


def test_config_has_the_sizes_of_the_tensors():
  experiment = Experiment(model=SMALL)
  experiment.train.sequence_length = 77
  hub = hub_config(QWEN3_MOE, experiment, 3, "bfloat16")
  assert (hub["dtype"], hub["torch_dtype"]) == ("bfloat16", "bfloat16")
  assert hub["max_position_embeddings"] == 77
  assert hub["bos_token_id"] == hub["eos_token_id"] == 3
  shapes = {
    re.sub(r"\d+", "N", name): tensor.shape
    for name, tensor in tensors.tensors(QWEN3_MOE, randomised(SMALL)).items()
    if "layers.0" not in name
  }
  m, h = hub["hidden_size"], hub["head_dim"]
  n, k = hub["num_attention_heads"], hub["num_key_value_heads"]
  f, layer = hub["moe_intermediate_size"], "model.layers.N"
  assert shapes == {
    "model.embed_tokens.weight": (hub["vocab_size"], m),
    f"{layer}.input_layernorm.weight": (m,),
    f"{layer}.self_attn.q_proj.weight": (n * h, m),
    f"{layer}.self_attn.k_proj.weight": (k * h, m),
    f"{layer}.self_attn.v_proj.weight": (k * h, m),
    f"{layer}.self_attn.o_proj.weight": (m, n * h),
    f"{layer}.self_attn.q_norm.weight": (h,),
    f"{layer}.self_attn.k_norm.weight": (h,),
    f"{layer}.post_attention_layernorm.weight": (m,),
    f"{layer}.mlp.gate.weight": (hub["num_experts"], m),
    f"{layer}.mlp.experts.N.gate_proj.weight": (f, m),
    f"{layer}.mlp.experts.N.up_proj.weight": (f, m),
    f"{layer}.mlp.experts.N.down_proj.weight": (m, f),
    "model.norm.weight": (m,),
    "lm_head.weight": (hub["vocab_size"], m),
  }


SETTINGS = {
  "qwen3_moe": {"attention_bias": "all", "tied_embeddings": True},
  "olmoe": {"qk_norm": "full", "num_dense_layers": 0},
  "mixtral": {"qk_norm": "none", "num_dense_layers": 0},
  "qwen2_moe": {
    "qk_norm": "none",
    "attention_bias": "qkv",
    "num_shared_experts": 2,
    "shared_expert_gate": True,
  },
  "deepseek": {"qk_norm": "none", "num_shared_experts": 2},
}


@pytest.mark.parametrize(
  "architecture", ARCHITECTURES, ids=lambda each: each.model_type
)
def test_every_element_is_in_one_tensor(architecture):
  config = dataclasses.replace(SMALL, **SETTINGS[architecture.model_type])
  leaves = tensors.parameters(abstract_model(config))
  counts = {path: np.zeros(leaf.shape) for path, leaf in leaves.items()}
  names = set()
  for slot in tensors.slots(architecture, config):
    view = slot.view(counts[slot.parameter])
    assert view.ndim in (1, 2)
    view += 1
    names.add(slot.name)
  assert all((count == 1).all() for count in counts.values())
  assert len(names) == len(list(tensors.slots(architecture, config)))


def test_a_tensor_is_the_same_view_of_a_block():
  model = randomised(SMALL)
  arrays = {
    path: np.asarray(leaf) for path, leaf in tensors.parameters(model).items()
  }
  for slot in tensors.slots(QWEN3_MOE, SMALL):
    whole = arrays[slot.parameter]
    wanted = slot.view(whole)
    if slot.place:
      layer = slot.place[0]
      block = whole[layer : layer + 1]
      np.testing.assert_array_equal(slot.view(block, (layer,)), wanted)
      if slot.expert is not None:
        assert f"experts.{slot.expert}." in slot.name
        block = block[:, slot.expert : slot.expert + 2]
        start = (layer, slot.expert)
        np.testing.assert_array_equal(slot.view(block, start), wanted)
