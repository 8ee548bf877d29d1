"""What a cut model costs: parameters, memory, active parameters."""

import dataclasses

from edl_jax.config import ModelConfig
from edl_jax.model.transformer import parameter_counts


def cut_config(config: ModelConfig, keep: int) -> ModelConfig:
  """Returns the configuration of a model with `keep` experts a layer.

  It has no pools: the model is a pool itself.
  """
  return dataclasses.replace(config, num_experts=keep, pool_min=0, pool_max=0)


def cost(config: ModelConfig, keep: int) -> dict[str, float]:
  """Returns the cost of a cut model.

  Returns:
    "parameters"; "share", theirs of the whole model's; "bytes" of the
    parameters in float32; and "active_parameters", which multiply each token.
  """
  total, active = parameter_counts(cut_config(config, keep))
  whole, _ = parameter_counts(config)
  return {
    "parameters": total,
    "share": total / whole,
    "bytes": 4 * total,
    "active_parameters": active,
  }
