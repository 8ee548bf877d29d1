"""Where new fields of the model belong."""

from edl_jax import config


def test_moe_config_holds_only_how_tokens_and_experts_meet():
  assert [key for key in config.FIELDS if key.startswith("moe.")] == [
    "moe.dispatch",
    "moe.capacity_factor",
  ], (
    "Options that change how tokens are routed change the function that the"
    " model computes: put them into ModelConfig, where evaluation and"
    " inspection of a checkpoint see them. MoEConfig is for speed and memory."
  )
