"""Reads config.json of a checkpoint on the hub as settings of the model."""

from collections.abc import Mapping
from typing import Any

from edl_jax.config import ModelConfig, UserError
from edl_jax.interop.architectures import (
  ARCHITECTURES,
  Architecture,
  known_architectures,
)

# Keys that say nothing about the function of the model.
_HARMLESS = frozenset(
  {
    *("architectures", "attention_dropout", "auto_map", "aux_loss_alpha"),
    *("bos_token_id", "dtype", "eos_token_id", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "max_window_layers"),
    *("model_type", "output_router_logits", "pad_token_id", "pretraining_tp"),
    *("router_aux_loss_coef", "seq_aux", "sliding_window", "torch_dtype"),
    *("transformers_version", "unk_token_id", "use_cache", "_name_or_path"),
  }
)
# Keys that functions below read.
_READ = frozenset(
  {
    *("head_dim", "hidden_act", "layer_types", "num_key_value_heads"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
  }
)
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")


def architecture_of(content: Mapping[str, Any]) -> Architecture:
  """Returns the architecture that config.json names.

  Raises:
    UserError: it is none of `ARCHITECTURES`.
  """
  model_type = content.get("model_type")
  if any(content.get(key) for key in _LATENT):
    raise UserError(
      f"config.json: model_type={model_type} has multi-head latent attention,"
      f" which edl_jax has not; it imports {known_architectures()}"
    )
  for architecture in ARCHITECTURES:
    if architecture.model_type == model_type:
      return architecture
  raise UserError(
    f"config.json: model_type={model_type} is unknown; edl_jax imports"
    f" {known_architectures()}"
  )


def model_config(
  architecture: Architecture, content: Mapping[str, Any]
) -> ModelConfig:
  """Returns the settings of the model that config.json describes.

  Raises:
    UserError: a key is missing, or has a value that edl_jax cannot express.
  """
  _check_keys(architecture, content)
  settings: dict[str, Any] = dict(architecture.fixed)
  for key in architecture.keys:
    name = key.name
    if name not in content and key.alias in content:
      name = key.alias
    value = content.get(name, key.default)
    if value is None:
      raise UserError(f"config.json has no {name}")
    if key.values is not None:
      if value not in key.values:
        raise _unsupported(architecture, name, value, list(key.values))
      value = key.values[value]
    settings[key.field] = value
  heads, width = settings["num_heads"], settings["width"]
  settings["num_kv_heads"] = content.get("num_key_value_heads") or heads
  # A family without the key ignores it.
  own_width = content.get("head_dim") if architecture.has_head_dim else None
  if own_width is None and width % heads:
    raise UserError(
      f"config.json: hidden_size={width} is not a multiple of"
      f" num_attention_heads={heads}"
    )
  settings["head_width"] = own_width or width // heads
  settings |= _dense_layers(architecture, content)
  settings |= _shared_experts(architecture, content, settings["expert_width"])
  settings |= _rope(architecture, content)
  return ModelConfig(**settings)


def _unsupported(
  architecture: Architecture, name: str, value: Any, wanted: list[Any]
) -> UserError:
  shown = " or ".join(map(str, wanted))
  return UserError(
    f"config.json: {name}={value} of {architecture.title} is not supported;"
    f" edl_jax has {name}={shown}"
  )


def _check_keys(architecture: Architecture, content: Mapping[str, Any]) -> None:
  """Raises UserError for a key that is unknown, or has an unsupported value."""
  for name, wanted in {"hidden_act": "silu", **architecture.only}.items():
    value = content.get(name, wanted)
    if value != wanted:
      raise _unsupported(architecture, name, value, [wanted])
  layers = content.get("layer_types") or []
  for kind in layers:
    if kind != "full_attention":
      raise _unsupported(architecture, "layer_types", kind, ["full_attention"])
  known = {key.name for key in architecture.keys} | _HARMLESS | _READ
  known |= {key.alias for key in architecture.keys}
  known |= {*architecture.only, architecture.dense, architecture.shared}
  for name, value in content.items():
    # What is off changes nothing.
    if name not in known and value not in (None, False):
      raise UserError(
        f"config.json: {name}={value!r} is unknown for {architecture.title};"
        " edl_jax cannot tell whether the model depends on it. If it does not,"
        " remove it from the file"
      )


def _dense_layers(
  architecture: Architecture, content: Mapping[str, Any]
) -> dict[str, int]:
  if not architecture.dense:
    return {}
  value = content.get(architecture.dense) or 0
  if isinstance(value, list):
    if sorted(value) != list(range(len(value))):
      raise UserError(
        f"config.json: {architecture.dense}={value}: edl_jax has first dense"
        " layers alone, such as [0, 1]"
      )
    value = len(value)
  settings = {"num_dense_layers": value}
  if value:
    if "intermediate_size" not in content:
      raise UserError("config.json has no intermediate_size")
    settings["dense_width"] = content["intermediate_size"]
  return settings


def _shared_experts(
  architecture: Architecture, content: Mapping[str, Any], expert_width: int
) -> dict[str, int]:
  if not architecture.shared:
    return {}
  value = content.get(architecture.shared) or 0
  if architecture.shared == "n_shared_experts":
    return {"num_shared_experts": value}
  count, rest = divmod(value, expert_width)
  if rest or not count:
    raise UserError(
      f"config.json: {architecture.shared}={value} must be a multiple of"
      f" moe_intermediate_size={expert_width}: edl_jax counts shared experts"
    )
  return {"num_shared_experts": count}


def _rope(
  architecture: Architecture, content: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads rope_parameters, or before Transformers 5 the two keys for it."""
  given = dict(
    content.get("rope_parameters") or content.get("rope_scaling") or {}
  )
  theta = content.get("rope_theta", architecture.rope_theta)
  settings: dict[str, Any] = {
    "rope_theta": float(given.pop("rope_theta", theta))
  }
  kinds = (given.pop("rope_type", None), given.pop("type", None))
  kind = kinds[0] or kinds[1] or "default"
  if kind != "default":
    if kind not in ("linear", "yarn"):
      raise _unsupported(
        architecture, "rope_type", kind, ["default", "linear", "yarn"]
      )
    settings |= {
      "rope_scaling": kind,
      "rope_factor": float(given.pop("factor", 1)),
    }
    original = given.pop("original_max_position_embeddings", None)
    if kind == "yarn":
      original = original or content.get("max_position_embeddings")
      settings["rope_original_length"] = original
  # Their defaults are the only values that edl_jax has.
  known = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1}
  for name, value in given.items():
    if value is not None and known.get(name) != value:
      raise UserError(
        f"config.json: {name}={value} in rope_scaling or rope_parameters is not"
        " supported"
      )
  return settings
