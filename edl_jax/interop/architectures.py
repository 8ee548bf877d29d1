"""The model families that are read and written: one table for both directions.

An `Architecture` says how config.json names the sizes and settings of
`ModelConfig`, which settings a family fixes, and how its checkpoints name
tensors. `tensors` makes the names of all tensors from it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from edl_jax.config import Experiment, ModelConfig, UserError


class Key(NamedTuple):
  """A key of config.json, and the field of `ModelConfig` that it holds."""

  name: str
  field: str
  # Transformers' value where a file leaves the key out; None: it must be there.
  default: Any = None
  # Our value for each value of the file; None: both have the same.
  values: Mapping[Any, Any] | None = None
  # Another name under which files have it.
  alias: str = ""


_BIAS = {False: "none", True: "all"}
_GATES = {False: "raw", True: "renormalized"}
_COMMON = (
  Key("vocab_size", "vocabulary_size"),
  Key("hidden_size", "width"),
  Key("num_hidden_layers", "num_layers"),
  Key("num_attention_heads", "num_heads"),
  Key("num_experts_per_tok", "num_active_experts"),
  Key("tie_word_embeddings", "tied_embeddings", False),
)
_NORM_TOPK = Key("norm_topk_prob", "gates", False, _GATES)
_ATTENTION_BIAS = Key("attention_bias", "attention_bias", False, _BIAS)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A model family of the hub."""

  title: str
  model_type: str
  class_name: str
  keys: tuple[Key, ...]
  # Settings of ModelConfig that the family always has.
  fixed: Mapping[str, Any]
  # Keys of config.json of which one value alone is supported.
  only: Mapping[str, Any]
  # Of files that leave rope_theta out.
  rope_theta: float = 10_000.0
  # The key of the first dense layers: "mlp_only_layers",
  # "first_k_dense_replace", or "" for a family without them.
  dense: str = ""
  # The key of shared experts: "shared_expert_intermediate_size" (their width
  # together), "n_shared_experts" (their number), or "".
  shared: str = ""
  # Whether heads may have another width than hidden_size / heads.
  has_head_dim: bool = False
  # Names in a layer: of the experts, their three matrices, shared experts.
  experts: str = "mlp"
  matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
  shared_name: str = "shared_expert"


QWEN3_MOE = Architecture(
  title="Qwen3-MoE",
  model_type="qwen3_moe",
  class_name="Qwen3MoeForCausalLM",
  keys=(
    *_COMMON,
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    # Transformers 5 writes the alias.
    Key("num_experts", "num_experts", alias="num_local_experts"),
    Key("moe_intermediate_size", "expert_width"),
    _NORM_TOPK,
    _ATTENTION_BIAS,
  ),
  fixed={"qk_norm": "head"},
  only={"decoder_sparse_step": 1, "use_sliding_window": False},
  dense="mlp_only_layers",
  has_head_dim=True,
)
MIXTRAL = Architecture(
  title="Mixtral",
  model_type="mixtral",
  class_name="MixtralForCausalLM",
  keys=(
    *_COMMON,
    Key("rms_norm_eps", "norm_epsilon", 1e-5),
    Key("num_local_experts", "num_experts", alias="num_experts"),
    Key("intermediate_size", "expert_width"),
  ),
  fixed={"qk_norm": "none", "attention_bias": "none", "gates": "renormalized"},
  only={"sliding_window": None, "router_jitter_noise": 0.0},
  rope_theta=1e6,
  has_head_dim=True,
  experts="block_sparse_moe",
  matrices=("w1", "w3", "w2"),
)
OLMOE = Architecture(
  title="OLMoE",
  model_type="olmoe",
  class_name="OlmoeForCausalLM",
  keys=(
    *_COMMON,
    Key("rms_norm_eps", "norm_epsilon", 1e-5),
    Key("num_experts", "num_experts", alias="num_local_experts"),
    Key("intermediate_size", "expert_width"),
    _NORM_TOPK,
    _ATTENTION_BIAS,
  ),
  fixed={"qk_norm": "full"},
  only={"clip_qkv": None},
)
QWEN2_MOE = Architecture(
  title="Qwen2-MoE",
  model_type="qwen2_moe",
  class_name="Qwen2MoeForCausalLM",
  keys=(
    *_COMMON,
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("num_experts", "num_experts", alias="num_local_experts"),
    Key("moe_intermediate_size", "expert_width"),
    _NORM_TOPK,
    Key("qkv_bias", "attention_bias", True, {False: "none", True: "qkv"}),
  ),
  fixed={"qk_norm": "none", "shared_expert_gate": True},
  only={"decoder_sparse_step": 1, "use_sliding_window": False},
  dense="mlp_only_layers",
  shared="shared_expert_intermediate_size",
)
DEEPSEEK_MOE = Architecture(
  title="DeepSeek-MoE",
  model_type="deepseek",
  class_name="DeepseekForCausalLM",
  keys=(
    *_COMMON,
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("n_routed_experts", "num_experts"),
    Key("moe_intermediate_size", "expert_width"),
    _NORM_TOPK,
    _ATTENTION_BIAS,
  ),
  fixed={"qk_norm": "none"},
  only={"moe_layer_freq": 1, "scoring_func": "softmax"},
  dense="first_k_dense_replace",
  shared="n_shared_experts",
  shared_name="shared_experts",
)
# Export takes the first that can express a model.
ARCHITECTURES = (QWEN3_MOE, OLMOE, MIXTRAL, QWEN2_MOE, DEEPSEEK_MOE)

