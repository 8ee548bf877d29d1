"""config.json as the hub's checkpoints have it, and what is refused."""

import pytest

from edl_jax.config import ModelConfig, UserError
from edl_jax.interop import architectures
from edl_jax.interop.hub_config import architecture_of, model_config

# The sizes that are published for DeepSeek-MoE-16B.
DEEPSEEK_16B = {
  "architectures": ["DeepseekForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
  "aux_loss_alpha": 0.001,
  "bos_token_id": 100000,
  "eos_token_id": 100001,
  "first_k_dense_replace": 1,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 10944,
  "max_position_embeddings": 4096,
  "model_type": "deepseek",
  "moe_intermediate_size": 1408,
  "moe_layer_freq": 1,
  "n_routed_experts": 64,
  "n_shared_experts": 2,
  "norm_topk_prob": False,
  "num_attention_heads": 16,
  "num_experts_per_tok": 6,
  "num_hidden_layers": 28,
  "num_key_value_heads": 16,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 10000,
  "scoring_func": "softmax",
  "seq_aux": True,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.36.0",
  "use_cache": True,
  "vocab_size": 102400,
}
# Mixtral leaves out what is Transformers' default.
MIXTRAL = {
  "model_type": "mixtral",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "num_experts_per_tok": 2,
  "num_local_experts": 8,
  "vocab_size": 32000,
}
QWEN3 = {
  "model_type": "qwen3_moe",
  "hidden_size": 64,
  "moe_intermediate_size": 16,
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_experts_per_tok": 2,
  "num_experts": 8,
  "vocab_size": 512,
}


def read(content):
  return model_config(architecture_of(content), content)


def test_deepseek_moe_16b():
  assert read(DEEPSEEK_16B) == ModelConfig(
    vocabulary_size=102400,
    num_layers=28,
    width=2048,
    num_heads=16,
    num_kv_heads=16,
    head_width=128,
    num_experts=64,
    num_active_experts=6,
    gates="raw",
    expert_width=1408,
    num_shared_experts=2,
    num_dense_layers=1,
    dense_width=10944,
    qk_norm="none",
  )


def test_what_a_file_leaves_out_is_the_default_of_transformers():
  model = read(MIXTRAL)
  assert (model.head_width, model.rope_theta) == (128, 1e6)
  assert (model.norm_epsilon, model.gates) == (1e-5, "renormalized")
  assert read(QWEN3).num_kv_heads == 4


@pytest.mark.parametrize(
  ("base", "changes", "reason"),
  [
    (QWEN3, {"model_type": "gpt2"}, "model_type=gpt2 is unknown; edl_jax"),
    (
      QWEN3,
      {"model_type": "deepseek_v2", "kv_lora_rank": 512},
      "model_type=deepseek_v2 has multi-head latent attention",
    ),
    (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step=2 of Qwen3-MoE"),
    (QWEN3, {"use_sliding_window": True}, "use_sliding_window=True"),
    (QWEN3, {"hidden_act": "gelu"}, "edl_jax has hidden_act=silu"),
    (QWEN3, {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: edl_jax"),
    (QWEN3, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    (QWEN3, {"quantization_config": {"bits": 4}}, "quantization_config="),
    (QWEN3, {"num_experts": None}, "config.json has no num_experts"),
    (QWEN3, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
    (
      QWEN3,
      {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}},
      "beta_fast=16",
    ),
    (MIXTRAL, {"sliding_window": 4096}, "sliding_window=4096 of Mixtral"),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    (MIXTRAL, {"hidden_size": 4100}, "hidden_size=4100 is not a multiple"),
    (
      {**QWEN3, "model_type": "olmoe", "intermediate_size": 16},
      {"clip_qkv": 8.0},
      "clip_qkv=8.0 of OLMoE",
    ),
    (
      {**QWEN3, "model_type": "qwen2_moe"},
      {"shared_expert_intermediate_size": 24},
      "=24 must be a multiple of moe_intermediate_size=16",
    ),
    (DEEPSEEK_16B, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    (DEEPSEEK_16B, {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5"),
  ],
)
def test_what_edl_jax_has_not_is_refused_by_name(base, changes, reason):
  with pytest.raises(UserError, match=reason) as caught:
    read({**base, **changes})
  assert "\n" not in str(caught.value)


def test_the_message_lists_the_families():
  with pytest.raises(UserError, match=architectures.known_architectures()):
    read({})
