"""The table of faults, and those of signals, poison and company.

Each fault takes a bench, its own random numbers and its name, and returns what
it did. It raises `FaultError` if the product gave a wrong figure, a traceback
or a wrong exit code, and `SkippedError` if this machine does not allow it.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from edl_jax import sharding, step, train
from tests.campaign.bench import PATIENCE, Bench, FaultError, Outcome
from tests.campaign.damage import (
  damaged_cache,
  damaged_checkpoints,
  damaged_for_evaluation,
)
from tests.campaign.disks import full_disk, full_tmpfs, read_only, slow_disk
from tests.campaign.machines import clock_steps, one_of_two

Fault = Callable[[Bench, random.Random, str], Outcome]

_STOPPED_SECONDS = 60


def kill(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """SIGKILL at random moments, up to five in a run; then to the end."""
  workdir, moments = bench.folder / name, []
  for _ in range(draw.randint(2, 5)):
    child = bench.start(workdir)
    moment = bench.wait_for_moment(child, workdir, draw)
    child.send_signal(signal.SIGKILL)
    bench.end(child, -signal.SIGKILL, 0)
    if child.returncode == 0:
      break
    moments.append(moment)
  bench.finish(workdir)
  bench.compare(workdir)
  return Outcome(f"after {', '.join(moments) or 'its end'}", len(moments))


def end_signal(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """SIGTERM, SIGINT or SIGHUP at a random moment; then to the end."""
  number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
  workdir = bench.folder / name
  child = bench.start(workdir)
  moment = bench.wait_for_moment(child, workdir, draw)
  child.send_signal(number)
  # Before training begins a signal ends the process as any other.
  bench.end(child, 0, 128 + number, -number)
  bench.finish(workdir)
  bench.compare(workdir)
  return Outcome(f"{number.name} after {moment}")


def stopped(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """SIGSTOP for a minute, in which a second run is refused."""
  workdir = bench.folder / name
  child = bench.start(workdir)
  moment = bench.wait_for_moment(child, workdir, draw)
  child.send_signal(signal.SIGSTOP)
  begun = time.monotonic()
  # A process that has ended cannot be stopped, and one that has not begun to
  # train owns nothing.
  owned = (workdir / ".lock").exists() and child.poll() is None
  if owned:
    line = bench.end(bench.start(workdir), 2)
    if f"in use by process {child.pid}" not in line:
      raise FaultError(f"the second run was refused for another reason: {line}")
  time.sleep(max(0, _STOPPED_SECONDS + begun - time.monotonic()))
  child.send_signal(signal.SIGCONT)
  bench.end(child, 0)
  bench.compare(workdir)
  return Outcome(f"after {moment}{', a second run refused' * owned}")


def second_run(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """Two runs in one folder at once: one is refused, the other unharmed."""
  workdir = bench.folder / name
  first = bench.start(workdir)
  time.sleep(draw.uniform(0, 0.3 * bench.seconds))
  second = bench.start(workdir)
  for child in (first, second):
    child.wait(PATIENCE)
  codes = sorted(child.wait(PATIENCE) for child in (first, second))
  for child in (first, second):
    line = bench.end(child, 0, 2)
    if child.returncode == 2 and "is in use by process" not in line:
      raise FaultError(f"refused for another reason: {line}")
  # If the first has ended when the second looks, the second finds its result.
  if codes not in ([0, 2], [0, 0]):
    raise FaultError(f"exit codes {codes}")
  bench.compare(workdir)
  return Outcome(f"exit codes {codes}")


def _poison_batch(at: int) -> None:
  """Makes the weights of the at-th batch NaN, in this process."""
  inner, calls = sharding.put_batch, []

  def put_batch(batch: Any, mesh: Any) -> Any:
    calls.append(1)
    bad = float("nan") if len(calls) == at else 1.0
    return inner(batch._replace(weights_BT=batch.weights_BT * bad), mesh)

  sharding.put_batch = put_batch


def _poison_gradient(at: int) -> None:
  """Makes an element of the gradient of step number `at` NaN."""
  inner = step.loss_and_gradient

  def loss_and_gradient(*arguments: Any) -> Any:
    sums, terms, gradient = inner(*arguments)
    leaves, tree = jax.tree.flatten(gradient)
    bad = jnp.where(arguments[5] == at - 1, jnp.nan, 1)
    first = (0,) * leaves[0].ndim
    leaves[0] = leaves[0].at[first].multiply(bad)
    return sums, terms, jax.tree.unflatten(tree, leaves)

  step.loss_and_gradient = loss_and_gradient


def _poison_parameter(at: int) -> None:
  """Makes an element of the first parameters NaN."""
  make = train.init_state

  def init_state(*arguments: Any) -> Any:
    state = make(*arguments)
    leaves, tree = jax.tree.flatten(state.model)
    number = at % len(leaves)
    first = (0,) * leaves[number].ndim
    leaves[number] = leaves[number].at[first].set(jnp.nan)
    return state._replace(model=jax.tree.unflatten(tree, leaves))

  train.init_state = init_state


_POISONS = {
  "batch": _poison_batch,
  "gradient": _poison_gradient,
  "parameter": _poison_parameter,
}


def poison(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """NaN somewhere: exit code 1, one line, and nothing bad is kept."""
  what, at = draw.choice(sorted(_POISONS)), draw.randint(1, 20)
  workdir = bench.folder / name
  child = bench.start(workdir, before=lambda: _POISONS[what](at))
  line = bench.end(child, 1)
  if "nan" not in line.lower():
    raise FaultError(f"the line names no NaN: {line}")
  if (workdir / "result.json").exists():
    raise FaultError("there is a result")
  if what == "parameter":
    # A run that was never good starts anew elsewhere.
    folder = workdir / "checkpoints"
    if folder.is_dir() and os.listdir(folder):
      raise FaultError("a checkpoint of NaN was kept")
  else:
    bench.finish(workdir)
    # A step with a factor in its gradient is another program, whose rounding
    # may differ before the factor is NaN.
    if what == "batch":
      bench.compare(workdir)
  return Outcome(f"{what} at {at}")


def shared_cache(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """Two runs fill one empty cache at the same moment."""
  cache, pause = bench.folder / f"{name}-cache", draw.uniform(0, 1)
  workdirs = [bench.folder / f"{name}-{number}" for number in (1, 2)]
  children = []
  for workdir in workdirs:
    children.append(bench.start(workdir, cache=cache))
    time.sleep(pause)
  for child in children:
    bench.end(child, 0)
  for workdir in workdirs:
    bench.compare(workdir)
  return Outcome(f"{pause:.2f} s apart")


# Each fault, and how often it occurs in a round.
FAULTS: dict[str, tuple[Fault, int]] = {
  "kill": (kill, 5),
  "damaged_checkpoints": (damaged_checkpoints, 4),
  "end_signal": (end_signal, 2),
  "stopped": (stopped, 1),
  "second_run": (second_run, 1),
  "full_disk": (full_disk, 2),
  "full_tmpfs": (full_tmpfs, 1),
  "read_only": (read_only, 1),
  "slow_disk": (slow_disk, 1),
  "clock_steps": (clock_steps, 1),
  "one_of_two": (one_of_two, 1),
  "poison": (poison, 2),
  "damaged_for_evaluation": (damaged_for_evaluation, 1),
  "damaged_cache": (damaged_cache, 1),
  "shared_cache": (shared_cache, 1),
}
