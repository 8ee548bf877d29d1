"""One training step against its parts, and the loss of token pairs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from edl_jax import sharding, step
from edl_jax.aot import hlo, hlo_costs
from edl_jax.config import (
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from edl_jax.optim import make_optimizer, make_schedule
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.tracing import abstract_batch
from tests.xla import FAST_OPTIONS

ROWS, LENGTH, NUM_PAIRS = 6, 10, 40
TAXONOMY = Taxonomy(fine=("a", "b", "c"), coarse=("x", "y"), parent=(0, 1, 1))
EXPERIMENT = Experiment(
  seed=3,
  model=ModelConfig(
    vocabulary_size=32,
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=4,
    num_experts=4,
    expert_width=8,
  ),
  losses=LossesConfig(
    balance_weight=0.0,
    z_weight=0.0,
    divergence_weight=1.0,
    divergence_pairs="tokens",
    num_token_pairs=NUM_PAIRS,
  ),
  optimizer=OptimizerConfig(warmup_steps=2),
  train=TrainConfig(num_steps=4, batch_size=ROWS, sequence_length=LENGTH),
)


def batch():
  """Rows that are one document each; the last one has no domain."""
  random = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  return Batch(
    tokens_BT=random.integers(0, 32, shape, np.int32),
    targets_BT=random.integers(0, 32, shape, np.int32),
    segments_BT=np.ones(shape, np.int32),
    positions_BT=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
    weights_BT=np.ones(shape, np.float32),
    domain_B=np.array([0, 1, 2, 1, 0, -1], np.int32),
  )


def replaced(**groups):
  """Returns `EXPERIMENT` with fields of its groups replaced."""
  return dataclasses.replace(
    EXPERIMENT,
    **{
      name: dataclasses.replace(getattr(EXPERIMENT, name), **fields)
      for name, fields in groups.items()
    },
  )


@functools.cache
def model():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  optimizer = make_optimizer(EXPERIMENT.optimizer, 4)
  trained = step.init_state(EXPERIMENT, optimizer, mesh).model
  # Larger routers, so that tokens differ.
  return jax.tree_util.tree_map_with_path(
    lambda path, x: 4 * x if "router" in jax.tree_util.keystr(path) else x,
    jax.device_get(trained),
  )


gradient_of = jax.jit(
  functools.partial(step.loss_and_gradient, taxonomy=TAXONOMY),
  static_argnames="experiment",
)


def naive_pair_loss(model, pairs):
  """By the definition of JSD, from the probabilities of single tokens."""
  probs_LBTE, _ = model.token_routing(jnp.asarray(batch().tokens_BT))
  p, q = jnp.moveaxis(probs_LBTE[:, pairs.row_I2, pairs.position_I2], 2, 0)
  m = (p + q) / 2
  divergence_LI = ((p * jnp.log(p / m) + q * jnp.log(q / m)) / 2).sum(-1)
  same_I = pairs.domain_I2[:, 0] == pairs.domain_I2[:, 1]
  return (
    divergence_LI[:, same_I].mean(1) - divergence_LI[:, ~same_I].mean(1)
  ).mean()


def test_a_weight_falls_with_the_steps_taken():
  """In the last fifth of the run, as by half its weight after nine tenths."""

  def loss(taken, **settings):
    experiment = replaced(
      losses={"divergence_pairs": "domains", **settings},
      train={"num_steps": 10},
    )
    return float(
      gradient_of(model(), batch(), experiment, step=taken)[1]["loss"]
    )

  falling = {"divergence_schedule": "decay"}
  assert loss(8, **falling) == loss(8)
  half = loss(9, divergence_weight=EXPERIMENT.losses.divergence_weight / 2)
  assert loss(9, **falling) == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("pairs_of", ["domains", "tokens"])
def test_random_coarse_labels_are_compared_as_coarse_ones(pairs_of):
  """The labels themselves come with the rows."""
  found = [
    gradient_of(
      model(),
      batch(),
      replaced(
        data={"granularity": granularity}, losses={"divergence_pairs": pairs_of}
      ),
    )[1]["divergence_loss"]
    for granularity in ("coarse", "shuffled_coarse", "shuffled")
  ]
  assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
def test_loss_and_gradient_of_token_pairs_against_naive(granularity):
  experiment = replaced(data={"granularity": granularity})
  pairs = step._token_pairs(batch(), experiment, TAXONOMY, 7)
  labels = np.array(
    [0, 1, 2, 1, 0] if granularity == "fine" else [0, 1, 1, 1, 0]
  )
  # The row without a domain is in no pair.
  np.testing.assert_array_equal(pairs.domain_I2, labels[pairs.row_I2])
  want, slope = jax.value_and_grad(naive_pair_loss)(model(), pairs)
  _, terms, gradient = gradient_of(model(), batch(), experiment, step=7)
  assert float(terms["divergence_loss"]) == pytest.approx(float(want), rel=1e-4)
  # The other part of the gradient is the language model's.
  without = replaced(losses={"divergence_weight": 0.0})
  _, others, rest = gradient_of(model(), batch(), without, step=7)
  assert float(terms["loss"]) == pytest.approx(
    float(others["lm_loss"] + want), rel=1e-5
  )
  assert np.abs(slope.blocks.moe.router_ME[...]).max() > 1e-3
  for ours, language, naive in zip(
    *map(jax.tree.leaves, (gradient, rest, slope)), strict=True
  ):
    np.testing.assert_allclose(ours - language, naive, rtol=1e-3, atol=2e-6)


def test_pairs_depend_on_seed_and_step_alone():
  def rows(experiment, number):
    pairs = step._token_pairs(batch(), experiment, TAXONOMY, number)
    return np.asarray(pairs.row_I2).tolist()

  first = rows(EXPERIMENT, 5)
  assert rows(EXPERIMENT, jnp.int32(5)) == first
  assert rows(EXPERIMENT, 6) != first
  assert rows(dataclasses.replace(EXPERIMENT, seed=4), 5) != first


def test_no_pairs_are_sampled_unless_asked_for():
  domains = replaced(losses={"divergence_pairs": "domains"})
  sums, _, _ = gradient_of(model(), batch(), domains)
  assert sums.routing.token_pairs_L22 is None


def test_steps_are_those_of_the_optimizer_on_the_gradient():
  experiment = replaced(losses={"variance_weight": "auto:1e-2"})
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = step.init_state(experiment, optimizer, mesh)
    want, moments = state.model, state.optimizer
    want, moments = jax.tree.map(jnp.copy, (want, moments))
    train_step = step.make_train_step(experiment, optimizer, TAXONOMY, mesh)
    kept = {"variance_weight": jnp.float32(0)}
    schedule = make_schedule(experiment.optimizer, experiment.train.num_steps)
    rows = sharding.put_batch(batch(), mesh)
    for number in range(3):
      state, output = train_step(state, rows)
      _, terms, gradient = gradient_of(
        want, batch(), experiment, kept_weights=kept, step=number
      )
      updates, moments = optimizer.update(gradient, moments, want)
      want = optax.apply_updates(want, updates)
      kept = {"variance_weight": terms["variance_weight"]}
      assert int(state.step) == number + 1
      scalars = {key: float(x) for key, x in output.scalars.items()}
      assert scalars.pop("learning_rate") == pytest.approx(
        float(schedule(number))
      )
      norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
      assert scalars.pop("grad_norm") == pytest.approx(float(norm), rel=1e-5)
      assert scalars == pytest.approx(
        {key: float(x) for key, x in terms.items()}, rel=1e-4
      )
      assert (
        state.auto_weights["variance_weight"] == kept["variance_weight"] > 0
      )
    for ours, theirs in zip(*map(jax.tree.leaves, (state.model, want))):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_frozen_parameters_stay_and_others_follow_optax(count):
  experiment = replaced(
    optimizer={"trainable": "blocks/moe/*,final_norm/*", "clip_norm": 0.1},
    losses={"divergence_pairs": "domains"},
    train={"accumulation_steps": count},
  )
  whole = dataclasses.replace(experiment, optimizer=EXPERIMENT.optimizer)
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  settings = experiment.optimizer
  reference = optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(
      make_schedule(settings, 4),
      settings.beta1,
      settings.beta2,
      weight_decay=settings.weight_decay,
      mask=lambda tree: {name: not name.endswith("scale") for name in tree},
    ),
  )

  def by_name(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in found}

  def chosen(tree):
    return {
      name: leaf
      for name, leaf in by_name(tree).items()
      if name.startswith(("blocks/moe/", "final_norm/"))
    }

  with jax.set_mesh(mesh):
    state = step.init_state(experiment, optimizer, mesh)
    start = jax.tree.map(np.array, state.model)
    want, model = chosen(start), start
    moments = reference.init(want)
    train_step = step.make_train_step(experiment, optimizer, TAXONOMY, mesh)
    rows = sharding.put_batch(batch(), mesh)
    for number in range(3):
      state, output = train_step(state, rows)
      # The gradient of all parameters, of which the chosen ones are read.
      _, _, gradient = gradient_of(model, batch(), whole, step=number)
      updates, moments = reference.update(chosen(gradient), moments, want)
      want = optax.apply_updates(want, updates)
      model = jax.tree_util.tree_map_with_path(
        lambda path, x, new=want: new.get(sharding.path_name(path), x), model
      )
      norm = float(optax.tree.norm(chosen(gradient)))
      assert output.scalars["grad_norm"] == pytest.approx(norm, rel=1e-5)
  for name, got in by_name(state.model).items():
    if name in want:
      np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=1e-6)
      assert not np.array_equal(got, by_name(start)[name])
    else:
      np.testing.assert_array_equal(got, by_name(start)[name])
  # Two moments of each trained element, and two counters.
  size = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
  assert size == 2 * sum(leaf.size for leaf in want.values()) + 2


def test_pools_depend_on_seed_and_step_alone():
  pools = replaced(model={"pool_min": 2, "pool_max": 4})

  def sizes(experiment, number):
    return np.asarray(step._pool_sizes(batch(), experiment, number)).tolist()

  first = sizes(pools, 5)
  assert sizes(pools, jnp.int32(5)) == first
  assert sizes(pools, 6) != first
  assert sizes(dataclasses.replace(pools, seed=4), 5) != first
  assert step._pool_sizes(batch(), EXPERIMENT, 5) is None


@pytest.mark.parametrize(
  "accumulation",
  ["exact", pytest.param("per_micro_batch", marks=pytest.mark.slow)],
)
def test_gradients_travel_between_copies_once_a_step(accumulation):
  """Devices along `data` and `tensor` hold copies of most parameters."""
  devices = jax.devices()
  mesh = sharding.make_mesh(
    MeshConfig(data=2, fsdp=2, expert=1, tensor=2), devices
  )

  def summed(count):
    """Returns a device's bytes of parameters, and those of sums over `data`."""
    experiment = replaced(
      losses={"divergence_pairs": "domains"},
      model={"num_kv_heads": 2},
      train={
        "batch_size": 16,
        "accumulation_steps": count,
        "accumulation": accumulation,
      },
    )
    optimizer = make_optimizer(experiment.optimizer, 4)
    program = step.make_train_step(experiment, optimizer, TAXONOMY, mesh)
    state = step.abstract_state(experiment, optimizer, mesh)
    with jax.set_mesh(mesh):
      compiled = program.lower(state, abstract_batch(experiment, mesh)).compile(
        FAST_OPTIONS
      )
    found = hlo_costs.costs(hlo.parse(compiled.as_text() or ""), 4)
    held = sum(
      4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
      for leaf in jax.tree.leaves(state.model)
    )
    return held, sum(
      one.runs * one.payload
      for one in found.collectives
      if one.kind == "all-reduce" and {0, 4} <= set(one.devices)
    )

  held, once = summed(1)
  assert once >= held
  # Routing, and what else is summed over rows, comes on top.
  assert summed(4)[1] < once + held
