"""Training steps on random tokens, to be timed."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import measure
from edl_jax import sharding
from edl_jax.config import Experiment
from edl_jax.optim import make_optimizer
from edl_jax.step import StepOutput, init_state, make_train_step
from edl_jax.text.batch import Batch
from edl_jax.text.mixture import Taxonomy


def random_batch(experiment: Experiment, num_domains: int) -> Batch:
  """Returns full rows of random tokens with random labels."""
  random = np.random.default_rng(0)
  shape = (experiment.train.batch_size, experiment.train.sequence_length)
  tokens_BT = random.integers(
    0, experiment.model.vocabulary_size, shape, np.int32
  )
  return Batch(
    tokens_BT=tokens_BT,
    targets_BT=np.roll(tokens_BT, -1, 1),
    segments_BT=np.ones(shape, np.int32),
    positions_BT=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    weights_BT=np.ones(shape, np.float32),
    domain_B=random.integers(0, num_domains, shape[0], np.int32),
  )


class TrainingStep:
  """A compiled training step with a state of its own.

  With several runs, one program takes a step of each: `vmap` over their states
  and batches.

  Attributes:
    compiled: the compiled program.
    output: the last step's output.
  """

  output: StepOutput

  def __init__(
    self, experiment: Experiment, num_domains: int, mesh: Mesh, runs: int = 1
  ):
    names = [f"domain{d}" for d in range(num_domains)]
    optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
    step = make_train_step(
      experiment, optimizer, Taxonomy.from_names(names), mesh
    )
    self._batch = sharding.put_batch(
      random_batch(experiment, num_domains), mesh
    )
    self._state = init_state(experiment, optimizer, mesh)
    if runs > 1:
      self._state, self._batch = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * runs), (self._state, self._batch)
      )
      step = jax.jit(jax.vmap(step), donate_argnums=0)
    self.compiled = step.lower(self._state, self._batch).compile()

  def __call__(self) -> float:
    """Takes a step; returns the seconds that it took."""

    def step():
      self._state, self.output = self.compiled(self._state, self._batch)
      return self._state, self.output

    return measure.seconds(step)
