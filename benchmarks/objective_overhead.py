"""Measures what the auxiliary losses add to a step of the demo's model.

  python -m benchmarks.objective_overhead --json=overhead.json

Steps of `experiments/demo.py` with 49 domains take turns: without auxiliary
loss, with balance, with balance and expert divergence, and with every loss.
Steps of four micro-batches follow, which show the cost of exact accumulation.
Every step computes the statistics and the values of all losses, because metrics
report them whatever the weights. The value and the gradient of the divergence
alone take a turn too.

FLOPs and bytes are XLA's counts of the compiled step. XLA counts the body of a
loop once, so it counts one of the model's scanned layers, but all layers of the
divergence. The last line therefore also gives the divergence's share of the
FLOPs that the model needs.
"""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.steps import TrainingStep
from edl_jax import sharding
from edl_jax.command import Command
from edl_jax.config import Experiment, LossesConfig, MeshConfig
from edl_jax.losses import objective as losses
from edl_jax.losses import routing
from edl_jax.model.transformer import training_flops

COMMAND = Command(__doc__)
COMMAND.experiment("experiments/demo.py")
_DOMAINS = COMMAND.flag("domains", 49, "Domains of the taxonomy.", minimum=1)
_ROUNDS = COMMAND.flag(
  "rounds", 31, "Turns that each contestant takes.", minimum=1
)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")

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


class DivergenceAlone:
  """The value and gradient of every layer's divergence, of random routing."""

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
        stats._replace(probability_LDE=p_LDE),
        losses.LossContext(experiment.losses),
      ).mean()

    self.compiled = (
      jax.jit(jax.value_and_grad(loss)).lower(self._p_LDE).compile()
    )

  def __call__(self) -> float:
    """Returns the seconds that a call takes."""
    return measure.seconds(lambda: self.compiled(self._p_LDE))


@COMMAND.main
def main() -> None:
  """Measures all variants and prints the table."""
  base = COMMAND.load()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    contestants: dict[str, Callable[[], float]] = {
      name: TrainingStep(experiment, _DOMAINS.value, mesh)
      for name, experiment in variants(base).items()
    }
    contestants["divergence alone"] = DivergenceAlone(base, _DOMAINS.value)
    measure.take_turns(contestants, 2)  # Warms caches and allocator.
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
  balance, with_divergence, alone = rows[1], rows[2], rows[-1]
  flops = training_flops(
    base.model, base.train.batch_size, base.train.sequence_length
  )
  model_gflop = sum(flops.values()) / 1e9
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
  sys.exit(main())
