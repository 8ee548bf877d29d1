"""Traces the training step, without a parameter or a row in memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.config import Experiment
from edl_jax.optim import make_optimizer
from edl_jax.step import TrainState, abstract_state, make_train_step
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy


def abstract_batch(
  experiment: Experiment, mesh: Mesh, supervised: bool = False
) -> Batch:
  """Returns a global batch with shapes in place of arrays.

  `supervised` says whether rows have loss weights.
  """
  train = experiment.train

  def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (train.batch_size, *shape), dtype, sharding=sharding.row_sharding(mesh)
    )

  by_token = train.sequence_length
  return Batch(
    tokens_BT=rows(jnp.int32, by_token),
    targets_BT=rows(jnp.int32, by_token),
    segments_BT=rows(jnp.int32, by_token),
    positions_BT=rows(jnp.int32, by_token),
    weights_BT=rows(jnp.float32, by_token),
    domain_B=rows(jnp.int32),
    loss_weights_BT=rows(jnp.float32, by_token) if supervised else None,
  )


def trace_step(
  experiment: Experiment,
  taxonomy: Taxonomy,
  mesh: Mesh,
  supervised: bool = False,
) -> tuple[jax.stages.Traced, tuple[TrainState, Batch]]:
  """Traces the training step, without a parameter or a row in memory.

  Args:
    experiment, taxonomy, mesh: of the run.
    supervised: see `abstract_batch`.

  Returns:
    The traced step, and its arguments as `ShapeDtypeStruct`s with shardings.
  """
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  # Build state and step outside of `set_mesh`: both make small arrays, which
  # devices that are only described cannot hold.
  state = abstract_state(experiment, optimizer, mesh)
  step = make_train_step(experiment, optimizer, taxonomy, mesh)
  batch = abstract_batch(experiment, mesh, supervised)
  with jax.set_mesh(mesh):
    return step.trace(state, batch), (state, batch)
