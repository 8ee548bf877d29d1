"""Compares a training step with the machine's matrix products.

  python -m benchmarks.roofline --json=roofline.json

Steps of `experiments/bench.py` and square float32 matrix products of several
sizes take turns of a second each. The ratio is the step's model FLOP/s, without
recomputation, over the FLOP/s of the best product.

JAX's profiler then splits the step into parts. An operation belongs to the
innermost `jax.named_scope` around it, and a fusion to the scope of its result,
so read small parts with care. "in between" is the time in which no operation
ran: the runtime's work, and waiting.
"""

import collections
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.steps import TrainingStep
from edl_jax import runtime, sharding
from edl_jax.command import Command
from edl_jax.config import MeshConfig
from edl_jax.model.transformer import training_flops

COMMAND = Command(__doc__)
COMMAND.experiment("experiments/bench.py")
_DOMAINS = COMMAND.flag("domains", 49, "Domains of the taxonomy.", minimum=1)
_ROUNDS = COMMAND.flag(
  "rounds", 11, "Turns that each contestant takes.", minimum=1
)
_PROFILED = COMMAND.flag("profiled", 5, "Steps to profile.", minimum=1)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")

PRODUCT_SIZES = (1024, 2048, 4096)
# The library's `jax.named_scope`s.
PARTS = (
  "attention",
  "router",
  "dispatch",
  "experts",
  "head",
  "objective",
  "optimizer",
)
# Operations that contain others, whose times are counted instead.
_CONTAINERS = ("while", "call", "conditional")


def sustained(contestant: Callable[[], float]) -> Callable[[], float]:
  """Returns a contestant that runs for at least a second a turn.

  Its result is the mean time. In training, too, a step follows another step and
  not another program.
  """

  def turn() -> float:
    taken = [contestant()]
    while sum(taken) < 1:
      taken.append(contestant())
    # The first call finds caches full of another contestant's data.
    return statistics.mean(taken[1:] or taken)

  return turn


def product(size: int) -> Callable[[], float]:
  """Returns a function that times a square matrix product."""
  left, right = jnp.ones((size, size)), jnp.ones((size, size))
  multiply = jax.jit(jnp.dot).lower(left, right).compile()
  return lambda: measure.seconds(lambda: multiply(left, right))


def part_of(scope: str) -> str:
  """Returns the innermost part that a scope such as "jvp(head)/dot" names."""
  named = [word for word in re.findall(r"\w+", scope) if word in PARTS]
  return named[-1] if named else "rest"


def part_by_operation(program: str) -> dict[str, str]:
  """Returns the part of each operation of a compiled program's text."""
  return {
    name: part_of(scope)
    for name, scope in re.findall(
      r'^\s*(?:ROOT )?%([\w.\-]+) = .*op_name="([^"]*)"', program, re.MULTILINE
    )
  }


def seconds_by_part(
  take_step: Callable[[], float], program: str, steps: int
) -> tuple[dict[str, float], float]:
  """Profiles some steps.

  Returns:
    The seconds of each part in a step, and the seconds of a step in which no
    operation ran.
  """
  parts = part_by_operation(program)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        take_step()
    [path] = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    spans = [
      (event.start_ns, event.end_ns, operation)
      for plane in profile.planes
      for line in plane.lines
      for event in line.events
      if (operation := dict(event.stats).get("hlo_op"))
      and not operation.startswith(_CONTAINERS)
    ]
  spans.sort()
  taken: dict[str, float] = collections.Counter()
  between, until = 0.0, spans[0][0]
  for start, end, operation in spans:
    between += max(start - until, 0)
    # Where two operations overlap, the second counts from the first's end.
    taken[parts.get(operation, "rest")] += max(end - max(start, until), 0)
    until = max(until, end)
  return (
    {part: nanoseconds / steps / 1e9 for part, nanoseconds in taken.items()},
    between / steps / 1e9,
  )


def breakdown(
  taken: Mapping[str, float],
  between: float,
  flops: Mapping[str, float],
  peak: float,
) -> list[dict[str, str | float]]:
  """Returns a row for each part, longest first.

  Args:
    taken, between: seconds, as `seconds_by_part` returns them.
    flops: model FLOPs of a step by part.
    peak: FLOP/s of the best matrix product.
  """
  total = sum(taken.values()) + between
  rows = []
  for part in sorted(taken, key=taken.__getitem__, reverse=True):
    need = flops.get(part, 0) / peak
    rows.append(
      {
        "part": part,
        "ms": 1e3 * taken[part],
        "share": taken[part] / total,
        "model GFLOP": flops.get(part, 0) / 1e9,
        "ms at the best product's rate": 1e3 * need,
        "gap (ms)": 1e3 * (taken[part] - need),
      }
    )
  last = dict.fromkeys(rows[0], 0.0)
  last |= {"part": "in between", "ms": 1e3 * between, "share": between / total}
  return [*rows, last | {"gap (ms)": 1e3 * between}]


@COMMAND.main
def main() -> None:
  """Times and profiles the step, then prints both tables."""
  runtime.configure()
  experiment = COMMAND.load()
  settings = experiment.train
  flops = training_flops(
    experiment.model, settings.batch_size, settings.sequence_length
  )
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    step = TrainingStep(experiment, _DOMAINS.value, mesh)
    contestants = {"step": sustained(step)}
    work = {"step": sum(flops.values())}
    for size in PRODUCT_SIZES:
      name = f"product of {size} x {size}"
      contestants[name] = sustained(product(size))
      work[name] = 2.0 * size**3
    measure.take_turns(contestants, 3)  # Warms caches and allocator.
    taken = measure.take_turns(contestants, _ROUNDS.value)
    rates = {
      name: [work[name] / seconds for seconds in taken[name]] for name in taken
    }
    median = {name: statistics.median(values) for name, values in rates.items()}
    best = max(list(median)[1:], key=median.__getitem__)
    profiled = seconds_by_part(step, step.compiled.as_text(), _PROFILED.value)
  rows = [
    {
      "measured": name,
      "ms": 1e3 * work[name] / median[name],
      "GFLOP": work[name] / 1e9,
      "GFLOP/s": median[name] / 1e9,
      "of the best product": measure.median_ratio(rates[name], rates[best]),
    }
    for name in contestants
  ]
  parts = breakdown(*profiled, flops, median[best])
  print(measure.table(parts), "\n")
  measure.report(rows, _JSON.value, parts=parts)
  tokens = settings.batch_size * settings.sequence_length
  print(
    f"\n{tokens * median['step'] / work['step']:,.0f} tokens/s:"
    f" {rows[0]['of the best product']:.1%} of the best product"
  )


if __name__ == "__main__":
  sys.exit(main())
