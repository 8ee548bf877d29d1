"""Costs against counts by hand."""

import dataclasses

from edl_jax.analysis.carve.cost import cost, cut_config
from edl_jax.config import ModelConfig

CONFIG = ModelConfig(num_layers=5, num_dense_layers=2, num_experts=12)


def test_a_cut_model_lacks_weights_and_router_columns():
  c = CONFIG
  whole, kept = cost(c, 12), cost(c, 3)
  per_expert = 3 * c.width * c.expert_width + c.width
  assert whole["parameters"] - kept["parameters"] == 3 * 9 * per_expert
  # A cut model lacks no active parameters but columns of the router.
  lost = whole["active_parameters"] - kept["active_parameters"]
  assert lost == 3 * 9 * c.width
  assert whole["share"] == 1
  assert kept["share"] == kept["parameters"] / whole["parameters"]
  assert kept["bytes"] == 4 * kept["parameters"]


def test_a_cut_configuration_changes_nothing_else():
  assert cut_config(CONFIG, 12) == CONFIG
  want = ModelConfig(num_layers=5, num_dense_layers=2, num_experts=3)
  assert cut_config(CONFIG, 3) == want
  pools = dataclasses.replace(CONFIG, pool_min=2, pool_max=8)
  assert cut_config(pools, 3) == want
