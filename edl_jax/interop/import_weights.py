"""Makes a run folder of a checkpoint that Hugging Face Transformers wrote.

  python -m edl_jax.interop.import_weights --source=hub/olmoe --out=runs/olmoe

Reads Qwen3-MoE, OLMoE, Mixtral, Qwen2-MoE and DeepSeek-MoE from config.json and
safetensors files, tensor by tensor. The run folder has one checkpoint, of step
0, which `edl_jax.load`, generation, tasks and `--mode=eval` take, and

  python -m edl_jax.main --experiment=runs/olmoe/experiment.py ...

trains from it: that file has the settings of the model. The command runs on
the host's CPU, and holds some experts of one layer at a time.

With --settings_only it reads config.json alone and writes that file alone, for

  python -m edl_jax.aot --experiment=runs/olmoe/experiment.py ...

which says on which slice of TPUs the model fits before it is downloaded.
"""

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import (
  DataConfig,
  Experiment,
  ModelConfig,
  TrainConfig,
  UserError,
)
from edl_jax.interop import folders, hub_config
from edl_jax.validation import validate

if TYPE_CHECKING:
  from edl_jax.interop.architectures import Architecture
  from edl_jax.interop.safetensors_reader import Checkpoint
  from edl_jax.interop.tensors import Slot

COMMAND = Command(__doc__)
_SOURCE = COMMAND.flag(
  "source",
  "",
  "Folder with config.json and safetensors files, on this machine.",
  required=True,
)
_OUT = COMMAND.flag(
  "out", "", "Run folder to write; it must not exist.", required=True
)
_TOKENIZER = COMMAND.flag(
  "tokenizer",
  "",
  "File of the tokenizer, tokenizer.json or a SentencePiece .model, or byte. By"
  " default that of the source.",
)
_SETTINGS_ONLY = COMMAND.flag(
  "settings_only",
  False,
  "Write experiment.py alone, from config.json alone, without weights.",
)


# Parameters of mallopt, in malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def import_weights(source: str, out: str, tokenizer: str = "") -> list[str]:
  """Makes a run folder, complete or not there, of a checkpoint on the hub.

  Args:
    source: folder of the checkpoint.
    out: the run folder.
    tokenizer: file, "byte", or "" for that of the source.

  Returns:
    Lines that say what was imported.

  Raises:
    UserError: the source is damaged, incomplete, or of a model or tokenizer
      that edl_jax cannot express; or `out` exists or cannot be written. Names
      the file, key or tensor.
  """
  # Imports JAX, which --help and errors in flags do without.
  from edl_jax import checkpoint
  from edl_jax.interop.safetensors_reader import Checkpoint
  from edl_jax.interop.tensors import parameters, slots
  from edl_jax.interop.tokenizer import read_hub_tokenizer
  from edl_jax.model.transformer import abstract_model
  from edl_jax.text.taxonomy import Taxonomy

  folders.check_new(out)
  content = _read_config(source)
  architecture, experiment = _described(source, content)
  experiment.data = DataConfig(tokenizer=tokenizer or os.path.join(source, ""))
  validate(experiment)
  model = experiment.model
  own_tokenizer, tokenizer_settings = read_hub_tokenizer(source, tokenizer)
  _check_rows(own_tokenizer.vocabulary_size, model.vocabulary_size)
  tensors = Checkpoint(source)
  shapes = {
    path: leaf.shape for path, leaf in parameters(abstract_model(model)).items()
  }
  wanted = list(slots(architecture, model))
  _check_tensors(tensors, wanted, shapes)
  total = sum(map(math.prod, shapes.values()))
  folders.check_room(out, 4 * total)
  provenance = checkpoint.Provenance(
    experiment=experiment,
    taxonomy=Taxonomy.from_names([]),
    tokenizer=own_tokenizer,
    # No text of ours made these weights.
    content_hash="",
    source={
      "name": experiment.name,
      "model_type": architecture.model_type,
      "config": {
        key: value
        for key, value in content.items()
        if key.endswith("_token_id") and value is not None
      },
      **tokenizer_settings,
    },
  )
  with _whole_run(out, experiment) as folder:
    checkpoint.save_streamed(
      folder, shapes, _blocks(tensors, wanted, shapes), provenance
    )
  return _summary(out, architecture.title, total, model, own_tokenizer)


