"""Measures which share of a save its digests take, and waiting for the disk.

  python -m benchmarks.saving --experiment=experiments/demo.py

A save of the experiment's training state with Orbax, until its files are
complete, takes turns with the digests alone, which are a part of it, and with a
save that leaves its files to the system. Moments are random: those of a trained
state are no zeros, which compress to nothing. Seconds of the processor count
what all threads do, whoever else uses the machine.
"""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.checkpoint.digest import array_digests
from edl_jax.command import Command
from edl_jax.config import MeshConfig
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

COMMAND = Command(__doc__)
COMMAND.experiment("experiments/demo.py")
_ROUNDS = COMMAND.flag("rounds", 7, "Turns that each takes.", minimum=1)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")


class _Unflushed(Checkpointer):
  def _flush(self) -> None:
    """Does not wait for the disk."""


def _random(tree: Any) -> Any:
  """Returns normal numbers in the place of arrays of real numbers."""
  return jax.tree.map(
    lambda leaf: (
      jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else leaf
    ),
    tree,
  )


@COMMAND.main
def main() -> None:
  """Prints the seconds of a save and those of its digests."""
  experiment = COMMAND.load()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  state = init_state(experiment, optimizer, mesh)
  state = state._replace(optimizer=_random(state.optimizer))
  provenance = Provenance(
    experiment, Taxonomy.from_names(["domain"]), byte_tokenizer(), "hash"
  )

  def save(kind: type[Checkpointer]) -> None:
    with tempfile.TemporaryDirectory() as folder:
      checkpointer = kind(folder, keep=1)
      checkpointer.save(1, state, {}, provenance)
      checkpointer.close()

  works: dict[str, Callable[[], object]] = {
    "save": lambda: save(Checkpointer),
    "save without flush": lambda: save(_Unflushed),
    "digests": lambda: array_digests((state.model, state.optimizer)),
  }
  processor: dict[str, list[float]] = {name: [] for name in works}

  def turn(name: str) -> float:
    wall, used = time.perf_counter(), time.process_time()
    works[name]()
    processor[name].append(time.process_time() - used)
    return time.perf_counter() - wall

  for work in works.values():
    work()  # Compiles.
  wall = measure.take_turns(
    {name: functools.partial(turn, name) for name in works}, _ROUNDS.value
  )
  rows = [
    {
      "what": name,
      "ms": 1e3 * statistics.median(wall[name]),
      "of a save": measure.median_ratio(wall[name], wall["save"]),
      "processor ms": 1e3 * statistics.median(processor[name]),
      "of a save's": measure.median_ratio(processor[name], processor["save"]),
    }
    for name in works
  ]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
  print(f"a state of {size:.1f} MB")
  measure.report(rows, _JSON.value, megabytes=size)


if __name__ == "__main__":
  sys.exit(main())
