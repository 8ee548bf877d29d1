"""Which family can express which model, and what config.json says of it."""

import dataclasses

import pytest

from edl_jax.config import Experiment, ModelConfig, UserError
from edl_jax.interop import architectures
from edl_jax.interop.architectures import ARCHITECTURES, QWEN3_MOE, expressing
from edl_jax.interop.hub_config import architecture_of, model_config

PLAIN = {"qk_norm": "none"}
# Settings, and the title of the family that has them all.
CASES = [
  ({}, "Qwen3-MoE"),
  ({"gates": "raw", "num_dense_layers": 1}, "Qwen3-MoE"),
  ({"head_width": 16, "attention_bias": "all"}, "Qwen3-MoE"),
  ({"qk_norm": "full"}, "OLMoE"),
  ({**PLAIN, "tied_embeddings": True}, "Mixtral"),
  (
    {**PLAIN, "num_shared_experts": 2, "shared_expert_gate": True},
    "Qwen2-MoE",
  ),
  ({**PLAIN, "num_shared_experts": 2, "gates": "raw"}, "DeepSeek-MoE"),
  ({**PLAIN, "num_dense_layers": 1}, "DeepSeek-MoE"),
  (
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 512},
    "Qwen3-MoE",
  ),
  ({"rope_scaling": "linear", "rope_factor": 2.0}, "Qwen3-MoE"),
]


@pytest.mark.parametrize(("settings", "title"), CASES)
def test_config_round_trip(settings, title):
  model = ModelConfig(**settings)
  architecture = expressing(model)
  assert architecture.title == title
  hub = architectures.hub_config(
    architecture, Experiment(model=model), 3, "float32"
  )
  assert architecture_of(hub) is architecture
  again = model_config(architecture, hub)
  if not model.num_dense_layers:
    # Nothing has this width.
    again.dense_width = model.dense_width
  if model.rope_scaling != "yarn":
    again.rope_original_length = model.rope_original_length
  assert again == model


@pytest.mark.parametrize(
  ("settings", "reason"),
  [
    (
      {"num_shared_experts": 1},
      r"model\.num_shared_experts=1: Qwen3-MoE has no",
    ),
    ({"router": "domain"}, r"model\.router=domain: Qwen3-MoE needs learned"),
    ({"gate_scale": 2.0}, r"model\.gate_scale=2\.0: Qwen3-MoE needs 1\.0"),
    ({"balancing": "bias"}, r"model\.balancing=bias: Qwen3-MoE needs loss"),
    (
      {"qk_norm": "full", "head_width": 16},
      r"model\.head_width=16: OLMoE needs|model\.qk_norm=full: Qwen3-MoE needs",
    ),
  ],
)
def test_what_no_family_has_is_refused(settings, reason):
  with pytest.raises(UserError, match=reason) as caught:
    expressing(ModelConfig(**settings))
  assert "Of Qwen3-MoE, OLMoE, Mixtral, Qwen2-MoE, DeepSeek-MoE none" in str(
    caught.value
  )


def test_how_the_model_is_computed_does_not_matter():
  model = ModelConfig(dtype="bfloat16", remat="full", pool_min=2, pool_max=4)
  assert expressing(model) is QWEN3_MOE


def test_a_setting_that_the_table_lacks_is_refused(monkeypatch):
  """A setting that a later version adds counts as one, until it is written."""
  monkeypatch.setattr(
    architectures, "_SIZES", architectures._SIZES - {"rope_theta"}
  )
  assert expressing(ModelConfig()) is QWEN3_MOE
  with pytest.raises(UserError, match=r"model\.rope_theta=500\.0: Qwen3-MoE"):
    expressing(ModelConfig(rope_theta=500.0))


def test_names_of_settings_exist():
  fields = {field.name for field in dataclasses.fields(ModelConfig)}
  for each in ARCHITECTURES:
    named = {key.field for key in each.keys} | each.fixed.keys()
    assert named <= fields
    assert not {key.field for key in each.keys} & each.fixed.keys()