def write_settings(source: str, out: str) -> list[str]:
  """Makes a folder with experiment.py alone, complete or not there.

  Args:
    source: folder of a checkpoint, of which config.json alone is read.
    out: the folder to write, whose file is that of `import_weights`: it names
      the folder as train.initial_checkpoint, so that no run starts from it.

  Returns:
    Lines that say what was written.

  Raises:
    UserError: config.json is damaged or missing, or is of a model that edl_jax
      cannot express; or `out` exists or cannot be written.
  """
  # Imports JAX, which --help and errors in flags do without.
  from edl_jax.interop.tensors import parameters
  from edl_jax.model.transformer import abstract_model

  folders.check_new(out)
  architecture, experiment = _described(source, _read_config(source))
  validate(experiment)
  shapes = parameters(abstract_model(experiment.model)).values()
  total = sum(math.prod(leaf.shape) for leaf in shapes)
  with _whole_run(out, experiment):
    pass
  return [
    f"{os.path.join(out, 'experiment.py')}: settings of {total:,} parameters of"
    f" {architecture.title}, without weights"
  ]


def _described(
  source: str, content: Mapping[str, Any]
) -> tuple["Architecture", Experiment]:
  """Returns the family and the experiment that config.json describes."""
  architecture = hub_config.architecture_of(content)
  experiment = Experiment(
    name=os.path.basename(os.path.abspath(source)),
    model=hub_config.model_config(architecture, content),
    train=TrainConfig(
      sequence_length=content.get("max_position_embeddings", 2048)
    ),
  )
  return architecture, experiment


@contextlib.contextmanager
def _whole_run(out: str, experiment: Experiment) -> Iterator[str]:
  """Makes `out` once it is filled, with experiment.py; yields where to write.

  Raises:
    UserError: it cannot be written.
  """
  try:
    with storage.whole_folder(out) as folder:
      yield folder
      storage.write_bytes(
        f"{folder}/experiment.py", _experiment_file(experiment).encode()
      )
  except OSError as error:
    raise UserError(
      f"--out={out} cannot be written ({error.strerror}: {error.filename})"
    ) from error


def _read_config(source: str) -> dict[str, Any]:
  if not os.path.isdir(source):
    raise UserError(f"--source={source}: there is no such folder")
  path = os.path.join(source, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    if not isinstance(content, dict):
      raise ValueError("not an object")
    return content
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} cannot be read ({reason})") from error


def _check_rows(tokens: int, rows: int) -> None:
  if tokens > rows:
    raise UserError(
      f"the tokenizer has {tokens:,} tokens, but the embedding {rows:,} rows"
      " (vocab_size in config.json), and ids beyond these would have none. Name"
      " the tokenizer of this model by --tokenizer"
    )


