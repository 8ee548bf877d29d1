"""Saves and restores the state of a run, with Orbax."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from edl_jax import storage
from edl_jax.checkpoint.digest import array_digests, json_digest
from edl_jax.checkpoint.folders import (
  FOLDER,
  DamagedError,
  read_provenance,
  sealed,
)
from edl_jax.checkpoint.items import Verify, by_name, check_items, like, reading
from edl_jax.checkpoint.lock import any_process
from edl_jax.checkpoint.provenance import Provenance
from edl_jax.step import TrainState


class Restored(NamedTuple):
  """A state that `Checkpointer.restore_newest` found intact."""

  step: int
  state: TrainState
  data_state: dict[str, Any]


class Checkpointer:
  """Saves asynchronously, keeps the newest checkpoints, restores exactly."""

  def __init__(self, workdir: str, keep: int):
    self._workdir = storage.absolute(workdir)
    self._folder = os.path.join(self._workdir, FOLDER)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._flush),
      ),
    )

  def _flush(self) -> None:
    """Waits until the files of a checkpoint are on the disk.

    Orbax calls it in a thread, before it gives the checkpoint its name. It
    leaves files to the system, which loses the last half minute of them when
    the power or the disk fails.
    """
    if not storage.in_bucket(self._folder):
      for name in storage.names(self._folder):
        if not name.isdigit():
          storage.flush_folder(os.path.join(self._folder, name))

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, None without one."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: TrainState,
    data_state: Mapping[str, Any],
    provenance: Provenance,
  ) -> None:
    """Copies the state to the host, then writes it while training continues.

    The digests of all arrays and of `data_state` are saved with it.
    """
    items = _items(state)
    data = dict(data_state)
    digests = array_digests(items) | {"data": json_digest(data)}
    self._manager.save(step, args=saved_items(items, data, provenance, digests))

  def restore(
    self, step: int, abstract: TrainState, verify: Verify = "full"
  ) -> tuple[TrainState, dict[str, Any]]:
    """Restores the training state and the position in the data.

    Args:
      step: of a complete checkpoint.
      abstract: `jax.ShapeDtypeStruct`s with the shardings of the result.
      verify: how much is compared with the digests, see `check_items`.

    Raises:
      DamagedError: the checkpoint is not what was saved.
    """
    checkpoint = os.path.join(self._folder, str(step))
    saved = read_provenance(checkpoint).get("digests", {})
    targets = _items(abstract)
    restored = reading(
      checkpoint,
      lambda: self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{
            name: ocp.args.StandardRestore(tree)
            for name, tree in targets.items()
          },
          data=ocp.args.JsonRestore(),
        ),
      ),
    )
    data_state = restored["data"]
    if saved and saved.get("data") != json_digest(data_state):
      raise DamagedError(
        f"step {step}: {os.path.join(checkpoint, 'data')} is not what was saved"
        " (digest differs)"
      )
    arrays = {name: restored[name] for name in targets}
    check_items(checkpoint, arrays, saved, verify)
    state = TrainState(
      step=jax.device_put(jnp.int32(step), abstract.step.sharding),
      model=like(abstract.model, arrays["parameters"]),
      optimizer=like(abstract.optimizer, arrays["optimizer"]),
      auto_weights=arrays.get("auto_weights", {}),
      **{
        name: like(getattr(abstract, name), arrays[name])
        for name in ("ema", "spikes")
        if name in arrays
      },
    )
    return state, data_state

  def restore_newest(
    self,
    abstract: TrainState,
    verify: Verify = "full",
    tell: Callable[[str], None] | None = None,
  ) -> Restored | None:
    """Restores the newest intact checkpoint; None if there is none at all.

    A damaged one is moved to the folder "damaged" of the workdir, once an older
    one is known to be intact: the run will write its step again.

    Args:
      abstract, verify: see `restore`.
      tell: takes a line for each damaged checkpoint; by default the first
        process prints it on stderr.

    Raises:
      DamagedError: every checkpoint is damaged; tells of the newest.
    """
    tell = tell or _tell
    damaged: dict[int, DamagedError] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      found, problem = None, None
      try:
        found = self.restore(step, abstract, verify)
      except DamagedError as error:
        problem = error
      if any_process(found is None):
        damaged[step] = problem or DamagedError(
          f"step {step}: another process cannot read it"
        )
        continue
      assert found is not None, "this process has no problem"
      for bad, error in damaged.items():
        tell(f"{error}; going back to step {step}, kept in {self._put_by(bad)}")
      if damaged:
        self._manager.reload()
      return Restored(step, *found)
    if damaged:
      raise DamagedError(
        f"no checkpoint in {self._folder} is intact: {max(damaged.items())[1]};"
        " restore it from a copy, or choose another --workdir"
      )
    return None

  def _put_by(self, step: int) -> str:
    """Moves a checkpoint out of the way; returns its new path."""
    target = os.path.join(self._workdir, "damaged", str(step))
    number = 1
    while epath.Path(target).exists():
      number += 1
      target = os.path.join(self._workdir, "damaged", f"{step}-{number}")
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint")
    if jax.process_index() == 0:
      epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
      epath.Path(self._folder, str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint moved")
    return target

  def wait(self) -> None:
    """Blocks until the last save is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, then ends Orbax's threads."""
    self._manager.close()


def saved_items(
  items: Mapping[str, Any],
  data: Mapping[str, Any],
  provenance: Provenance,
  digests: Mapping[str, str],
) -> ocp.args.Composite:
  """Returns what Orbax writes as one checkpoint.

  Args:
    items: arrays in nested dicts, by item.
    data: the position in the data.
    provenance, digests: what the checkpoint says of itself.
  """
  return ocp.args.Composite(
    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
    data=ocp.args.JsonSave(dict(data)),
    provenance=ocp.args.JsonSave(
      sealed(provenance.to_dict() | {"digests": dict(digests)})
    ),
  )


def _tell(line: str) -> None:
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def _items(state: TrainState) -> dict[str, Any]:
  """Returns the arrays of a state by the item that holds them."""
  items = {
    "parameters": by_name(state.model),
    "optimizer": by_name(state.optimizer),
  }
  # Orbax refuses to write an empty tree.
  if state.auto_weights:
    items["auto_weights"] = dict(state.auto_weights)
  if state.ema is not None:
    items["ema"] = by_name(state.ema)
  if state.spikes is not None:
    items["spikes"] = by_name(state.spikes)
  return items
