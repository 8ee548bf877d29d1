"""What the auxiliary losses add to a training step of the demo's model.

  python -m benchmarks.objective_overhead --json=overhead.json

Steps of `experiments/demo.py` with 49 domains, taking turns: no auxiliary
loss, balance alone, balance and expert divergence, and everything (z-loss,
orthogonality and variance too); then steps of four micro-batches, to
show what the exact form of accumulation costs. Statistics and the value of
every loss are in all of them, being reported whatever the weights; so the value
and gradient of the divergence take a turn alone, too.

FLOPs and bytes are XLA's counts of the compiled step. It counts the body of a
loop once: of the model one of the scanned layers, of the divergence, whose
layers lie side by side at this size, all. The last line therefore also gives
its share of the model FLOPs, 6 per active parameter and token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import measure
from edl_jax import config, losses, routing, sharding, train
from edl_jax.batch import Batch
from edl_jax.config import Experiment, LossesConfig, MeshConfig
from edl_jax.mixture import Taxonomy
from edl_jax.model import parameter_counts
from edl_jax.optim import make_optimizer

_EXPERIMENT = flags.DEFINE_string(
  "experiment", "experiments/demo.py", "Experiment whose sizes are taken."
)
_DOMAINS = flags.DEFINE_integer("domains", 49, "Domains of the taxonomy.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 31, "Turns that each one takes.", 1)
_JSON = flags.DEFINE_string("json", "", "Also write the figures to this file.")

NONE = LossesConfig(balance_weight=0, divergence_weight=0, z_weight=0)
BALANCE = dataclasses.replace(NONE, balance_weight=0.01)
DIVERGENCE = dataclasses.replace(BALANCE, divergence_weight=0.01)
EVERYTHING = dataclasses.replace(
  DIVERGENCE, z_weight=1e-4, orthogonality_weight=1e-3, variance_weight=1e-3
)


def variants(base: Experiment) -> dict[str, Experiment]:
  """Returns the experiments to compare, by name."""

  def with_losses(weights: LossesConfig, **settings) -> Experiment:
    return dataclasses.replace(
      base, losses=weights, train=dataclasses.replace(base.train, **settings)
    )

  four = {"accumulation_steps": 4}
  return {
    "no auxiliary loss": with_losses(NONE),
    "balance": with_losses(BALANCE),
    "balance + divergence": with_losses(DIVERGENCE),
    "everything": with_losses(EVERYTHING),
    "4 micro-batches, exact": with_losses(DIVERGENCE, **four),
    "4 micro-batches, each alone": with_losses(
      DIVERGENCE, **four, accumulation="per_micro_batch"
    ),
  }


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


class Contestant:
  """A compiled training step with a state of its own."""

  def __init__(self, experiment: Experiment, num_domains: int, mesh):
    names = [f"domain{d}" for d in range(num_domains)]
    optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
    step = train.make_train_step(
      experiment, optimizer, Taxonomy.from_names(names), mesh
    )
    self._batch = sharding.put_batch(
      random_batch(experiment, num_domains), mesh
    )
    self._state = train.init_state(experiment, optimizer, mesh)
    self.compiled = step.lower(self._state, self._batch).compile()

  def __call__(self) -> float:
    """Takes a step; returns its seconds."""

    def step():
      self._state, output = self.compiled(self._state, self._batch)
      return self._state, output

    return measure.seconds(step)


class DivergenceAlone:
  """Value and gradient of every layer's divergence, from random routing."""

  def __init__(self, experiment: Experiment, num_domains: int):
    model = experiment.model
    layers = model.num_layers - model.num_dense_layers
    shape = (layers, num_domains, model.num_experts)
    empty = jnp.zeros((layers, num_domains))
    stats = routing.RoutingStats(
      *[empty] * len(routing.RoutingStats._fields)
    )._replace(sequences_LD=empty + 1)
    self._p_LDE = jax.nn.softmax(jax.random.normal(jax.random.key(0), shape))

    def loss(p_LDE: jax.Array) -> jax.Array:
      return losses.divergence_loss(
        stats._replace(probability_LDE=p_LDE), experiment.losses
      ).mean()

    self.compiled = (
      jax.jit(jax.value_and_grad(loss)).lower(self._p_LDE).compile()
    )

  def __call__(self) -> float:
    return measure.seconds(lambda: self.compiled(self._p_LDE))


def main(arguments: list[str]) -> None:
  del arguments
  base = config.load(_EXPERIMENT.value)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    contestants: dict[str, Callable[[], float]] = {
      name: Contestant(experiment, _DOMAINS.value, mesh)
      for name, experiment in variants(base).items()
    }
    contestants["divergence alone"] = DivergenceAlone(base, _DOMAINS.value)
    measure.take_turns(contestants, 2)  # warm caches and allocator
    taken = measure.take_turns(contestants, _ROUNDS.value)
  rows = []
  for name, contestant in contestants.items():
    cost = contestant.compiled.cost_analysis()
    memory = contestant.compiled.memory_analysis()
    rows.append(
      {
        "losses": name,
        "ms": 1e3 * float(np.median(taken[name])),
        "time / none": measure.median_ratio(
          taken[name], taken["no auxiliary loss"]
        ),
        "time / balance": measure.median_ratio(taken[name], taken["balance"]),
        "GFLOP": cost["flops"] / 1e9,
        "GB": cost["bytes accessed"] / 1e9,
        "temporary MiB": memory.temp_size_in_bytes / 2**20,
      }
    )
  _, active = parameter_counts(base.model)
  tokens = base.train.batch_size * base.train.sequence_length
  balance, with_divergence, alone = rows[1], rows[2], rows[-1]
  model_gflop = 6 * active * tokens / 1e9
  measure.report(rows, _JSON.value, domains=_DOMAINS.value)
  print(
    f"\nexpert divergence over {_DOMAINS.value} domains:"
    f" {1e3 * alone['GFLOP']:.1f} MFLOP,"
    f" {alone['GFLOP'] / balance['GFLOP']:.2%} of what XLA counts of a step and"
    f" {alone['GFLOP'] / model_gflop:.3%} of its {model_gflop:.1f} model GFLOP;"
    f" {alone['time / balance']:.2%} of its time alone; the step with it takes"
    f" {with_divergence['time / balance'] - 1:+.2%}"
  )


if __name__ == "__main__":
  app.run(main)
