"""Self-contained Orbax checkpoints.

A checkpoint holds the parameters, the optimizer state, the position in the
data, and the run's `Provenance`: experiment, taxonomy, tokenizer and content
hash of the corpus. `load` needs nothing else.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from edl_jax import config, storage
from edl_jax.config import Experiment, UserError
from edl_jax.generation.generator import Generated, generate
from edl_jax.generation.settings import Settings
from edl_jax.model.transformer import Model, abstract_model
from edl_jax.sharding import parameter_shardings, path_name
from edl_jax.step import TrainState
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import Tokenizer

_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Provenance:
  """What a run is made from. A run resumes only one of equal provenance."""

  experiment: Experiment
  taxonomy: Taxonomy
  tokenizer: Tokenizer
  content_hash: str

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON object."""
    return {
      "experiment": config.flatten(self.experiment),
      "taxonomy": self.taxonomy.to_dict(),
      "tokenizer": self.tokenizer.to_json(),
      "content_hash": self.content_hash,
    }

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Self:
    """Inverse of `to_dict`."""
    return cls(
      experiment=config.unflatten(saved["experiment"]),
      taxonomy=Taxonomy.from_dict(saved["taxonomy"]),
      tokenizer=Tokenizer.from_json(saved["tokenizer"]),
      content_hash=saved["content_hash"],
    )

  def check_continues(self, saved: Mapping[str, Any], where: str) -> None:
    """Checks that this run may resume the one that `saved` describes.

    Args:
      saved: a `to_dict`.
      where: the folder of that run, for messages.

    Raises:
      UserError: the two differ; names what differs.
    """
    current = self.to_dict()
    way_out = "choose another --workdir, or undo the difference"
    keys = config.differing_keys(saved["experiment"], current["experiment"])
    if keys:
      raise UserError(
        f"{where} belongs to another experiment: {'; '.join(keys)}; {way_out}"
      )
    for name, what in (
      ("content_hash", "was made from other text (content hash differs)"),
      ("taxonomy", "has other domains"),
      ("tokenizer", "has another tokenizer"),
    ):
      if json.dumps(saved[name]) != json.dumps(current[name]):
        raise UserError(f"{where} {what}; {way_out}")


def check_workdir(
  workdir: str, provenance: Provenance, checkpoint_bytes: int
) -> None:
  """Checks, before any device work, that a run can use `workdir`.

  Changes nothing there. A bucket is taken to have room enough.

  Args:
    workdir: folder of the run; need not exist.
    provenance: of the run about to start.
    checkpoint_bytes: size of one checkpoint.

  Raises:
    UserError: the folder cannot be written, has too little room, or belongs to
      another run.
  """
  saved = saved_provenance(workdir)
  if saved is not None:
    provenance.check_continues(saved, f"--workdir={workdir}")
  try:
    room = _room(workdir)
  except OSError as error:
    raise UserError(
      f"cannot write to --workdir={workdir}: {error.strerror}; choose another"
    ) from error
  keep = provenance.experiment.train.keep_checkpoints
  # While a checkpoint is being written, there is one more than is kept.
  needed = (keep + 1) * checkpoint_bytes
  if room < needed:
    raise UserError(
      f"--workdir={workdir} has room for {room / 2**20:.0f} MiB, but {keep} + 1"
      f" checkpoints take {needed / 2**20:.0f} MiB; make room or choose another"
    )


def _room(workdir: str) -> float:
  """Returns the bytes that checkpoints may take.

  Raises:
    OSError: the folder cannot be written.
  """
  if storage.in_bucket(workdir):
    storage.check_writable(workdir)
    return math.inf
  existing = os.path.abspath(workdir)
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing)
  # Permission bits say little on read-only or special file systems: write.
  with tempfile.TemporaryFile(dir=existing) as file:
    file.write(b"x")
  present = _folder_bytes(os.path.join(workdir, _FOLDER))
  return present + shutil.disk_usage(existing).free


def describe_workdir(workdir: str, provenance: Provenance) -> None:
  """Writes the provenance to `workdir`/run.json, if that file is missing.

  Until the first checkpoint, it alone says whose folder this is.
  """
  path = os.path.join(workdir, "run.json")
  if not epath.Path(path).exists():
    storage.make_folder(workdir)
    storage.write_json(path, provenance.to_dict())


