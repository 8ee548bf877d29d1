"""The cut model as a run folder that every other command takes."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from edl_jax import sharding, storage
from edl_jax.analysis.carve.cost import cut_config
from edl_jax.analysis.carve.runs import Run
from edl_jax.analysis.carve.selection import expert_numbers
from edl_jax.checkpoint import Checkpointer, describe_workdir
from edl_jax.config import UserError
from edl_jax.optim import make_optimizer
from edl_jax.step import TrainState, abstract_state

# Beside the checkpoint: what the model was cut from, and how.
RECORD = "cut.json"


def check_export(folder: str) -> None:
  """Checks that the folder of a cut model can be made.

  Raises:
    UserError: it exists, or its bucket cannot be read.
  """
  storage.check_access(folder, "--export=")
  if epath.Path(folder).exists():
    raise UserError(f"--export={folder} exists; choose another folder")


def export(
  run: Run, kept_LE: np.ndarray, folder: str, record: dict[str, Any], mesh: Mesh
) -> None:
  """Writes a run whose model has the kept experts alone.

  The checkpoint has the step, the optimizer's moments and the position in the
  data of the one that it is cut from, so that training can continue from it.

  Args:
    run: whose newest checkpoint is cut.
    kept_LE: bool, as many experts in every layer.
    folder: of the new run; must not exist.
    record: is written to `folder`/cut.json, with what this function knows.
    mesh: where to load the checkpoint.

  Raises:
    UserError: the folder exists or cannot be written.
  """
  check_export(folder)
  experiment = run.experiment
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  keep_checkpoints = experiment.train.keep_checkpoints
  source = Checkpointer(run.workdir, keep_checkpoints)
  state, data_state = source.restore(
    run.step, abstract_state(experiment, optimizer, mesh)
  )
  source.close()
  keep = int(kept_LE[0].sum())
  provenance = dataclasses.replace(
    run.provenance,
    experiment=dataclasses.replace(
      experiment, model=cut_config(experiment.model, keep)
    ),
  )
  try:
    describe_workdir(folder, provenance)
    storage.write_json(
      os.path.join(folder, RECORD),
      {
        "from": storage.absolute(run.workdir),
        "step": run.step,
        "num_experts": experiment.model.num_experts,
        "keep": keep,
        "experts": expert_numbers(kept_LE),
        **record,
      },
    )
    target = Checkpointer(folder, keep_checkpoints)
    target.save(run.step, cut(state, kept_LE), data_state, provenance)
    target.close()
  except OSError as error:
    raise UserError(
      f"cannot write to --export={folder}: {error.strerror or error}; choose"
      " another folder"
    ) from error


def cut(state: TrainState, kept_LE: np.ndarray) -> TrainState:
  """Removes experts from parameters and optimizer state.

  Args:
    state: leaves on the host or on devices of this process.
    kept_LE: bool, as many experts in every layer.

  Returns:
    The state with NumPy arrays, whose expert axes are shorter.
  """

  def cut_leaf(path: Any, leaf: Any) -> Any:
    name, array = sharding.last_name(path), np.asarray(leaf)
    letters = name.rpartition("_")[2]
    if name not in sharding.PARAMETER_RULES or "E" not in letters:
      return array
    # The layers of a parameter are stacked on its first axis.
    axis = letters.index("E")
    return np.stack(
      [
        np.compress(kept_E, layer, axis)
        for kept_E, layer in zip(kept_LE, array, strict=True)
      ]
    )

  return jax.tree_util.tree_map_with_path(cut_leaf, jax.device_get(state))
