"""The settings in which families of models differ, against naive float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model.cached import advance, empty_cache
from edl_jax.model.transformer import Model, abstract_model, parameter_counts
from tests.model import naive_model

SMALL = ModelConfig(
  vocabulary_size=11,
  num_layers=3,
  width=12,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  num_experts=5,
  num_active_experts=2,
  expert_width=7,
  num_dense_layers=1,
  dense_width=9,
)
FAMILIES = {
  "mixtral": {"qk_norm": "none"},
  "olmoe": {"qk_norm": "full", "gates": "raw"},
  "qwen2_moe": {
    "qk_norm": "none",
    "attention_bias": "qkv",
    "gates": "raw",
    "num_shared_experts": 2,
    "shared_expert_gate": True,
  },
  "deepseek": {
    "qk_norm": "none",
    "gates": "raw",
    "gate_scale": 2.5,
    "num_shared_experts": 2,
  },
  "tied": {"tied_embeddings": True, "attention_bias": "all"},
}
TOKENS_BT = np.random.default_rng(0).integers(0, 11, (2, 7))


def random_model(family):
  """Returns a model of the family; no parameter is 0, 1 or another's equal."""
  random = np.random.default_rng(1)
  config = dataclasses.replace(SMALL, **FAMILIES[family])

  def draw(leaf):
    return jnp.asarray(0.5 * random.standard_normal(leaf.shape, np.float32))

  return jax.tree.map(draw, abstract_model(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
  model = random_model(family)
  want = [naive_model.logits(model, row) for row in TOKENS_BT]
  np.testing.assert_allclose(model(TOKENS_BT), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_over_a_cache(family):
  model = random_model(family)
  want = [naive_model.logits(model, row) for row in TOKENS_BT]
  cache = empty_cache(model.config, 2, 7)
  last_B = jnp.zeros(2, jnp.int32)
  for t in range(7):
    positions_BT = jnp.full((2, 1), t, jnp.int32)
    logits_BV, cache, _ = advance(
      model, TOKENS_BT[:, t : t + 1], positions_BT, last_B, cache
    )
    np.testing.assert_allclose(
      logits_BV, [row[t] for row in want], rtol=2e-4, atol=2e-4
    )


def test_a_tied_head_is_active():
  tied = dataclasses.replace(SMALL, tied_embeddings=True)
  total, active = parameter_counts(SMALL)
  assert parameter_counts(tied) == (total - 11 * 12, active)
  assert Model(tied, jax.random.key(0)).head_MV is None
