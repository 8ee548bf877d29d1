"""The transformer in NumPy float64, written out in loops over tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edl_jax.config import ModelConfig
from edl_jax.model.transformer import Model


class Routed(NamedTuple):
  """What one mixture-of-experts layer did with one token."""

  # Number among the mixture-of-experts layers.
  layer: int
  probabilities: np.ndarray
  experts: np.ndarray
  gates: np.ndarray
  outputs: list[np.ndarray]


def float64(parameter, layer=None):
  array = np.asarray(parameter[...], np.float64)
  return array if layer is None else array[layer]


def rms_norm(x, scale, epsilon):
  return x / np.sqrt(np.mean(x**2) + epsilon) * scale


def rotate(x, position, theta):
  half = len(x) // 2
  turned = np.empty_like(x)
  for i in range(half):
    angle = position * theta ** (-2 * i / len(x))
    pair = complex(x[i], x[i + half]) * np.exp(1j * angle)
    turned[i], turned[i + half] = pair.real, pair.imag
  return turned


def swiglu(x, gate_up, down):
  gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
  return (gate / (1 + np.exp(-gate)) * up) @ down


def attend(x_TM, attention, layer, config: ModelConfig):
  def get(parameter):
    return float64(parameter, layer)

  def heads(x, weights_MNH, bias, norm, position):
    """Returns the heads of a token, normalised and rotated."""
    x_NH = np.einsum("m,mnh->nh", x, get(weights_MNH))
    if config.attention_bias != "none":
      x_NH = x_NH + get(bias)
    if config.qk_norm == "full":
      flat = rms_norm(x_NH.ravel(), get(norm.scale_NH).ravel(), epsilon)
      x_NH = flat.reshape(x_NH.shape)
    if config.qk_norm == "head":
      x_NH = np.array([rms_norm(h, get(norm.scale), epsilon) for h in x_NH])
    return [rotate(h, position, config.rope_theta) for h in x_NH]

  epsilon = config.norm_epsilon
  biases = dict.fromkeys(("query", "key"))
  value_bias_KH = np.zeros((config.num_kv_heads, config.head_width))
  out = np.zeros_like(x_TM)
  if config.attention_bias != "none":
    biases = {"query": attention.query_bias_NH, "key": attention.key_bias_KH}
    value_bias_KH = get(attention.value_bias_KH)
  if config.attention_bias == "all":
    out += get(attention.out_bias_M)
  query_TN, key_TK = (
    [
      heads(
        x,
        getattr(attention, letters),
        biases[name],
        getattr(attention, f"{name}_norm"),
        t,
      )
      for t, x in enumerate(x_TM)
    ]
    for name, letters in (("query", "query_MNH"), ("key", "key_MKH"))
  )
  for n in range(config.num_heads):
    k = n // (config.num_heads // config.num_kv_heads)
    queries, keys = [each[n] for each in query_TN], [each[k] for each in key_TK]
    value_MH = get(attention.value_MKH)[:, k]
    values = [x @ value_MH + value_bias_KH[k] for x in x_TM]
    for t in range(len(x_TM)):
      scores = np.array([queries[t] @ key for key in keys[: t + 1]])
      weights = np.exp(scores / np.sqrt(config.head_width))
      weights /= weights.sum()
      mixed = sum(w * value for w, value in zip(weights, values))
      out[t] += mixed @ get(attention.out_NHM)[n]
  return out


def mix_experts(x, moe, layer, config: ModelConfig, kept, routed):
  """Returns one token's output; experts that are not kept do not exist."""
  logits = x @ float64(moe.router_ME, layer)
  if config.router_softcap:
    logits = config.router_softcap * np.tanh(logits / config.router_softcap)
  known = [e for e in range(config.num_experts) if kept is None or kept[e]]
  scores = np.zeros(config.num_experts)
  if config.router_scores == "sigmoid":
    scores[known] = 1 / (1 + np.exp(-logits[known]))
  else:
    scores[known] = np.exp(logits[known]) / np.exp(logits[known]).sum()
  probs = scores / scores.sum()
  bias = 0 if moe.bias_E is None else float64(moe.bias_E, layer)
  ranked = sorted(known, key=lambda e: -(scores + bias)[e])
  chosen = np.array(ranked[: config.num_active_experts])
  gates = scores[chosen]
  if config.gates == "renormalized":
    gates = gates / gates.sum()
  gates = config.gate_scale * gates
  gate_up, down = (
    float64(parameter, layer) for parameter in (moe.gate_up_EM2F, moe.down_EFM)
  )
  outputs = [swiglu(x, gate_up[e], down[e]) for e in chosen]
  routed.append(Routed(layer, probs, chosen, gates, outputs))
  y = sum(gate * output for gate, output in zip(gates, outputs))
  if moe.shared is not None:
    shared = moe.shared
    output = swiglu(
      x, float64(shared.gate_up_M2F, layer), float64(shared.down_FM, layer)
    )
    if config.shared_expert_gate:
      logit = x @ float64(moe.shared_gate_M, layer)
      output = output / (1 + np.exp(-logit))
    y = y + output
  return y


def logits(
  model: Model,
  tokens_T: np.ndarray,
  kept: Sequence[Sequence[bool]] | None = None,
  routed: list[Routed] | None = None,
) -> np.ndarray:
  """Returns the logits (T, V) of one document.

  Args:
    model: its parameters.
    tokens_T: the document.
    kept: of each mixture-of-experts layer, whether each expert exists; None for
      all.
    routed: a list that what each layer did with each token is added to.
  """
  config = model.config
  epsilon = config.norm_epsilon
  routed = [] if routed is None else routed
  x_TM = float64(model.embedding_VM)[tokens_T]
  for index in range(config.num_layers):
    dense = index < config.num_dense_layers
    block = model.dense_blocks if dense else model.blocks
    layer = index if dense else index - config.num_dense_layers
    scale = float64(block.attention_norm.scale, layer)
    normed = np.array([rms_norm(x, scale, epsilon) for x in x_TM])
    x_TM = x_TM + attend(normed, block.attention, layer, config)
    scale = float64(block.feed_forward_norm.scale, layer)
    for t in range(len(x_TM)):
      h = rms_norm(x_TM[t], scale, epsilon)
      if dense:
        mlp = block.mlp
        y = swiglu(
          h, float64(mlp.gate_up_M2F, layer), float64(mlp.down_FM, layer)
        )
      else:
        own = None if kept is None else kept[layer]
        y = mix_experts(h, block.moe, layer, config, own, routed)
      x_TM[t] = x_TM[t] + y
  final = float64(model.final_norm.scale)
  normed = np.array([rms_norm(x, final, epsilon) for x in x_TM])
  if config.tied_embeddings:
    return normed @ float64(model.embedding_VM).T
  return normed @ float64(model.head_MV)
