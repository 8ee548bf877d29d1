"""Measures speed and memory by experts, domains, length and batch.

  python -m benchmarks.scaling --json=scaling.json

Each series starts from `experiments/bench.py` and changes one number: experts
("experts" in batches of 8 rows, "experts_32_rows" of 32; as many are active as
before, so that a token costs the same), domains, tokens in a row ("length"), or
rows in a batch. The steps of a series take turns. "of the first" is tokens per
second relative to the series' first line.

"peak MiB" is the growth of resident memory, parameters and moments included, in
a separate process that takes three steps. "program MiB" is XLA's count of
arguments and temporaries.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.steps import TrainingStep
from edl_jax import config_files, runtime, sharding
from edl_jax.command import Command
from edl_jax.config import Experiment, MeshConfig

VALUES = {
  "experts": (8, 16, 32, 64),
  "experts_32_rows": (8, 16, 32, 64),
  "domains": (2, 49, 1024),
  "length": (256, 512, 1024, 2048),
  "batch": (4, 8, 16, 32, 64),
}

COMMAND = Command(__doc__)
_ROUNDS = COMMAND.flag(
  "rounds", 9, "Turns that each contestant takes.", minimum=1
)
_SERIES = COMMAND.flag(
  "series", tuple(VALUES), "Series to measure, in order.", choices=tuple(VALUES)
)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_MEMORY_OF = COMMAND.flag(
  "memory_of", "", "Internal: SERIES:VALUE whose peak memory to print."
)


def point(series: str, value: int) -> tuple[Experiment, int]:
  """Returns the experiment and the number of domains of a measurement."""
  base = config_files.load("experiments/bench.py")
  if series == "domains":
    return base, value
  if series.startswith("experts"):
    model = dataclasses.replace(base.model, num_experts=value)
    base = dataclasses.replace(base, model=model)
    if series == "experts":
      return base, 49
    series, value = "batch", 32
  name = {"length": "sequence_length", "batch": "batch_size"}[series]
  settings = dataclasses.replace(base.train, **{name: value})
  return dataclasses.replace(base, train=settings), 49


def make_step(series: str, value: int) -> tuple[TrainingStep, int]:
  """Returns a compiled step and its number of tokens."""
  experiment, domains = point(series, value)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    step = TrainingStep(experiment, domains, mesh)
  settings = experiment.train
  return step, settings.batch_size * settings.sequence_length


def print_memory(series: str, value: int) -> None:
  """Takes three steps; prints the growth in MiB, which `peak_memory` reads."""
  # Exclude what JAX itself needs.
  jax.block_until_ready(jax.jit(lambda x: x + 1)(0))
  before = measure.peak_memory()
  step, _ = make_step(series, value)
  for _ in range(3):
    step()
  print(json.dumps((measure.peak_memory() - before) / 2**20))


def peak_memory(series: str, value: int) -> float:
  """Returns the MiB by which a separate process grows in three steps."""
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.scaling"),
      f"--memory_of={series}:{value}",
    ],
    # Exclude the compiler's memory: the program is in the cache by now.
    env=os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(ended.stdout.splitlines()[-1])


def measure_series(series: str) -> list[dict[str, Any]]:
  """Returns a row of the table for each value of the series."""
  steps, tokens = {}, {}
  for value in VALUES[series]:
    steps[value], tokens[value] = make_step(series, value)
  measure.take_turns(steps, 2)  # Warms caches and allocator.
  taken = measure.take_turns(steps, _ROUNDS.value)
  first = VALUES[series][0]
  rows = []
  for value, step in steps.items():
    memory = step.compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    ratio = measure.median_ratio(taken[first], taken[value])
    rows.append(
      {
        "series": series,
        "value": value,
        "ms": 1e3 * float(np.median(taken[value])),
        "tokens/s": tokens[value] / float(np.median(taken[value])),
        "of the first": ratio * tokens[value] / tokens[first],
        "program MiB": needed / 2**20,
      }
    )
  steps.clear()  # Frees their states: the processes below need memory.
  for row in rows:
    row["peak MiB"] = peak_memory(series, row["value"])
  return rows


@COMMAND.main
def main() -> None:
  """Measures the series and prints their tables."""
  runtime.configure()
  if _MEMORY_OF.value:
    series, value = _MEMORY_OF.value.split(":")
    print_memory(series, int(value))
    return
  rows = []
  for series in _SERIES.value:
    measured = measure_series(series)
    print(measure.table(measured), "\n", flush=True)
    rows += measured
  measure.report(rows, _JSON.value)


if __name__ == "__main__":
  sys.exit(main())
