"""Chooses what the backward pass computes again: the least that fits."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from edl_jax.cache import cache_key, read_cache, write_cache
from edl_jax.config import Experiment
from edl_jax.runtime import DoesNotFit, compile_program, memory_limit
from edl_jax.step import AUTO
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.tracing import trace_step

# Values of `model.remat`. Each computes more again than the one before, and
# keeps less.
ORDER = ("none", "experts", "attention", "full")

T = TypeVar("T")


def choices(experiment: Experiment) -> list[Experiment]:
  """Returns the experiment with each value that "auto" stands for, in `ORDER`.

  With any other value of `model.remat`, returns the experiment alone.
  """
  if experiment.model.remat != AUTO:
    return [experiment]
  return [
    dataclasses.replace(
      experiment, model=dataclasses.replace(experiment.model, remat=remat)
    )
    for remat in ORDER
  ]


def first_that_fits(
  made: Sequence[Experiment],
  compile_step: Callable[[Experiment], T],
  say: Callable[[str], None],
) -> tuple[Experiment, T]:
  """Compiles one choice after the other until one fits.

  Args:
    made: from `choices`, or the last of them.
    compile_step: compiles a step; raises DoesNotFit.
    say: is given a line for each choice that was compiled.

  Returns:
    The choice, and what `compile_step` returned.

  Raises:
    DoesNotFit: the last choice does not fit either.
  """
  for choice in made[:-1]:
    title = f"model.remat={choice.model.remat}"
    try:
      compiled = compile_step(choice)
    except DoesNotFit as error:
      needed, available = error.needed / 2**30, error.available / 2**30
      say(f"{title} needs {needed:.2f} GiB of {available:.2f}")
    else:
      say(f"{title} fits")
      return choice, compiled
  last = made[-1]
  compiled = compile_step(last)
  say(f"model.remat={last.model.remat} fits")
  return last, compiled


def resolve(
  experiment: Experiment,
  taxonomy: Taxonomy,
  mesh: Mesh,
  supervised: bool = False,
) -> tuple[Experiment, jax.stages.Compiled | None]:
  """Replaces "auto" by what fits the devices, and compiles the training step.

  All processes take the same choice. Each notes it in its cache folder, and the
  next start begins with it. A CPU has no limit, so nothing is computed again
  there.

  Args:
    experiment: whose `model.remat` may be "auto".
    taxonomy, mesh: of the run.
    supervised: whether its rows have loss weights.

  Returns:
    The experiment with the choice, and its compiled step. Without "auto", the
    experiment itself and None.

  Raises:
    DoesNotFit: no choice fits.
  """
  if experiment.model.remat != AUTO:
    return experiment, None
  made = choices(experiment)
  device = mesh.local_devices[0]

  @functools.cache
  def lower(choice: Experiment) -> jax.stages.Lowered:
    traced, _ = trace_step(choice, taxonomy, mesh, supervised)
    with jax.set_mesh(mesh):
      return traced.lower()

  def compile_everywhere(choice: Experiment) -> jax.stages.Compiled:
    compiled, missing = None, (0.0, 0.0)
    try:
      compiled = compile_program(lower(choice), device)
    except DoesNotFit as error:
      missing = error.needed, error.available
    needed, available = max(map(tuple, _from_all(missing)))
    if compiled is None or needed:
      raise DoesNotFit(needed, available)
    return compiled

  # The step stands for the experiment and the mesh.
  key = cache_key(
    lower(made[0]).as_text(),
    device.device_kind,
    device.client.platform_version,
    memory_limit(device) or 0,
    *(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
  )
  name = f"remat-{key}.txt"
  kept = (read_cache(name) or b"").decode()
  # What is noted may not fit any more: it is where to begin. Processes begin
  # together, whatever each of them has noted.
  begin = ORDER.index(kept) if kept in ORDER else 0
  first = int(_from_all((begin,)).min())
  chosen, compiled = first_that_fits(made[first:], compile_everywhere, _say)
  write_cache(name, chosen.model.remat.encode())
  return chosen, compiled


def _from_all(values: Sequence[float]) -> np.ndarray:
  """Returns the numbers of every process, float32 (processes, numbers)."""
  own = np.array(values, np.float32)
  return np.reshape(multihost_utils.process_allgather(own), (-1, own.size))


def _say(line: str) -> None:
  """Prints a line, on the first process."""
  if jax.process_index() == 0:
    print(line, flush=True)