# Fields of how the model is computed or trained, not of what it computes.
_IMMATERIAL = frozenset(
  {
    *("dtype", "remat", "logits_elements", "scan_unroll"),
    *("pool_min", "pool_max"),
  }
)
# Fields that functions below read and write, for every architecture.
_SIZES = frozenset(
  {
    *("num_kv_heads", "head_width", "dense_width", "num_dense_layers"),
    *("num_shared_experts", "rope_theta", "rope_scaling", "rope_factor"),
    "rope_original_length",
  }
)


def known_architectures() -> str:
  """Returns the model types in words, for messages."""
  return ", ".join(each.model_type for each in ARCHITECTURES)


def obstacles(architecture: Architecture, model: ModelConfig) -> list[str]:
  """Returns why the architecture cannot express the model, if it cannot.

  A setting that a later version adds is an obstacle until it is written here.
  """
  title, found = architecture.title, []
  keys = {key.field: key for key in architecture.keys}
  for declared in dataclasses.fields(ModelConfig):
    name, value = declared.name, getattr(model, declared.name)
    if name in _IMMATERIAL | _SIZES:
      continue
    if name in keys:
      values = keys[name].values
      allowed = [value] if values is None else list(values.values())
    else:
      allowed = [architecture.fixed.get(name, declared.default)]
    if value not in allowed:
      wanted = " or ".join(map(str, allowed))
      found.append(f"model.{name}={value}: {title} needs {wanted}")
  if model.num_dense_layers and not architecture.dense:
    found.append(
      f"model.num_dense_layers={model.num_dense_layers}: {title} has no dense"
      " layers"
    )
  if model.num_shared_experts and not architecture.shared:
    found.append(
      f"model.num_shared_experts={model.num_shared_experts}: {title} has no"
      " shared experts"
    )
  if not model.num_shared_experts and architecture is QWEN2_MOE:
    found.append(f"model.num_shared_experts=0: {title} needs a shared expert")
  if (
    not architecture.has_head_dim
    and model.head_width * model.num_heads != model.width
  ):
    found.append(
      f"model.head_width={model.head_width}: {title} needs model.width /"
      " model.num_heads"
    )
  return found


def expressing(model: ModelConfig) -> Architecture:
  """Returns the architecture whose checkpoints can hold the model.

  Raises:
    UserError: there is none; says what the nearest one lacks.
  """
  tried = {each.title: obstacles(each, model) for each in ARCHITECTURES}
  for architecture in ARCHITECTURES:
    if not tried[architecture.title]:
      return architecture
  nearest = min(tried.values(), key=len)
  raise UserError(
    f"{'; '.join(nearest)}. Of {', '.join(tried)} none has all settings of this"
    " model, so it cannot be exported"
  )


def hub_config(
  architecture: Architecture,
  experiment: Experiment,
  document_start_id: int,
  dtype: str,
) -> dict[str, Any]:
  """Returns the content of config.json.

  Args:
    architecture: has no `obstacles` to the model.
    experiment: that the model was trained by.
    document_start_id: the token that begins a document and ends the one before.
    dtype: of the tensors.
  """
  model = experiment.model
  content: dict[str, Any] = {
    "architectures": [architecture.class_name],
    "attention_dropout": 0.0,
    "bos_token_id": document_start_id,
    # Transformers 4 and vLLM read torch_dtype, Transformers 5 reads dtype.
    "dtype": dtype,
    "eos_token_id": document_start_id,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": experiment.train.sequence_length,
    "model_type": architecture.model_type,
    "num_key_value_heads": model.num_kv_heads,
    "output_router_logits": False,
    "rope_scaling": _hub_rope(model),
    "rope_theta": model.rope_theta,
    "router_aux_loss_coef": experiment.losses.balance_weight,
    "torch_dtype": dtype,
    "use_cache": True,
    **architecture.only,
  }
  for key in architecture.keys:
    value = getattr(model, key.field)
    if key.values is not None:
      value = next(hub for hub, own in key.values.items() if own == value)
    content[key.name] = value
  if architecture.has_head_dim:
    content["head_dim"] = model.head_width
  if architecture.dense:
    content["intermediate_size"] = model.dense_width
    content[architecture.dense] = (
      list(range(model.num_dense_layers))
      if architecture.dense == "mlp_only_layers"
      else model.num_dense_layers
    )
  if architecture.shared == "n_shared_experts":
    content["n_shared_experts"] = model.num_shared_experts or None
  elif architecture.shared:
    content[architecture.shared] = model.num_shared_experts * model.expert_width
  return dict(sorted(content.items()))


def _hub_rope(model: ModelConfig) -> dict[str, Any] | None:
  if model.rope_scaling == "none":
    return None
  scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
  if model.rope_scaling == "yarn":
    scaling["original_max_position_embeddings"] = model.rope_original_length
  return scaling
