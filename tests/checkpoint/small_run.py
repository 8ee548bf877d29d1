"""A small run on eight devices, and its checkpoints."""

import functools

import jax
import numpy as np

from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import Experiment, LossesConfig, MeshConfig, ModelConfig
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

EXPERIMENT = Experiment(
  name="small",
  model=ModelConfig(
    vocabulary_size=264,
    num_layers=2,
    width=16,
    num_heads=2,
    head_width=8,
    num_experts=4,
    expert_width=8,
    num_dense_layers=1,
    num_shared_experts=1,
    dense_width=16,
  ),
  # Its value is found in training, and so part of the state.
  losses=LossesConfig(variance_weight="auto:1e-3"),
)
PROVENANCE = Provenance(
  EXPERIMENT,
  Taxonomy.from_names(["code/c", "code/python", "law"]),
  byte_tokenizer(),
  "hash of the text",
)
OPTIMIZER = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.num_steps)
ON_EIGHT = MeshConfig(1, 2, 2, 2)
DATA_STATE = {"next_index": 7, "inner": {"epoch": 0}}


def abstract(config, devices=8):
  mesh = sharding.make_mesh(config, jax.devices()[:devices])
  return abstract_state(EXPERIMENT, OPTIMIZER, mesh)


@functools.cache
def state():
  """Random numbers in every leaf, moments included, on eight devices."""
  random = np.random.default_rng(0)

  def draw(leaf):
    if leaf.dtype == np.int32:
      values = np.full(leaf.shape, 4, np.int32)
    else:
      values = random.standard_normal(leaf.shape, np.float32)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map(draw, abstract(ON_EIGHT))


def write(workdir: str) -> None:
  """Writes steps 3 and 4, of which the older has other parameters."""
  checkpointer = Checkpointer(workdir, keep=2)
  other = state()._replace(model=jax.tree.map(np.zeros_like, state().model))
  checkpointer.save(3, other, DATA_STATE, PROVENANCE)
  checkpointer.save(4, state(), DATA_STATE, PROVENANCE)
  checkpointer.close()


def assert_equal(tree, other):
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  assert len(leaves) == len(others) > 0
  for leaf, other_leaf in zip(leaves, others):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other_leaf))
