"""Times a training step of this checkout against that of an older one.

  git worktree add /tmp/older REVISION
  python -m benchmarks.step_ratio --baseline=/tmp/older

Each checkout runs in a process of its own, on all cores. They take turns of two
steps, and the ratio is the median over rounds of that within a round: below 1,
this checkout is faster. The older one must know `benchmarks/steps.py` and every
setting of the experiment.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks import measure
from edl_jax.command import Command
from edl_jax.config import UserError

COMMAND = Command(__doc__)
_EXPERIMENT = COMMAND.experiment("experiments/bench.py")
_BASELINE = COMMAND.flag("baseline", "", "Folder of the older checkout.")
_ROUNDS = COMMAND.flag("rounds", 7, "Turns of each checkout.", minimum=1)
_JSON = COMMAND.flag("json", "", "File to write all figures to, as JSON.")

_DOMAINS = 49

# Takes two steps for each line that it reads, and prints their mean seconds.
_STEPS = """
import sys
import jax
from benchmarks.steps import TrainingStep
from edl_jax import config_files, runtime, sharding
from edl_jax.config import MeshConfig
_, overrides = config_files.split_overrides(sys.argv[3:])
experiment = config_files.load(sys.argv[1], overrides)
runtime.configure()
mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
with jax.set_mesh(mesh):
  step = TrainingStep(experiment, int(sys.argv[2]), mesh)
  step()
  print("ready", flush=True)
  for _ in sys.stdin:
    print((step() + step()) / 2, flush=True)
"""


class _Checkout:
  """A process with a compiled step, of the checkout in a folder."""

  def __init__(self, process: subprocess.Popen[str], name: str):
    self._process, self._name = process, name
    # The checkout may print something before.
    while self._read() != "ready\n":
      pass

  def _read(self) -> str:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise UserError(f"the step of {self._name} failed: see above")
    return line

  def __call__(self) -> float:
    """Takes two steps; returns the mean seconds of one."""
    assert self._process.stdin is not None
    with suppress(BrokenPipeError):  # `_read` tells it.
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    return float(self._read())


@contextmanager
def _started(name: str, folder: Path) -> Iterator[_Checkout]:
  """Starts the process of a checkout, and ends it with the block."""
  # The file of this checkout, by name or with ":VARIANT".
  experiment = str(Path(_EXPERIMENT.value).absolute())
  overrides = [f"--experiment.{k}={v}" for k, v in COMMAND.overrides.items()]
  arguments = [experiment, str(_DOMAINS), *overrides]
  with subprocess.Popen(
    [sys.executable, "-c", _STEPS, *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(folder)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      yield _Checkout(process, name)
    finally:
      process.terminate()


@COMMAND.main
def main() -> None:
  """Prints the seconds of both steps and their ratio."""
  older = Path(_BASELINE.value)
  if not _BASELINE.value or not (older / "benchmarks" / "steps.py").exists():
    raise UserError(
      f"--baseline={_BASELINE.value}: name the folder of an older checkout,"
      " which has benchmarks/steps.py"
    )
  COMMAND.load()
  folders = {"this checkout": Path.cwd(), "the older one": older.absolute()}
  with ExitStack() as stack:
    steps = {
      name: stack.enter_context(_started(name, folder))
      for name, folder in folders.items()
    }
    taken = measure.take_turns(steps, _ROUNDS.value)
  this, base = taken.values()
  ratios = sorted(a / b for a, b in zip(this, base, strict=True))
  rows = [
    {"step of": name, "seconds": statistics.median(seconds)}
    for name, seconds in taken.items()
  ]
  measure.report(rows, _JSON.value, ratios=ratios)
  print(
    f"ratio {measure.median_ratio(this, base):.3f}"
    f" ({ratios[0]:.3f} to {ratios[-1]:.3f})"
  )


if __name__ == "__main__":
  sys.exit(main())