def _check_tensors(
  tensors: "Checkpoint",
  wanted: list["Slot"],
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises UserError if a tensor is missing, unknown or of another shape."""
  missing = [slot.name for slot in wanted if slot.name not in tensors.tensors]
  if missing:
    raise UserError(f"tensor {_first(missing)} is missing in the source")
  known = {slot.name for slot in wanted}
  # Transformers ties the head to the embedding whatever the file says, and
  # computes the rotary frequencies itself.
  unknown = [
    name
    for name in tensors.tensors
    if name not in known | {"lm_head.weight"}
    and not name.endswith("rotary_emb.inv_freq")
  ]
  if unknown:
    raise UserError(
      f"tensor {_first(unknown)} in the source has no place in the model that"
      " config.json describes"
    )
  # Without memory: all elements are one.
  empty = {
    path: np.broadcast_to(np.float32(0), shape)
    for path, shape in shapes.items()
  }
  for slot in wanted:
    needed = slot.view(empty[slot.parameter]).shape
    found = tensors.tensors[slot.name].shape
    if found != needed:
      raise UserError(
        f"tensor {slot.name} has shape {list(found)}, but config.json asks for"
        f" {list(needed)}"
      )


def _first(names: list[str]) -> str:
  more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
  return f"{names[0]}{more}"


def _blocks(
  tensors: "Checkpoint",
  wanted: list["Slot"],
  shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
  """Yields the parameters as `save_streamed` takes them, from the tensors."""
  from edl_jax.checkpoint import rows_of_blocks

  parts: dict[tuple[str, tuple[int, ...]], list[Slot]] = {}
  for slot in wanted:
    path, start = slot.parameter, slot.place[:1]
    if slot.expert is not None:
      together = rows_of_blocks(shapes[path], 1)
      start = (*start, slot.expert // together * together)
    parts.setdefault((path, start), []).append(slot)
  ahead = iter([*parts.values(), []])
  next(ahead)
  for (path, start), own in parts.items():
    tensors.expect(slot.name for slot in next(ahead))
    if not start:
      yield from _rows(tensors, own[0], shapes[path])
      continue
    shape = [1, *shapes[path][1:]]
    if len(start) > 1:
      # The last block may be smaller.
      shape[1] = min(rows_of_blocks(shapes[path], 1), shape[1] - start[1])
    block = _empty(tuple(shape))
    for slot in own:
      # Whatever the layout of a matrix, its transpose has rows in one piece.
      slot.view(block, start).T[...] = _transposed(tensors.read(slot.name))
    yield path, start, block


def _rows(
  tensors: "Checkpoint", slot: "Slot", shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
  """Yields a parameter that is one tensor, some rows at a time."""
  from edl_jax.checkpoint import rows_of_blocks

  tensor = tensors.read(slot.name)
  count = rows_of_blocks(shape, 0)
  for first in range(0, shape[0], count):
    block = _empty((min(count, shape[0] - first), *shape[1:]))
    part = slice(first, first + count)
    if slot.layout == "linear":
      block[...] = _transposed(tensor[:, part])
    else:
      block[...] = tensor[part]
    yield slot.parameter, (first,), block


def _transposed(tensor: np.ndarray) -> np.ndarray:
  """Returns a vector as it is, a matrix with its columns in one piece each.

  JAX copies in tiles that fit the caches; NumPy takes five times as long.
  """
  import jax

  return np.asarray(jax.device_put(tensor.T))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
  """Returns an array of float32 that JAX reads in place on a CPU.

  It does so if the array begins at a multiple of 64 bytes.
  """
  size = 4 * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  first = -memory.ctypes.data % 64
  return memory[first : first + size].view(np.float32).reshape(shape)


def _keep_freed_memory() -> None:
  """Makes this process use the memory of one block for the next.

  By default glibc returns memory of this size to the system, which clears it
  anew for each block: a fifth of the time of an import. Other libraries of C
  stay as they are.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _experiment_file(experiment: Experiment) -> str:
  """Returns experiment.py: trains from the run folder in which it lies."""
  default = ModelConfig()
  settings = [
    f"      {name}={_literal(value)},"
    for name, value in vars(experiment.model).items()
    if value != getattr(default, name)
  ]
  return "\n".join(
    [
      f'"""Starts from the weights of {experiment.name}, in this folder."""',
      "",
      "import os",
      "",
      "from edl_jax.config import Experiment, ModelConfig, TrainConfig",
      "",
      "",
      'def get_config(variant: str = "") -> Experiment:',
      "  del variant",
      "  return Experiment(",
      f"    name={_literal(experiment.name)},",
      "    model=ModelConfig(",
      *settings,
      "    ),",
      "    train=TrainConfig(",
      "      initial_checkpoint=os.path.dirname(os.path.abspath(__file__)),",
      "    ),",
      "  )",
      "",
    ]
  )


def _literal(value: Any) -> str:
  return json.dumps(value) if isinstance(value, str) else repr(value)


def _summary(
  out: str, title: str, total: int, model: ModelConfig, tokenizer: Any
) -> list[str]:
  lines = [f"{out}: {total:,} parameters of {title}"]
  rows, tokens = model.vocabulary_size, tokenizer.vocabulary_size
  if rows > tokens:
    lines.append(
      f"the embedding has {rows:,} rows and the tokenizer {tokens:,} tokens: no"
      f" text has the ids from {tokens} on"
    )
  lines.append(f"its settings are in {os.path.join(out, 'experiment.py')}")
  return lines


@COMMAND.main
def main() -> None:
  """Imports the checkpoint; checks everything before it writes."""
  folders.check_new(_OUT.value)
  if _SETTINGS_ONLY.value and _TOKENIZER.value:
    raise UserError(
      f"--tokenizer={_TOKENIZER.value} has no use with --settings_only, which"
      " reads config.json alone; leave one of them out"
    )
  # Imports JAX: see above.
  import jax
  from absl import logging

  jax.config.update("jax_platforms", "cpu")
  _keep_freed_memory()
  # Orbax warns of a single process without distributed start.
  logging.set_verbosity(logging.ERROR)
  if _SETTINGS_ONLY.value:
    lines = write_settings(_SOURCE.value, _OUT.value)
  else:
    lines = import_weights(_SOURCE.value, _OUT.value, _TOKENIZER.value)
  print("\n".join(lines))


if __name__ == "__main__":
  sys.exit(main())
