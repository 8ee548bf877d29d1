"""Router biases are bit for bit the same wherever the load is counted.

After several steps on any mesh and in any micro-batches, and through a
checkpoint.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import (
  Experiment,
  LossesConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state, init_state, make_train_step
from edl_jax.text.tokenizer import byte_tokenizer
from tests.test_invariance import (
  LENGTH,
  MODEL,
  ROWS,
  TAXONOMY,
  random_batch,
  shuffled,
)

STEPS = 4


def experiment(accumulation_steps=1, balancing="bias", schedule="constant"):
  return Experiment(
    model=dataclasses.replace(
      MODEL, balancing=balancing, router_scores="sigmoid"
    ),
    # A weight that counts, were it not for the biases.
    losses=LossesConfig(balance_weight=1.0, z_weight=0.0),
    optimizer=OptimizerConfig(
      bias_rate=0.01, bias_schedule=schedule, warmup_steps=0
    ),
    train=TrainConfig(
      num_steps=STEPS,
      batch_size=ROWS,
      sequence_length=LENGTH,
      accumulation_steps=accumulation_steps,
    ),
  )


def run(mesh_sizes=(1, 1, 1, 1), accumulation_steps=1, first=None, **settings):
  """Returns the state after each step, from the state `first` on."""
  own = experiment(accumulation_steps, **settings)
  mesh = sharding.make_mesh(
    MeshConfig(*mesh_sizes), jax.devices()[: np.prod(mesh_sizes)]
  )
  optimizer = make_optimizer(own.optimizer, STEPS)
  states = []
  with jax.set_mesh(mesh):
    train_step = make_train_step(own, optimizer, TAXONOMY, mesh)
    state = init_state(own, optimizer, mesh) if first is None else first
    for step in range(int(state.step), STEPS):
      rows = shuffled(random_batch()) if step % 2 else random_batch()
      state, output = train_step(state, sharding.put_batch(rows, mesh))
      states.append((jax.device_get(state), jax.device_get(output)))
  return states


@functools.cache
def on_one_device(schedule="constant"):
  return run(schedule=schedule)


def biases(states):
  return [np.asarray(state.model.blocks.moe.bias_E[...]) for state, _ in states]


def test_biases_follow_the_load_of_the_global_batch():
  previous_LE = np.zeros_like(biases(on_one_device())[0])
  for bias_LE, (_, output) in zip(
    biases(on_one_device()), on_one_device(), strict=True
  ):
    load_LE = output.routing.assignments_LE
    for got_E, old_E, load_E in zip(bias_LE, previous_LE, load_LE, strict=True):
      for got, old, load in zip(got_E, old_E, load_E, strict=True):
        sign = np.sign(sum(load_E) / len(load_E) - load)
        assert got == pytest.approx(old + 0.01 * sign, abs=1e-7)
    previous_LE = bias_LE
  assert np.abs(previous_LE).max() > 0.02


@pytest.mark.parametrize(
  ("mesh_sizes", "accumulation_steps"),
  [
    ((1, 2, 2, 1, 2), 2),
    pytest.param((1, 1, 1, 1), 4, marks=pytest.mark.slow),
    pytest.param((8, 1, 1, 1), 1, marks=pytest.mark.slow),
    pytest.param((1, 1, 8, 1), 2, marks=pytest.mark.slow),
    pytest.param((1, 2, 1, 4), 1, marks=pytest.mark.slow),
  ],
)
def test_same_biases_on_any_mesh_in_micro_batches(
  mesh_sizes, accumulation_steps
):
  got = biases(run(mesh_sizes, accumulation_steps))
  for mine, want in zip(got, biases(on_one_device()), strict=True):
    np.testing.assert_array_equal(mine, want)


@pytest.mark.slow
def test_same_biases_at_a_falling_rate_on_a_mesh_in_micro_batches():
  got = biases(run((1, 2, 2, 1, 2), 2, schedule="learning_rate"))
  wanted = biases(on_one_device("learning_rate"))
  for mine, want in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(mine, want)
  assert len(set(np.abs(wanted[-1]).ravel())) > 4


def test_biases_alone_leave_the_balance_loss_out():
  terms = on_one_device()[0][1].scalars
  assert terms["balance_loss"] > 0.5
  assert terms["loss"] == pytest.approx(terms["lm_loss"], rel=1e-6)
  both = run(balancing="both")[0][1].scalars
  assert both["loss"] == pytest.approx(
    both["lm_loss"] + both["balance_loss"], rel=1e-6
  )


@pytest.mark.parametrize("schedule", ["constant", "learning_rate"])
def test_resumed_run_has_the_same_biases(schedule, tmp_path):
  whole = on_one_device(schedule)
  own = experiment(schedule=schedule)
  checkpointer = Checkpointer(str(tmp_path), keep=1)
  provenance = Provenance(own, TAXONOMY, byte_tokenizer(), "hash")
  state, _ = whole[1]
  checkpointer.save(2, jax.device_put(state), {"next": 2}, provenance)
  checkpointer.wait()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  abstract = abstract_state(own, make_optimizer(own.optimizer, STEPS), mesh)
  restored = checkpointer.restore_newest(abstract)
  checkpointer.close()
  assert restored is not None and restored.step == 2
  rest = run(first=restored.state, schedule=schedule)
  for (got, _), (want, _) in zip(rest, whole[2:], strict=True):
    jax.tree.map(np.testing.assert_array_equal, got, want)
