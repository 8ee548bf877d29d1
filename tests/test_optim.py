"""Schedules in closed form, rates, and steps against AdamW in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from edl_jax.config import ModelConfig, OptimizerConfig, UserError
from edl_jax.model.transformer import abstract_model
from edl_jax.optim import (
  decays,
  make_bias_schedule,
  make_optimizer,
  make_schedule,
  merged,
  rate_factors,
  trained,
)
from edl_jax.sharding import path_name

STEPS = 100


def rate(step, **settings):
  config = OptimizerConfig(
    learning_rate=0.2, final_fraction=0.1, warmup_steps=20, **settings
  )
  return float(make_schedule(config, STEPS)(step))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_warm_up_is_linear_and_loses_no_step(schedule):
  for step in range(20):
    assert rate(step, schedule=schedule) == pytest.approx(
      0.2 * (step + 1) / 20, rel=1e-6
    )
  assert rate(STEPS, schedule=schedule) == pytest.approx(0.02, rel=1e-5)


def test_cosine_in_closed_form():
  for step in (20, 21, 50, 60, 99, 100, 130):
    share = min((step - 20) / 80, 1)
    want = 0.02 + (0.2 - 0.02) * (1 + math.cos(math.pi * share)) / 2
    assert rate(step, schedule="cosine") == pytest.approx(want, rel=1e-5)


def test_linear_in_closed_form():
  for step in (20, 50, 75, 99, 100, 130):
    want = 0.2 - (0.2 - 0.02) * min((step - 20) / 80, 1)
    assert rate(step, schedule="linear") == pytest.approx(want, rel=1e-5)


def test_wsd_in_closed_form():
  for step in (20, 50, 74, 75, 76, 90, 99, 100, 130):
    share = min(max(step - 75, 0) / 25, 1)
    want = 0.2 - (0.2 - 0.02) * share
    got = rate(step, schedule="wsd", decay_fraction=0.25)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, STEPS])
def test_extreme_warm_up(schedule, warmup):
  config = OptimizerConfig(
    learning_rate=0.2, warmup_steps=warmup, schedule=schedule
  )
  rates = [float(make_schedule(config, STEPS)(step)) for step in range(STEPS)]
  assert max(rates) == pytest.approx(0.2)
  assert min(rates) > 0
  assert rates[max(warmup - 1, 0)] == pytest.approx(0.2)


@pytest.mark.parametrize(
  ("settings", "want"),
  [
    ({}, {0: 0.01, 19: 0.01, 20: 0.01, 60: 0.01, 99: 0.01}),
    # After warm-up in proportion to the learning rate, whatever its peak.
    (
      {"bias_schedule": "learning_rate", "schedule": "linear"},
      {0: 0.01, 19: 0.01, 20: 0.01, 60: 0.0055, 100: 0.001},
    ),
    (
      {"bias_schedule": "learning_rate", "schedule": "cosine"},
      {0: 0.01, 19: 0.01, 40: 0.001 + 0.0045 * (1 + math.sqrt(0.5))},
    ),
    (
      {
        "bias_schedule": "learning_rate",
        "schedule": "wsd",
        "decay_fraction": 0.25,
      },
      {0: 0.01, 74: 0.01, 95: 0.0028, 100: 0.001},
    ),
  ],
)
def test_rate_of_biases_in_closed_form(settings, want):
  config = OptimizerConfig(
    learning_rate=0.2, warmup_steps=20, bias_rate=0.01, **settings
  )
  rate = make_bias_schedule(config, STEPS)
  got = {step: float(rate(jnp.int32(step))) for step in want}
  assert got == pytest.approx(want, rel=1e-5)


def test_decay_leaves_out_norms_only():
  config = ModelConfig(num_shared_experts=1, num_dense_layers=1)
  model = abstract_model(config)
  leaves, _ = jax.tree_util.tree_flatten_with_path(decays(model))
  excluded = sorted(path_name(path) for path, value in leaves if not value)
  assert excluded == [
    *(
      f"{blocks}/{norm}/scale"
      for blocks in ("blocks", "dense_blocks")
      for norm in (
        "attention/key_norm",
        "attention/query_norm",
        "attention_norm",
        "feed_forward_norm",
      )
    ),
    "final_norm/scale",
  ]
  assert len(leaves) > 2 * len(excluded)


def names(tree):
  return {
    path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  ("patterns", "wanted"),
  [
    ("*", lambda name: True),
    ("blocks/moe/*", lambda name: name.startswith("blocks/moe/")),
    ("*router_ME, head_MV", lambda name: name.endswith(("router_ME", "d_MV"))),
  ],
)
def test_patterns_choose_parameters_by_name(patterns, wanted):
  model = abstract_model(ModelConfig(num_dense_layers=1))
  part = trained(OptimizerConfig(trainable=patterns), model)
  assert names(part) == set(filter(wanted, names(model))) != set()
  double = lambda tree: jax.tree.map(  # noqa: E731
    lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), tree
  )
  both = jax.tree_util.tree_leaves_with_path(merged(double(part), model))
  for (path, got), old in zip(both, jax.tree.leaves(model), strict=True):
    is_new = path_name(path) in names(part)
    assert got.shape == ((2, *old.shape) if is_new else old.shape)


@pytest.mark.parametrize(
  ("patterns", "message"),
  [
    (
      "blocks/moe/router",
      "optimizer.trainable=blocks/moe/router: 'blocks/moe/router' matches no"
      " parameter; did you mean blocks/moe/router_ME?",
    ),
    ("*,", "'' matches no parameter; known: "),
    ("head_MV,x*", "'x*' matches no parameter; known: "),
  ],
)
def test_pattern_without_a_match_names_the_nearest(patterns, message):
  model = abstract_model(ModelConfig())
  with pytest.raises(UserError) as caught:
    trained(OptimizerConfig(trainable=patterns), model)
  assert message in str(caught.value)


def test_the_first_matching_pattern_sets_the_rate_of_a_part():
  model = abstract_model(ModelConfig())
  part = trained(OptimizerConfig(trainable="blocks/*,head_MV"), model)
  config = OptimizerConfig(rates="*router_ME=0.5, blocks/moe/*=0,head_MV=2e-1")
  leaves = jax.tree_util.tree_leaves_with_path(rate_factors(config, part))
  found = {path_name(path): factor for path, factor in leaves}
  assert found.keys() == names(part)
  for name, factor in found.items():
    if name.endswith("router_ME"):
      assert factor == 0.5
    elif name.startswith("blocks/moe/"):
      assert factor == 0
    else:
      assert factor == (0.2 if name == "head_MV" else 1)


@pytest.mark.parametrize(
  ("rates", "message"),
  [
    ("head_MV", "'head_MV' must be PATTERN=FACTOR"),
    ("head_MV=fast", "'head_MV=fast' must be PATTERN=FACTOR"),
    ("head_MV=-1", "at least 0"),
    ("head_MV=nan", "at least 0"),
    ("=1", "'=1' must be PATTERN=FACTOR"),
    ("head_M=1", "matches no trained parameter; did you mean head_MV?"),
  ],
)
def test_wrong_rates_are_named(rates, message):
  model = abstract_model(ModelConfig())
  with pytest.raises(UserError) as caught:
    rate_factors(OptimizerConfig(rates=rates), model)
  assert f"optimizer.rates={rates}: " in str(caught.value)
  assert message in str(caught.value)


def test_rates_scale_the_updates():
  config = OptimizerConfig(warmup_steps=0)
  parts = OptimizerConfig(warmup_steps=0, rates="a*=0.25,c=0")
  tree = {"a_MV": jnp.ones((2, 2)), "b_MV": jnp.ones(3), "c": jnp.ones(2)}
  gradient = jax.tree.map(lambda x: 0.1 * x, tree)
  whole, scaled = (
    optimizer.update(gradient, optimizer.init(tree), tree)[0]
    for optimizer in (make_optimizer(x, STEPS) for x in (config, parts))
  )
  assert np.all(whole["a_MV"] < -1e-4)
  np.testing.assert_array_equal(scaled["a_MV"], 0.25 * whole["a_MV"])
  np.testing.assert_array_equal(scaled["b_MV"], whole["b_MV"])
  assert not np.any(scaled["c"])


def test_steps_against_numpy_float64():
  config = OptimizerConfig(
    learning_rate=0.05,
    warmup_steps=3,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    clip_norm=1.0,
  )
  random = np.random.default_rng(0)
  shapes = {"weight": (4, 3), "some_norm": {"scale": (3,)}}
  draw = lambda scale: jax.tree.map(  # noqa: E731
    lambda shape: scale * random.standard_normal(shape),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  start = draw(1.0)
  # Norms of about 4, 0.4 and 40: clipped, left alone, clipped.
  gradients = [draw(scale) for scale in (1.0, 0.1, 10.0, 1.0)]
  norms = [
    math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
    for gradient in gradients
  ]
  assert norms[0] > 1 > norms[1] and norms[2] > 1

  optimizer = make_optimizer(config, STEPS)
  as_float32 = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
  got = as_float32(start)
  state = optimizer.init(got)
  update = jax.jit(optimizer.update)
  want, moments = jax.tree.leaves(start), [(0.0, 0.0)] * 2
  # Leaves in the order of jax.tree: some_norm/scale, weight.
  decay = [0.0, 0.3]
  for step, (gradient, norm) in enumerate(zip(gradients, norms)):
    updates, state = update(as_float32(gradient), state, got)
    got = optax.apply_updates(got, updates)
    learning_rate = 0.05 * min((step + 1) / 3, 1)
    for i, g in enumerate(jax.tree.leaves(gradient)):
      g = g / max(norm, 1.0)
      first = 0.8 * moments[i][0] + 0.2 * g
      second = 0.9 * moments[i][1] + 0.1 * g**2
      moments[i] = (first, second)
      direction = (first / (1 - 0.8 ** (step + 1))) / (
        np.sqrt(second / (1 - 0.9 ** (step + 1))) + 1e-8
      )
      want[i] = want[i] - learning_rate * (direction + decay[i] * want[i])
    for mine, reference in zip(jax.tree.leaves(got), want):
      np.testing.assert_allclose(mine, reference, rtol=2e-5, atol=1e-6)
