"""Writes safetensors files, one tensor at a time.

A file is the length of its header, 8 bytes; the header, JSON with the type,
shape and place of each tensor; then the tensors, little-endian and row by row
(https://github.com/huggingface/safetensors). This module writes them itself
because the package `safetensors` takes a file's tensors converted and all at
once, which is one more copy of a file in memory.
"""

import json
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from edl_jax import storage

_DTYPES = {
  "float32": ("F32", np.dtype(np.float32)),
  "bfloat16": ("BF16", np.dtype(jnp.bfloat16)),
}
DTYPES = tuple(_DTYPES)


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
  """Returns the bytes of a tensor; `dtype` is one of `DTYPES`."""
  return math.prod(shape) * _DTYPES[dtype][1].itemsize


def write(path: str, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
  """Writes a file whole or not at all.

  Args:
    path: of the file.
    tensors: arrays, or views that cost no memory, by name. They are converted
      one at a time, rounded to nearest.
    dtype: one of `DTYPES`.

  Raises:
    OSError: the file cannot be written.
  """
  code, numpy_dtype = _DTYPES[dtype]
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + num_bytes(tensor.shape, dtype)
    header[name] = {
      "dtype": code,
      "shape": tensor.shape,
      "data_offsets": (start, end),
    }
  text = json.dumps(header).encode()
  # Readers map the file, so the tensors begin at a multiple of 8 bytes.
  text += b" " * (-len(text) % 8)
  with storage.whole_file(path) as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors.values():
      file.write(tensor.astype(numpy_dtype).tobytes())


def write_sharded(
  folder: str,
  tensors: Mapping[str, np.ndarray],
  dtype: str,
  max_shard_bytes: int,
) -> list[str]:
  """Writes model-0000K-of-0000N.safetensors and model.safetensors.index.json.

  Args:
    folder: an existing folder.
    tensors, dtype: as in `write`.
    max_shard_bytes: largest size of the tensors of a file. A larger tensor has
      a file of its own.

  Returns:
    The names of the safetensors files.

  Raises:
    OSError: a file cannot be written.
  """
  sizes = {name: num_bytes(x.shape, dtype) for name, x in tensors.items()}
  shards: list[list[str]] = []
  room = 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  files = [
    f"model-{number:05}-of-{len(shards):05}.safetensors"
    for number in range(1, len(shards) + 1)
  ]
  for file, names in zip(files, shards):
    write(f"{folder}/{file}", {name: tensors[name] for name in names}, dtype)
  index = {
    "metadata": {"total_size": sum(sizes.values())},
    "weight_map": {
      name: file for file, names in zip(files, shards) for name in names
    },
  }
  storage.write_json(f"{folder}/model.safetensors.index.json", index, indent=2)
  return files
