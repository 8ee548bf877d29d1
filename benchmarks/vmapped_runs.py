"""Compares two runs in one program, by `vmap`, with two programs.

  taskset -c 0 python -m benchmarks.vmapped_runs

Steps of one run and steps of two runs in one program take turns. With
`taskset`, they have one core, as a run has in a sweep with a job for each core
(`edl_jax.sweep --jobs`).
"""

import statistics
import sys

import jax

from benchmarks import measure
from benchmarks.steps import TrainingStep
from edl_jax import runtime, sharding
from edl_jax.command import Command
from edl_jax.config import MeshConfig

COMMAND = Command(__doc__)
COMMAND.experiment("experiments/demo.py")
_DOMAINS = COMMAND.flag("domains", 8, "Domains of the taxonomy.", minimum=1)
_ROUNDS = COMMAND.flag("rounds", 7, "Turns that each takes.", minimum=1)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_RUNS = 2


@COMMAND.main
def main() -> None:
  """Prints seconds for each run's step, and their ratio."""
  runtime.configure()
  experiment = COMMAND.load()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    steps = {
      "a program for each run": TrainingStep(experiment, _DOMAINS.value, mesh),
      "one program": TrainingStep(experiment, _DOMAINS.value, mesh, _RUNS),
    }
    measure.take_turns(steps, 2)  # Warms caches and allocator.
    apart, together = measure.take_turns(steps, _ROUNDS.value).values()
  together = [seconds / _RUNS for seconds in together]
  rows = [
    {
      "way": way,
      "ms for each run's step": 1e3 * statistics.median(seconds),
      "ratio": measure.median_ratio(seconds, apart),
    }
    for way, seconds in zip(steps, (apart, together))
  ]
  measure.report(rows, _JSON.value)


if __name__ == "__main__":
  sys.exit(main())
