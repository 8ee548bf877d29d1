"""The rule of the biases against a loop, and what they must not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from edl_jax import sharding
from edl_jax.config import ModelConfig, OptimizerConfig
from edl_jax.model.balancing import balanced
from edl_jax.model.choice import Choice
from edl_jax.model.moe import MoE
from edl_jax.model.transformer import Model, parameter_counts
from edl_jax.optim import trained

CONFIG = ModelConfig(
  vocabulary_size=16,
  num_layers=3,
  width=8,
  num_heads=2,
  num_kv_heads=1,
  head_width=4,
  num_experts=4,
  num_active_experts=2,
  expert_width=4,
  num_dense_layers=1,
)
BIASED = dataclasses.replace(CONFIG, balancing="bias")


def names(tree):
  return {
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }


def biased_layer(*biases):
  layer = MoE(BIASED, jax.random.key(0))
  assert layer.bias_E is not None
  layer.bias_E[...] = jnp.array(biases)
  return layer


def test_each_bias_moves_towards_the_mean_load():
  model = Model(BIASED, jax.random.key(0))
  load_LE = np.array([[4, 2, 0, 2], [1, 1, 1, 5]], np.float32)
  want_LE = np.zeros(load_LE.shape)
  for _ in range(3):
    model = balanced(model, jnp.asarray(load_LE), 0.25)
    for layer, load_E in enumerate(load_LE):
      for e, load in enumerate(load_E):
        mean = sum(load_E) / len(load_E)
        want_LE[layer, e] += 0.25 * (load < mean) - 0.25 * (load > mean)
  bias_LE = model.blocks.moe.bias_E
  assert bias_LE is not None
  np.testing.assert_array_equal(bias_LE[...], want_LE)


def test_a_model_without_biases_stays_as_it_is():
  model = Model(CONFIG, jax.random.key(0))
  after = balanced(model, jnp.ones((2, 4)).at[0, 0].set(9), 0.25)
  assert jax.tree.all(jax.tree.map(np.array_equal, after, model))
  assert not any("bias" in name for name in names(model))


def test_biases_are_no_parameters():
  model = Model(BIASED, jax.random.key(0))
  assert names(model) - names(trained(OptimizerConfig(), model)) == {
    "blocks/moe/bias_E"
  }
  assert parameter_counts(BIASED) == parameter_counts(CONFIG)


def test_a_bias_decides_the_choice_but_not_the_gates():
  layer = biased_layer(0.0, 0.0, 10.0, -10.0)
  x_BTM = jax.random.normal(jax.random.key(1), (1, 6, 8))
  _, probs_BTE, expert_BTA, gate_BTA = layer.route(x_BTM)
  assert (expert_BTA[..., 0] == 2).all() and (expert_BTA != 3).all()
  chosen_BTA = jnp.take_along_axis(probs_BTE, expert_BTA, -1)
  np.testing.assert_allclose(
    gate_BTA, chosen_BTA / chosen_BTA.sum(-1, keepdims=True), rtol=1e-6
  )


def test_a_large_bias_brings_back_no_masked_expert():
  layer = biased_layer(0.0, 0.0, 10.0, 10.0)
  kept_E = jnp.array([True, True, True, False])
  x_BTM = jax.random.normal(jax.random.key(1), (1, 6, 8))
  _, _, expert_BTA, _ = layer.route(x_BTM, choice=Choice(kept_LE=kept_E))
  assert (expert_BTA != 3).all() and (expert_BTA[..., 0] == 2).all()
  # A pool masks an expert too: each token's document has two of the four.
  ones_BT = jnp.ones((1, 6), jnp.int32)
  size_BI = jnp.full((1, 2), 2)
  _, probs_BTE, expert_BTA, _ = layer.route(
    x_BTM, ones_BT, ones_BT, Choice(pool_size_LBI=size_BI)
  )
  pool = np.argsort(-np.asarray(probs_BTE).sum((0, 1)))[:2]
  assert set(np.unique(expert_BTA)) == set(pool)
