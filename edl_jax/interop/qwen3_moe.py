"""The model as Transformers' Qwen3-MoE: its configuration and its tensors.

The two compute one function: RMSNorm before each branch, grouped queries with
norms of queries and keys, rotary embeddings, SwiGLU experts, and gates that are
the top probabilities renormalised.
"""

from typing import Any

import jax
import numpy as np

from edl_jax import config
from edl_jax.config import Experiment, ModelConfig, UserError
from edl_jax.model.transformer import Model

# Settings that `hub_config` writes down.
_WRITTEN = frozenset(
  f"model.{name}"
  for name in (
    *("vocabulary_size", "num_layers", "width", "num_heads", "num_kv_heads"),
    *("head_width", "num_experts", "num_active_experts", "expert_width"),
    *("num_dense_layers", "dense_width", "rope_theta", "norm_epsilon"),
  )
)
# Settings of how the model is computed or trained, not of what it computes.
_IMMATERIAL = frozenset(
  f"model.{name}"
  for name in (
    *("dtype", "remat", "logits_elements", "scan_unroll"),
    *("pool_min", "pool_max"),
  )
)


def check_exportable(model: ModelConfig) -> None:
  """Checks that Qwen3-MoE can express the model.

  Raises:
    UserError: a setting has a value that Qwen3-MoE has no word for.
  """
  if model.num_shared_experts:
    raise UserError(
      f"model.num_shared_experts={model.num_shared_experts}: Qwen3-MoE has no"
      " shared experts; only models without them can be exported"
    )
  flat = config.flatten(Experiment(model=model))
  for key, value in flat.items():
    if not key.startswith("model.") or key in _WRITTEN | _IMMATERIAL:
      continue
    if value != config.FIELDS[key].default:
      raise UserError(
        f"{key}={value}: Qwen3-MoE has no such setting; only models with"
        f" {key}={config.FIELDS[key].default} can be exported"
      )


def hub_config(
  experiment: Experiment, document_start_id: int, dtype: str
) -> dict[str, Any]:
  """Returns the content of config.json.

  Args:
    experiment: that the model was trained by; `check_exportable` accepts it.
    document_start_id: the token that begins a document and ends the one before.
    dtype: of the tensors.
  """
  model = experiment.model
  return {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": document_start_id,
    "decoder_sparse_step": 1,
    # Transformers 4 and vLLM read torch_dtype, Transformers 5 reads dtype.
    "dtype": dtype,
    "eos_token_id": document_start_id,
    "head_dim": model.head_width,
    "hidden_act": "silu",
    "hidden_size": model.width,
    "initializer_range": 0.02,
    "intermediate_size": model.dense_width,
    "max_position_embeddings": experiment.train.sequence_length,
    "mlp_only_layers": list(range(model.num_dense_layers)),
    "model_type": "qwen3_moe",
    "moe_intermediate_size": model.expert_width,
    "norm_topk_prob": True,
    "num_attention_heads": model.num_heads,
    "num_experts": model.num_experts,
    "num_experts_per_tok": model.num_active_experts,
    "num_hidden_layers": model.num_layers,
    "num_key_value_heads": model.num_kv_heads,
    "output_router_logits": False,
    "rms_norm_eps": model.norm_epsilon,
    "rope_scaling": None,
    "rope_theta": model.rope_theta,
    "router_aux_loss_coef": experiment.losses.balance_weight,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": model.vocabulary_size,
  }


def tensors(model: Model) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint on the hub, by name, in layer order.

  They are views of the parameters, which must be on one CPU device: PyTorch's
  linear layers keep the matrix of outputs by inputs, and checkpoints keep every
  layer and every expert apart.
  """
  # On a CPU, NumPy shares the memory of JAX's arrays.
  views: Any = jax.tree.map(np.asarray, model)
  found = {"model.embed_tokens.weight": views.embedding_VM[...]}
  num_dense = model.config.num_dense_layers
  for layer in range(model.config.num_layers):
    if layer < num_dense:
      block, index = views.dense_blocks, layer
    else:
      block, index = views.blocks, layer - num_dense
    prefix = f"model.layers.{layer}"
    found |= _attention(block, index, prefix)
    if layer < num_dense:
      found |= _swiglu(
        block.mlp.gate_up_M2F[index], block.mlp.down_FM[index], f"{prefix}.mlp"
      )
      continue
    found[f"{prefix}.mlp.gate.weight"] = block.moe.router_ME[index].T
    experts = zip(block.moe.gate_up_EM2F[index], block.moe.down_EFM[index])
    for expert, matrices in enumerate(experts):
      found |= _swiglu(*matrices, f"{prefix}.mlp.experts.{expert}")
  found["model.norm.weight"] = views.final_norm.scale[...]
  found["lm_head.weight"] = views.head_MV[...].T
  return found


def _attention(block: Any, index: int, prefix: str) -> dict[str, np.ndarray]:
  attention = block.attention
  query_MNH, key_MKH, value_MKH, out_NHM = (
    getattr(attention, name)[index]
    for name in ("query_MNH", "key_MKH", "value_MKH", "out_NHM")
  )
  width = len(query_MNH)
  return {
    f"{prefix}.{name}.weight": tensor
    for name, tensor in {
      "input_layernorm": block.attention_norm.scale[index],
      "self_attn.q_proj": query_MNH.reshape(width, -1).T,
      "self_attn.k_proj": key_MKH.reshape(width, -1).T,
      "self_attn.v_proj": value_MKH.reshape(width, -1).T,
      "self_attn.o_proj": out_NHM.reshape(-1, width).T,
      "self_attn.q_norm": attention.query_norm.scale[index],
      "self_attn.k_norm": attention.key_norm.scale[index],
      "post_attention_layernorm": block.feed_forward_norm.scale[index],
    }.items()
  }


def _swiglu(
  gate_up_M2F: np.ndarray, down_FM: np.ndarray, prefix: str
) -> dict[str, np.ndarray]:
  return {
    f"{prefix}.gate_proj.weight": gate_up_M2F[:, 0].T,
    f"{prefix}.up_proj.weight": gate_up_M2F[:, 1].T,
    f"{prefix}.down_proj.weight": down_FM.T,
  }
