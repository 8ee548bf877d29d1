"""Averages and skipped steps, in training and through checkpoints."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.checkpoint.verify import verify_run
from edl_jax.config import Experiment, MeshConfig, OptimizerConfig, TrainConfig
from edl_jax.optim import make_optimizer, merged, trained
from edl_jax.step import (
  abstract_state,
  averaged,
  init_state,
  make_train_step,
  starting_from,
)
from edl_jax.text.tokenizer import byte_tokenizer
from tests.test_invariance import (
  LENGTH,
  MODEL,
  ROWS,
  TAXONOMY,
  random_batch,
  shuffled,
)

EXPERIMENT = Experiment(
  model=dataclasses.replace(MODEL, balancing="both"),
  optimizer=OptimizerConfig(
    algorithm="muon",
    schedule="linear",
    warmup_steps=2,
    rates="*router_ME=0.5",
    # All but the embedding.
    trainable="*blocks*,final_norm*,head_MV",
  ),
  train=TrainConfig(
    num_steps=6,
    batch_size=ROWS,
    sequence_length=LENGTH,
    skip_spikes=50.0,
    ema=0.75,
  ),
)
PROVENANCE = Provenance(EXPERIMENT, TAXONOMY, byte_tokenizer(), "hash")


def batches():
  """Good batches, but the third, whose loss is not finite."""
  good = [random_batch(), shuffled(random_batch()), random_batch()]
  bad = good[0]._replace(weights_BT=good[0].weights_BT * np.float32(math.inf))
  return [*good[:2], bad, good[2]]


def run(rows, first=None, mesh_sizes=(1, 1, 1, 1)):
  """Returns state and scalars after each step."""
  mesh = sharding.make_mesh(
    MeshConfig(*mesh_sizes), jax.devices()[: np.prod(mesh_sizes)]
  )
  optimizer = make_optimizer(EXPERIMENT.optimizer, 6)
  found = []
  with jax.set_mesh(mesh):
    train_step = make_train_step(EXPERIMENT, optimizer, TAXONOMY, mesh)
    state = init_state(EXPERIMENT, optimizer, mesh) if first is None else first
    for batch in rows:
      state, output = train_step(state, sharding.put_batch(batch, mesh))
      found.append(jax.device_get((state, output.scalars)))
  return found


@functools.cache
def whole():
  return run(batches())


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_skipped_step_changes_nothing():
  states = [state for state, _ in whole()]
  scalars = [told for _, told in whole()]
  assert [told["skipped"] for told in scalars] == [0, 0, 1, 0]
  assert scalars[-1]["skipped_steps"] == 1
  assert not np.isfinite(scalars[2]["grad_norm"])
  assert [int(state.step) for state in states] == [1, 2, 3, 4]
  before, after = (states[i]._replace(step=0, spikes=None) for i in (1, 2))
  assert_same(after, before)
  # The run without the bad batch is the same, but for the count of steps.
  good = run([batches()[i] for i in (0, 1, 3)])
  assert_same(
    states[3]._replace(step=0, spikes=None),
    good[-1][0]._replace(step=0, spikes=None),
  )
  assert scalars[3]["learning_rate"] == good[-1][1]["learning_rate"]


def test_a_run_may_compute_otherwise_than_the_one_it_starts_from():
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  optimizer = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.num_steps)
  state = init_state(EXPERIMENT, optimizer, mesh)
  theirs = dataclasses.replace(
    EXPERIMENT,
    seed=1,
    model=dataclasses.replace(MODEL, balancing="both", dtype="bfloat16"),
  )
  model = init_state(theirs, optimizer, mesh).model
  started = starting_from(state, model, EXPERIMENT)
  # The step maps a state to one of the same structure.
  assert jax.tree.structure(started) == jax.tree.structure(state)
  assert_same(
    [jax.tree.leaves(started.model), jax.tree.leaves(started.ema)],
    [
      jax.tree.leaves(model),
      jax.tree.leaves(trained(EXPERIMENT.optimizer, model)),
    ],
  )


def test_averages_against_their_definition():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  optimizer = make_optimizer(EXPERIMENT.optimizer, 6)
  start = by_name(init_state(EXPERIMENT, optimizer, mesh).model)
  want = {name: np.float64(x) for name, x in start.items()}
  for state, told in whole():
    if told["skipped"]:
      continue
    for name, x in by_name(state.model).items():
      want[name] = 0.75 * want[name] + 0.25 * x
  last = whole()[-1][0]
  frozen = {"embedding_VM", "blocks/moe/bias_E"}
  assert by_name(last.model).keys() - by_name(last.ema).keys() == frozen
  got = by_name(averaged(last))
  for name, x in by_name(last.model).items():
    if name in frozen:
      np.testing.assert_array_equal(got[name], x)
    else:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7)
  assert not np.array_equal(got["head_MV"], by_name(last.model)["head_MV"])


def test_a_part_with_a_lower_rate_moves_less():
  # Muon's first update has the same size whatever the gradient's.
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  optimizer = make_optimizer(EXPERIMENT.optimizer, 6)
  start = by_name(init_state(EXPERIMENT, optimizer, mesh).model)
  after = by_name(whole()[0][0].model)

  def moved(name):
    return np.sqrt(np.mean((after[name] - start[name]) ** 2))

  assert moved("embedding_VM") == 0
  assert moved("blocks/moe/router_ME") == pytest.approx(
    0.5 * moved("blocks/attention/out_NHM"), rel=0.3
  )


def test_resumed_run_is_the_same(tmp_path):
  states = [state for state, _ in whole()]
  checkpointer = Checkpointer(str(tmp_path), keep=2)
  # Between them the step that is skipped.
  for step in (1, 3):
    checkpointer.save(
      step, jax.device_put(states[step - 1]), {"next": step}, PROVENANCE
    )
  checkpointer.wait()
  lines = list(verify_run(str(tmp_path)))
  arrays = len(jax.tree.leaves(states[0])) - 1
  assert [str(line).partition(": ")[2] for line in lines] == [
    f"{arrays} arrays and the position in the data are intact"
  ] * 2
  optimizer = make_optimizer(EXPERIMENT.optimizer, 6)
  for step in (1, 3):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    state, _ = checkpointer.restore(
      step, abstract_state(EXPERIMENT, optimizer, mesh)
    )
    assert_same(jax.device_get(state), states[step - 1])
    rest = run(batches()[step:], state)
    assert_same(rest[-1], whole()[-1])
  checkpointer.close()
  loaded = edl_jax.load(str(tmp_path)).model
  assert_same(loaded, merged(states[2].ema, states[2].model))
  on_mesh = edl_jax.load(
    str(tmp_path), mesh=sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  ).model
  assert_same(jax.device_get(on_mesh), jax.device_get(loaded))


def test_same_on_a_mesh():
  for (got, _), (want, _) in zip(
    run(batches(), mesh_sizes=(1, 2, 2, 2)), whole(), strict=True
  ):
    got, want = by_name(got), by_name(want)
    for name in want:
      np.testing.assert_allclose(
        got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name
      )


def test_frozen_parts_are_spread_and_have_no_moments():
  experiment = dataclasses.replace(
    EXPERIMENT,
    optimizer=OptimizerConfig(trainable="blocks/moe/router_ME,head_MV"),
  )
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  optimizer = make_optimizer(experiment.optimizer, 6)
  state = abstract_state(experiment, optimizer, mesh)

  def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in found}

  def share(leaf):
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size

  model = leaves(state.model)
  # A device keeps an eighth of the experts, frozen or not.
  for name in ("blocks/moe/gate_up_EM2F", "blocks/moe/down_EFM"):
    assert share(model[name]) == 1 / 8
  whole = dataclasses.replace(experiment, optimizer=OptimizerConfig())
  for name, leaf in leaves(
    abstract_state(whole, optimizer, mesh).model
  ).items():
    assert model[name].sharding == leaf.sharding
  # Two moments of each trained parameter, spread as it is.
  moments = {
    name: leaf for name, leaf in leaves(state.optimizer).items() if leaf.ndim
  }
  assert len(moments) == 4
  for name, leaf in moments.items():
    own = next(
      own for own in ("blocks/moe/router_ME", "head_MV") if own in name
    )
    assert leaf.shape == model[own].shape
    assert leaf.sharding == model[own].sharding
