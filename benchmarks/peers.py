"""Compares the speed of a training step with other libraries' at its shapes.

  python -m benchmarks.peers --json=peers.json

Contestants take turns, each in a separate process. All have the shapes of
`experiments/bench.py`, float32, AdamW, gradient clipping and a balance loss,
and drop no token:

  ours                   edl_jax, with expert divergence over 49 domains
  transformers           Hugging Face Transformers, Qwen3MoeForCausalLM
  transformers_compiled  the same through torch.compile (needs a C++ compiler)
  maxtext                MaxText, every expert computes every token
                         (sparse_matmul=false capacity_factor=-1)
  maxtext_sparse         MaxText, jax.lax.ragged_dot (sparse_matmul=true)

The first run installs the peers in virtual environments, which takes minutes
and some GB; later runs reuse these. MaxText needs CPython 3.12 or newer, as
`python3.12` on the PATH if this Python is older. A peer that cannot be
installed or run is left out, with a line that says why. pip's own settings
apply: set PIP_EXTRA_INDEX_URL to use an index of smaller CPU-only wheels.

The ratio is our tokens per second over the peer's: median, least and greatest
over rounds. Step 1 is timed from the start of the process, so it includes
imports, initialization and compilation, but no reading of text. It is cold in a
run before the rounds, with an empty folder for compiled programs, and warm in
the rounds.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from benchmarks import contestants, measure
from edl_jax import config, config_files
from edl_jax.cache import cache_directory
from edl_jax.command import Command
from edl_jax.config import UserError

ENVIRONMENTS_FOLDER = str(cache_directory() / "peers")


class Flags(NamedTuple):
  """Flags of every comparison with peers."""

  rounds: flags.FlagHolder[int]
  threads: flags.FlagHolder[int]
  environments: flags.FlagHolder[str]
  json: flags.FlagHolder[str]


def comparison_flags(command: Command) -> Flags:
  """Defines the flags of a comparison with peers."""
  return Flags(
    command.flag("rounds", 5, "Turns that each contestant takes.", minimum=1),
    command.flag("threads", 2, "Cores for each contestant.", minimum=1),
    command.flag(
      "environments",
      ENVIRONMENTS_FOLDER,
      "Folder that keeps the peers' virtual environments.",
    ),
    command.flag("json", "", "File to write the figures to, as JSON."),
  )


COMMAND = Command(__doc__)
_FLAGS = comparison_flags(COMMAND)
_PEERS = COMMAND.flag(
  "peers",
  tuple(contestants.CONTESTANTS),
  "Contestants to run, in order.",
  choices=tuple(contestants.CONTESTANTS),
)
_STEPS = COMMAND.flag("steps", 10, "Steps to time in each turn.", minimum=1)

ROOT = pathlib.Path(__file__).parent.parent
NUM_DOMAINS = 49
WARMUP_STEPS = 3


class UnavailableError(UserError):
  """A peer cannot be installed or run here."""


@dataclasses.dataclass(frozen=True)
class Environment:
  """What a peer is installed from."""

  # Oldest CPython that it supports.
  python: tuple[int, int]
  packages: tuple[str, ...]


ENVIRONMENTS = {
  "transformers": Environment(
    (3, 11), ("torch==2.13.0", "transformers==5.23.0")
  ),
  # What benchmarks.scoring and benchmarks.generation compare with.
  "harness": Environment(
    (3, 11),
    (
      "torch==2.13.0",
      "transformers==5.23.0",
      "accelerate==1.15.0",
      "lm_eval==0.4.13",
      "datasets==5.2.0",
    ),
  ),
  # MaxText declares no dependencies: these, with what they bring, are what its
  # training program imports with DECOUPLE_GCLOUD=TRUE.
  "maxtext": Environment(
    (3, 12),
    (
      "maxtext==0.2.5",
      "aqtp==0.9.0",
      "drjax==0.2.1",
      "flax==0.12.12",
      "grain==0.2.18",
      "jax==0.11.1",
      "jinja2==3.1.6",
      "ml_collections==1.1.0",
      "omegaconf==2.4.0",
      "optax==0.2.8",
      "orbax-checkpoint==0.12.8",
      "pathwaysutils==0.1.13",
      "pillow==13.0.0",
      "pydantic==2.14.3",
      "qwix==0.1.8",
      "sentencepiece==0.2.3",
      "sympy==1.14.0",
      "tiktoken==0.14.0",
      "tokamax==0.0.17",
      "transformers==5.23.0",
    ),
  ),
}


def _runs(python: str) -> bool:
  return not subprocess.run([python, "-c", ""], capture_output=True).returncode


def interpreter(oldest: tuple[int, int]) -> str:
  """Returns this Python or, if it is too old, a newer one on the PATH.

  Raises:
    UnavailableError: there is none.
  """
  if sys.version_info[:2] >= oldest:
    return sys.executable
  for minor in range(oldest[1], oldest[1] + 3):
    path = shutil.which(f"python3.{minor}")
    # A version manager's shim may be found that does not run.
    if path and _runs(path):
      return path
  raise UnavailableError(
    f"needs CPython 3.{oldest[1]} or newer: put python3.{oldest[1]} on the PATH"
  )


def python_of(contestant: str, folder: str) -> str:
  """Returns the interpreter of a contestant; makes its environment if needed.

  Args:
    contestant: a key of `contestants.CONTESTANTS`.
    folder: holds the environments.

  Raises:
    UnavailableError: the environment cannot be made.
  """
  if contestant == "ours":
    return sys.executable
  name = contestant.split("_", 1)[0]
  environment, path = ENVIRONMENTS[name], os.path.join(folder, name)
  python = os.path.join(path, "bin", "python")
  # Written last, so that an unfinished or outdated environment is made again.
  done = pathlib.Path(path, "packages.txt")
  listed = "\n".join(environment.packages)
  if done.exists() and done.read_text(encoding="utf-8") == listed:
    return python
  print(f"{name}: installing in {path}, once", flush=True)
  base = interpreter(environment.python)
  run([base, "-m", "venv", "--clear", path])
  run([python, "-m", "pip", "install", "--quiet", *environment.packages])
  done.write_text(listed, encoding="utf-8")
  return python


def run(command: list[str], **options: Any) -> str:
  """Runs a command and returns its output.

  Raises:
    UnavailableError: the command failed; the message is its line of error.
  """
  process = subprocess.run(command, capture_output=True, text=True, **options)
  if process.returncode:
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    # pip prints its reason as the first error, before advice and notices.
    errors = [line for line in lines if line.startswith("ERROR: ")]
    raise UnavailableError((errors or lines[-1:] or ["no message"])[0])
  return process.stdout


def take_turn(
  contestant: str, python: str, experiment: Mapping[str, Any], cache: str
) -> dict[str, Any]:
  """Runs a contestant in a separate process and returns its figures.

  Args:
    contestant: a key of `contestants.CONTESTANTS`.
    python: interpreter of its environment.
    experiment: the shapes, flattened.
    cache: folder of compiled programs.

  Raises:
    UnavailableError: the process failed.
  """
  variables = {
    **os.environ,
    "OMP_NUM_THREADS": str(_FLAGS.threads.value),
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TORCHINDUCTOR_CACHE_DIR": cache,
    # Peers must not import this repository's folders.
    "PYTHONPATH": str(ROOT) if contestant == "ours" else "",
  }
  with tempfile.TemporaryDirectory() as scratch:
    request = contestants.Request(
      contestant=contestant,
      experiment=dict(experiment),
      num_domains=NUM_DOMAINS,
      warmup_steps=WARMUP_STEPS,
      steps=_STEPS.value,
      threads=_FLAGS.threads.value,
      cache=cache,
      started=time.monotonic(),
    )
    printed = run(
      [python, "-P", contestants.__file__, json.dumps(request._asdict())],
      cwd=scratch,
      env=variables,
    )
  figures = json.loads(printed.splitlines()[-1])
  print(
    f"{contestant}: {figures['tokens_per_second']:,.0f} tokens/s, step 1 after"
    f" {figures['first_step_seconds']:.1f} s",
    flush=True,
  )
  return figures


def _row(
  name: str,
  cold: Mapping[str, Any],
  warm: list[dict[str, Any]],
  rates: Mapping[str, list[float]],
) -> dict[str, Any]:
  ratios = [
    ours / theirs for ours, theirs in zip(rates.get("ours", []), rates[name])
  ]
  first, last = cold["lm_loss"]
  return {
    "contestant": name,
    "parameters": f"{cold['parameters']:,}",
    "tokens/s": statistics.median(rates[name]),
    "ours / it": statistics.median(ratios) if ratios else "",
    "least": min(ratios, default=""),
    "greatest": max(ratios, default=""),
    "step 1 cold (s)": cold["first_step_seconds"],
    "step 1 warm (s)": statistics.median(
      figures["first_step_seconds"] for figures in warm
    ),
    "LM loss": f"{first:.2f} -> {last:.2f}",
  }


def compare(names: Sequence[str], folder: str, caches: str) -> None:
  """Runs the contestants and prints the table.

  Args:
    names: keys of `contestants.CONTESTANTS`.
    folder: holds the environments.
    caches: an empty folder, for compiled programs.
  """
  experiment = config.flatten(
    config_files.load(str(ROOT / "experiments/bench.py"))
  )
  cold: dict[str, dict[str, Any]] = {}
  warm: dict[str, list[dict[str, Any]]] = {}
  turns: dict[str, Callable[[], float]] = {}
  for name in names:
    cache = os.path.join(caches, name)
    try:
      python = python_of(name, folder)
      cold[name] = take_turn(name, python, experiment, cache)
    except UnavailableError as error:
      print(f"{name}: left out: {error}", flush=True)
      continue
    warm[name] = []

    def turn(name=name, python=python, cache=cache) -> float:
      warm[name].append(take_turn(name, python, experiment, cache))
      return warm[name][-1]["tokens_per_second"]

    turns[name] = turn
  if not turns:
    raise UserError("no contestant could be run")
  rates = measure.take_turns(turns, _FLAGS.rounds.value)
  print()
  measure.report(
    [_row(name, cold[name], warm[name], rates) for name in turns],
    _FLAGS.json.value,
    experiment=experiment,
    threads=_FLAGS.threads.value,
    num_domains=NUM_DOMAINS,
    runs={name: {"cold": cold[name], "rounds": warm[name]} for name in turns},
  )


@COMMAND.main
def main() -> None:
  """Runs the contestants and prints the table."""
  folder = os.path.abspath(os.path.expanduser(_FLAGS.environments.value))
  with tempfile.TemporaryDirectory() as caches:
    compare(_PEERS.value, folder, caches)


if __name__ == "__main__":
  sys.exit(main())