def saved_provenance(workdir: str) -> dict[str, Any] | None:
  """Returns the provenance saved in `workdir`, None if there is none."""
  folder = os.path.join(workdir, _FOLDER)
  steps = checkpoint_steps(folder)
  if steps:
    return _read_provenance(os.path.join(folder, str(steps[-1])))
  path = os.path.join(workdir, "run.json")
  return _read_json(path) if epath.Path(path).exists() else None


def _read_provenance(checkpoint: str) -> dict[str, Any]:
  # Orbax writes the dict that JsonSave is given to this path.
  return _read_json(os.path.join(checkpoint, "provenance", "metadata"))


def _read_json(path: str) -> dict[str, Any]:
  try:
    return json.loads(epath.Path(path).read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error}); remove it") from error


def checkpoint_steps(folder: str) -> list[int]:
  """Returns the steps of the complete checkpoints in `folder`, rising."""
  if not epath.Path(folder).is_dir():
    return []
  # Orbax writes a checkpoint under a temporary name and renames it when it is
  # complete. In a bucket it adds an object that marks it as complete.
  return sorted(
    int(path.name)
    for path in epath.Path(folder).iterdir()
    if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
  )


class Checkpointer:
  """Saves asynchronously, keeps the newest checkpoints, restores exactly."""

  def __init__(self, workdir: str, keep: int):
    self._manager = ocp.CheckpointManager(
      storage.absolute(os.path.join(workdir, _FOLDER)),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )

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
    """Copies the state to the host, then writes it while training continues."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        parameters=ocp.args.StandardSave(_by_name(state.model)),
        optimizer=ocp.args.StandardSave(_by_name(state.optimizer)),
        # Orbax refuses to write an empty tree.
        **(
          {"auto_weights": ocp.args.StandardSave(state.auto_weights)}
          if state.auto_weights
          else {}
        ),
        data=ocp.args.JsonSave(dict(data_state)),
        provenance=ocp.args.JsonSave(provenance.to_dict()),
      ),
    )

  def restore(
    self, step: int, abstract: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    """Restores the training state and the position in the data.

    Args:
      step: of a complete checkpoint.
      abstract: `jax.ShapeDtypeStruct`s with the shardings of the result.
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        parameters=ocp.args.StandardRestore(_by_name(abstract.model)),
        optimizer=ocp.args.StandardRestore(_by_name(abstract.optimizer)),
        **(
          {"auto_weights": ocp.args.StandardRestore(abstract.auto_weights)}
          if abstract.auto_weights
          else {}
        ),
        data=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(
      step=jax.device_put(jnp.int32(step), abstract.step.sharding),
      model=_like(abstract.model, restored["parameters"]),
      optimizer=_like(abstract.optimizer, restored["optimizer"]),
      auto_weights=restored["auto_weights"] if abstract.auto_weights else {},
    )
    return state, restored["data"]

  def wait(self) -> None:
    """Blocks until the last save is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, then ends Orbax's threads."""
    self._manager.close()


class Loaded(NamedTuple):
  """What `load` returns: a trained model, and what it was trained on."""

  model: Model
  tokenizer: Tokenizer
  taxonomy: Taxonomy
  experiment: Experiment
  step: int
  content_hash: str

  def generate(
    self,
    prompts: Sequence[str],
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
  ) -> list[Generated]:
    """Continues prompts.

    Args:
      prompts, on_text: see `edl_jax.generation.generator.generate`.
      **settings: fields of `edl_jax.generation.settings.Settings`.

    Raises:
      UserError: see there.
    """
    return generate(
      self.model,
      self.tokenizer,
      self.taxonomy,
      prompts,
      Settings(**settings),
      self.experiment.train.sequence_length,
      on_text,
    )


