"""Measures the import of a large checkpoint: memory and time.

  python -m benchmarks.import_weights --layers=8

Writes a random checkpoint in bfloat16 of the shape of Qwen3-30B-A3B with fewer
layers and experts (8 layers have 3 billion parameters: 6 GB, and 5 GB in the
run folder, compressed), and imports it in a process of its own. Prints the
greatest memory of that process over the size of the checkpoint, and its time
over that of copying: reading the checkpoint's bytes and writing as many as the
run folder has, without converting anything. Importing and copying take turns;
figures are medians of all turns. Files are read from the disk, not from the
memory in which the system keeps them.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np

from edl_jax.command import Command
from edl_jax.config import Experiment, ModelConfig
from edl_jax.interop.architectures import QWEN3_MOE, hub_config
from edl_jax.interop.safetensors_reader import Checkpoint
from edl_jax.interop.tensors import parameters, slots
from edl_jax.model.transformer import abstract_model
from edl_jax.storage import write_json
from edl_jax.text.tokenizer import byte_tokenizer

COMMAND = Command(__doc__)
_LAYERS = COMMAND.flag("layers", 8, "Layers of the model.", minimum=1)
_EXPERTS = COMMAND.flag("experts", 64, "Experts of a layer.", minimum=8)
_FOLDER = COMMAND.flag(
  "folder",
  "",
  "Where to make the folder of the files, which is removed at the end. By"
  " default the system's for temporary files.",
)
_ROUNDS = COMMAND.flag("rounds", 3, "Turns of both.", minimum=1)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")

# Imports, then prints its own greatest resident memory in KiB. What the system
# reports of a child that has ended may be its parent's, from before it began.
_CHILD = """
import re, sys
from edl_jax.interop import import_weights
assert import_weights.main() == 0
with open("/proc/self/status") as file:
  print(re.search(r"VmHWM:\\s*(\\d+)", file.read())[1])
"""
# Of a piece that is copied at a time.
_BYTES = 1 << 26
_SHARD_TENSORS = 1000
# Random numbers that all tensors repeat, each from another place on: far more
# than the 64 KiB in which LZ4 looks for repetitions.
_NUM_RANDOM = 1 << 24


def _model() -> ModelConfig:
  return ModelConfig(
    vocabulary_size=151_936,
    num_layers=_LAYERS.value,
    width=2048,
    num_heads=32,
    num_kv_heads=4,
    head_width=128,
    num_experts=_EXPERTS.value,
    num_active_experts=8,
    expert_width=768,
    rope_theta=1e6,
  )


def _write_checkpoint(folder: str, model: ModelConfig) -> None:
  """Writes a random checkpoint, tensor by tensor."""
  experiment = Experiment(model=model)
  content = hub_config(QWEN3_MOE, experiment, 256, "bfloat16")
  write_json(f"{folder}/config.json", content)
  with open(f"{folder}/tokenizer.json", "w", encoding="utf-8") as file:
    file.write(byte_tokenizer().to_json())
  empty = {
    path: np.broadcast_to(np.float32(0), leaf.shape)
    for path, leaf in parameters(abstract_model(model)).items()
  }
  shapes = {
    slot.name: slot.view(empty[slot.parameter]).shape
    for slot in slots(QWEN3_MOE, model)
  }
  names = list(shapes)
  weight_map = {}
  for first in range(0, len(names), _SHARD_TENSORS):
    shard = names[first : first + _SHARD_TENSORS]
    name = f"model-{first // _SHARD_TENSORS:05}.safetensors"
    weight_map |= dict.fromkeys(shard, name)
    _write_shard(f"{folder}/{name}", {key: shapes[key] for key in shard})
  index = {"weight_map": weight_map}
  write_json(f"{folder}/model.safetensors.index.json", index)


def _write_shard(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
  header: dict[str, Any] = {}
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + 2 * math.prod(shape)
    header[name] = {
      "dtype": "BF16",
      "shape": shape,
      "data_offsets": (start, end),
    }
  text = json.dumps(header).encode()
  random = np.random.default_rng(0)
  values = 0.02 * random.standard_normal(_NUM_RANDOM, np.float32)
  # Twice, so that no place is near the end.
  content = 2 * values.astype(ml_dtypes.bfloat16).tobytes()
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
      left = 2 * math.prod(shape)
      while left:
        start = 2 * int(random.integers(_NUM_RANDOM))
        piece = content[start : start + min(left, 2 * _NUM_RANDOM)]
        left -= file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _forget(folder: str) -> None:
  """Makes the system read the folder's files from the disk again."""
  for name in os.listdir(folder):
    with open(f"{folder}/{name}", "rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy_seconds(source: str, target: str, size: int) -> float:
  """Returns the seconds of reading the source and writing `size` bytes."""
  _forget(source)
  started = time.monotonic()
  for name in os.listdir(source):
    with open(f"{source}/{name}", "rb", buffering=0) as file:
      while file.read(_BYTES):
        pass
  noise = np.random.default_rng(0).bytes(_BYTES)
  with open(target, "wb", buffering=0) as file:
    for _ in range(-(-size // _BYTES)):
      file.write(noise)
    os.fsync(file.fileno())
  seconds = time.monotonic() - started
  os.unlink(target)
  return seconds


def _import(source: str, out: str) -> tuple[float, float, int]:
  """Imports; returns seconds, those of processors, and the greatest memory."""
  _forget(source)
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  started = time.monotonic()
  said = subprocess.run(
    [sys.executable, "-c", _CHILD, f"--source={source}", f"--out={out}"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  os.sync()
  seconds = time.monotonic() - started
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return seconds, used, 1024 * int(said.split()[-1])


def _measure(folder: str) -> dict[str, float]:
  source, out = f"{folder}/source", f"{folder}/run"
  os.mkdir(source)
  _write_checkpoint(source, _model())
  size = Checkpoint(source).num_bytes
  print(f"checkpoint: {size / 1e9:.2f} GB", flush=True)
  turns: list[dict[str, float]] = []
  for _ in range(_ROUNDS.value):
    seconds, used, memory = _import(source, out)
    written = sum(
      os.path.getsize(os.path.join(root, name))
      for root, _, names in os.walk(out)
      for name in names
    )
    shutil.rmtree(out)
    copy = _copy_seconds(source, f"{folder}/copy", written)
    turns.append(
      {
        "checkpoint_bytes": size,
        "written_bytes": written,
        "memory_bytes": memory,
        "memory_over_checkpoint": memory / size,
        "seconds": seconds,
        "processor_seconds": used,
        "copy_seconds": copy,
        "time_over_copy": seconds / copy,
      }
    )
  return {
    name: statistics.median(turn[name] for turn in turns) for name in turns[0]
  }


@COMMAND.main
def main() -> None:
  """Takes the turns and prints the figures."""
  with tempfile.TemporaryDirectory(dir=_FOLDER.value or None) as folder:
    figures = _measure(folder)
  for name, value in figures.items():
    print(f"{name:24} {value:,.2f}")
  if _JSON.value:
    write_json(_JSON.value, figures, indent=2)


if __name__ == "__main__":
  sys.exit(main())
