"""Chooses what the backward pass computes again: the least that fits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from edl_jax.cache import cache_key, read_cache, write_cache
from edl_jax.config import Experiment
from edl_jax.runtime import DoesNotFit, compile_program
from edl_jax.step import trace_step
from edl_jax.text.taxonomy import Taxonomy

AUTO = "auto"
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
  return [_with(experiment, remat) for remat in ORDER]


def first_that_fits(
  experiment: Experiment,
  compile_step: Callable[[Experiment], T],
  say: Callable[[str], None],
) -> tuple[Experiment, T]:
  """Compiles the choices of `model.remat` in turn until one fits.

  Args:
    experiment: whose `model.remat` may be "auto".
    compile_step: compiles a step; raises DoesNotFit.
    say: is given a line for each choice of "auto" that was compiled.

  Returns:
    The experiment with the choice, and what `compile_step` returned.

  Raises:
    DoesNotFit: the last choice does not fit either.
  """
  made = choices(experiment)
  for choice in made:
    title = f"model.remat={choice.model.remat}"
    try:
      compiled = compile_step(choice)
    except DoesNotFit as error:
      if choice is made[-1]:
        raise
      needed, available = error.needed / 2**30, error.available / 2**30
      say(f"{title} needs {needed:.2f} GiB of {available:.2f}")
      continue
    if len(made) > 1:
      say(f"{title} fits, and computes the least again")
    return choice, compiled
  raise AssertionError("there is at least one choice")


def resolve(
  experiment: Experiment, taxonomy: Taxonomy, mesh: Mesh
) -> Experiment:
  """Returns the experiment with "auto" replaced by what fits this machine.

  All processes take the same choice. Each keeps it in its cache folder, and the
  compiled step in JAX's cache, so that only the first start compiles more than
  one step. A CPU has no limit, so nothing is computed again there.

  Args:
    experiment: whose `model.remat` may be "auto".
    taxonomy, mesh: of the run.

  Raises:
    DoesNotFit: no choice fits.
  """
  if experiment.model.remat != AUTO:
    return experiment
  device = mesh.devices.flat[0]

  @functools.cache
  def lower(choice: Experiment) -> jax.stages.Lowered:
    traced, _ = trace_step(choice, taxonomy, mesh)
    with jax.set_mesh(mesh):
      return traced.lower()

  def compile_everywhere(choice: Experiment) -> None:
    error = None
    try:
      compile_program(lower(choice), device)
    except DoesNotFit as does_not_fit:
      error = does_not_fit
    # Where it does not fit, all processes have the same error: they compile
    # one program for devices of one kind.
    if not _agree(error is None):
      raise error or DoesNotFit(np.nan, np.nan)

  # The program stands for the experiment, the mesh and this code.
  key = cache_key(
    lower(choices(experiment)[0]).as_text(),
    device.device_kind,
    device.client.platform_version,
  )
  name = f"remat-{key}.txt"
  kept = read_cache(name)
  if _agree(kept is not None) and kept is not None:
    return _with(experiment, kept.decode())
  chosen, _ = first_that_fits(experiment, compile_everywhere, _say)
  write_cache(name, chosen.model.remat.encode())
  return chosen


def _with(experiment: Experiment, remat: str) -> Experiment:
  model = dataclasses.replace(experiment.model, remat=remat)
  return dataclasses.replace(experiment, model=model)


def _agree(holds: bool) -> bool:
  """Returns whether something holds in all processes of the run."""
  return bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def _say(line: str) -> None:
  """Prints a line, on the first process."""
  if jax.process_index() == 0:
    print(line, flush=True)