def load(
  path: str, step: int | None = None, mesh: Mesh | None = None
) -> Loaded:
  """Loads a model; needs nothing but its checkpoint.

  Args:
    path: a run's workdir, its `checkpoints` folder, or the folder of one step,
      on this machine or in a bucket (gs://...).
    step: which checkpoint; by default the newest.
    mesh: where the parameters go; by default one device. It need not be the
      mesh that wrote them.

  Raises:
    UserError: there is no such checkpoint, or its bucket cannot be read.
  """
  checkpoint, step = _find(path, step)
  provenance = Provenance.from_dict(_read_provenance(checkpoint))
  abstract = abstract_model(provenance.experiment.model)
  if mesh is None:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one_device, abstract)
  else:
    shardings = parameter_shardings(abstract, mesh)
  abstract = jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=placed
    ),
    abstract,
    shardings,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    parameters = checkpointer.restore(
      os.path.join(checkpoint, "parameters"), _by_name(abstract)
    )
  return Loaded(
    model=_like(abstract, parameters),
    tokenizer=provenance.tokenizer,
    taxonomy=provenance.taxonomy,
    experiment=provenance.experiment,
    step=step,
    content_hash=provenance.content_hash,
  )


def checkpoint_provenance(path: str, step: int | None = None) -> Provenance:
  """Returns what a checkpoint was made from, without its parameters.

  Args, errors: as `load`.
  """
  checkpoint, _ = _find(path, step)
  return Provenance.from_dict(_read_provenance(checkpoint))


def _find(path: str, step: int | None = None) -> tuple[str, int]:
  """Returns a checkpoint's folder and its step; see `load`."""
  storage.check_access(path)
  path = storage.absolute(path)
  if epath.Path(path, "parameters").is_dir():
    folder, name = os.path.split(path)
    if not name.isdigit():
      raise UserError(
        f"{path}: the folder of a checkpoint must be named by its step"
      )
    steps = [known for known in checkpoint_steps(folder) if str(known) == name]
  else:
    inner = os.path.join(path, _FOLDER)
    folder = inner if epath.Path(inner).is_dir() else path
    steps = checkpoint_steps(folder)
  if not steps:
    raise UserError(f"no checkpoint in {path}")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise UserError(
      f"no checkpoint of step {step} in {folder}; there are: "
      + ", ".join(map(str, steps))
    )
  return os.path.join(folder, str(step)), step


def initial_tokenizer(experiment: Experiment, workdir: str) -> Tokenizer | None:
  """Returns the tokenizer of `train.initial_checkpoint`, None without one.

  Once the run has a checkpoint of its own, the tokenizer comes from there: the
  initial checkpoint may have been deleted.

  Raises:
    UserError: there is no such checkpoint, or its model differs from
      `experiment.model`.
  """
  path = experiment.train.initial_checkpoint
  if not path:
    return None
  saved = saved_provenance(workdir)
  if saved and checkpoint_steps(os.path.join(workdir, _FOLDER)):
    return Provenance.from_dict(saved).tokenizer
  try:
    provenance = checkpoint_provenance(path)
  except UserError as error:
    raise UserError(f"train.initial_checkpoint: {error}") from error
  same = {"dtype": "float32", "remat": "none"}
  theirs, wanted = (
    config.flatten(dataclasses.replace(Experiment(), model=model))
    for model in (
      dataclasses.replace(provenance.experiment.model, **same),
      dataclasses.replace(experiment.model, **same),
    )
  )
  keys = config.differing_keys(theirs, wanted)
  if keys:
    raise UserError(
      f"train.initial_checkpoint={path} holds another model:"
      f" {'; '.join(keys)}; set these keys to the checkpoint's values"
    )
  return provenance.tokenizer


def _by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree in nested dicts, keyed by their path.

  Checkpoints of such dicts can be read without this library's classes.
  """
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    *parents, name = path_name(path).split("/")
    holder = nested
    for parent in parents:
      holder = holder.setdefault(parent, {})
    holder[name] = leaf
  return nested


def _like(tree: Any, nested: Mapping[str, Any]) -> Any:
  """Inverse of `_by_name`; the result has the structure of `tree`."""

  def pick(path, _):
    holder = nested
    for name in path_name(path).split("/"):
      holder = holder[name]
    return holder

  return jax.tree_util.tree_map_with_path(pick, tree)


def _folder_bytes(folder: str) -> int:
  return sum(
    os.path.getsize(os.path.join(root, name))
    for root, _, names in os.walk(folder)
    for name in names
  )
