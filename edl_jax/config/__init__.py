"""An experiment as typed dataclasses: fields, defaults, flat form.

Experiment files (`experiments/*.py`) import only this package and define
`get_config(variant: str = "") -> Experiment`. Nothing here touches a device.
"""

from edl_jax.config.flat import (
  FIELDS,
  GROUPS,
  check_key,
  choices,
  choose_variant,
  differing_keys,
  flatten,
  unflatten,
)
from edl_jax.config.groups import (
  DataConfig,
  Experiment,
  LossesConfig,
  MeshConfig,
  MetricsConfig,
  OptimizerConfig,
  TrainConfig,
  UserError,
)
from edl_jax.config.model import ModelConfig, MoEConfig

__all__ = [
  "FIELDS",
  "GROUPS",
  "DataConfig",
  "Experiment",
  "LossesConfig",
  "MeshConfig",
  "MetricsConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "TrainConfig",
  "UserError",
  "check_key",
  "choices",
  "choose_variant",
  "differing_keys",
  "flatten",
  "unflatten",
]
