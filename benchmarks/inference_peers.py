"""Runs contestants of inference in turns: their processes, models and modes."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags

from benchmarks import inference
from benchmarks.peers import ROOT, python_of
from edl_jax import config_files, sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.command import Command
from edl_jax.config import Experiment, MeshConfig
from edl_jax.interop import export
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import load_tokenizer

EXPERIMENTS = {
  "demo": str(ROOT / "experiments/demo.py"),
  "bench": str(ROOT / "experiments/bench.py"),
}


def model_flag(command: Command) -> flags.FlagHolder[tuple[str, ...]]:
  """Defines the flag that names `EXPERIMENTS`."""
  return command.flag(
    "model",
    tuple(EXPERIMENTS),
    "Experiments whose shapes the model has.",
    choices=tuple(EXPERIMENTS),
  )


def write_models(experiment: Experiment, folder: str) -> dict[str, str]:
  """Writes an untrained model as a run and as exported weights.

  Its tokenizer is the experiment's.

  Returns:
    The folder of each contestant.
  """
  corpus = load_corpus(experiment.data)
  tokenizer = load_tokenizer(experiment, corpus)
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  run, exported = f"{folder}/run", f"{folder}/exported"
  checkpointer = Checkpointer(run, keep=1)
  with jax.set_mesh(mesh):
    state = init_state(
      experiment, make_optimizer(experiment.optimizer, 1), mesh
    )
    checkpointer.save(
      *(1, state, {}),
      Provenance(experiment, corpus.taxonomy, tokenizer, corpus.content_hash),
    )
  checkpointer.close()
  export.main([f"--workdir={run}", f"--out={exported}"])
  return {"ours": run, "transformers": exported}


def load_experiment(name: str) -> Experiment:
  return config_files.load(EXPERIMENTS[name])


class Contestant:
  """A process that answers tasks, one at a time.

  Attributes:
    described: its modes by kind of task, and its versions.
  """

  def __init__(self, name: str, folder: str, environments: str, threads: int):
    python = python_of("harness" if name != "ours" else name, environments)
    self._process = subprocess.Popen(
      [python, "-P", inference.__file__, name, folder, str(threads)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # Peers must not import this repository's folders.
        "PYTHONPATH": str(ROOT) if name == "ours" else "",
      },
    )
    _, self.described = self.ask("describe")

  def ask(self, kind: str, **task: Any) -> tuple[float, Any]:
    """Returns the seconds that a task took, and its result."""
    assert self._process.stdin and self._process.stdout
    self._process.stdin.write(json.dumps({"kind": kind, **task}) + "\n")
    self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith("RESULT "):
        seconds, result = json.loads(line.removeprefix("RESULT "))
        return seconds, result
    raise RuntimeError(f"the contestant ended: {self._process.wait()}")

  def best_mode(self, kind: str, task: Mapping[str, Any], some: int) -> Any:
    """Returns the mode that is fastest on the first texts of a task.

    Args:
      kind, task: as for `ask`; lists are of texts.
      some: number of texts to try a mode on.
    """
    small = {
      name: value[:some] if isinstance(value, list) else value
      for name, value in task.items()
    }
    taken = []
    for mode in self.described["modes"][kind]:
      # The first try compiles.
      tries = [self.ask(kind, mode=mode, **small)[0] for _ in range(2)]
      taken.append((tries[1], mode))
      print(f"  {mode or 'its only mode'}: {tries[1]:.2f} s", flush=True)
    best = min(taken, key=lambda each: each[0])[1]
    self.ask(kind, mode=best, **task)
    return best

  def close(self) -> None:
    assert self._process.stdin and self._process.stdout
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()


@contextlib.contextmanager
def contestants(
  folders: Mapping[str, str], environments: str, threads: int
) -> Iterator[dict[str, Contestant]]:
  """Starts the contestants, and ends their processes."""
  running: dict[str, Contestant] = {}
  try:
    for name, folder in folders.items():
      running[name] = Contestant(name, folder, environments, threads)
    yield running
  finally:
    for each in running.values():
      each.close()
