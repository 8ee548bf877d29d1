"""The traced step is the one that training runs."""

import jax
import pytest

from edl_jax import sharding, step, tracing
from edl_jax.config import (
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
)
from edl_jax.optim import make_optimizer
from edl_jax.text.batch import padding_row, stack
from edl_jax.text.taxonomy import Taxonomy

TAXONOMY = Taxonomy(fine=("a", "b"), coarse=("x",), parent=(0, 0))
EXPERIMENT = Experiment(
  model=ModelConfig(
    vocabulary_size=32,
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    num_experts=4,
    expert_width=16,
  ),
  losses=LossesConfig(divergence_weight=0.01),
  train=TrainConfig(batch_size=8, sequence_length=16),
)


@pytest.mark.parametrize("supervised", [False, True])
def test_the_step_is_that_of_training(supervised):
  """Training calls a step that was compiled from the trace."""
  mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
  optimizer = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.num_steps)
  train_step = step.make_train_step(EXPERIMENT, optimizer, TAXONOMY, mesh)
  traced, (_, abstract) = tracing.trace_step(
    EXPERIMENT, TAXONOMY, mesh, supervised
  )
  assert abstract._replace(loss_weights_BT=None) == tracing.abstract_batch(
    EXPERIMENT, mesh
  )
  # What the input pipeline makes of rows.
  row = padding_row(EXPERIMENT.train.sequence_length, supervised)
  rows = stack([row] * EXPERIMENT.train.batch_size)
  with jax.set_mesh(mesh):
    state = step.init_state(EXPERIMENT, optimizer, mesh)
    batch = sharding.put_batch(rows, mesh)
    text = train_step.lower(state, batch).as_text()
    lowered = traced.lower()
    assert lowered.as_text() == text
    new, _ = lowered.compile()(state, batch)
  assert int(new.step) == 1
