"""Reads safetensors files, one tensor at a time.

`safetensors` describes the format. This module reads it itself because a
tensor is read into memory alone, never with its file, and because the package
`safetensors` without PyTorch has no bfloat16.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from edl_jax.config import UserError

_DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Files that PyTorch pickles.
_PICKLES = (".bin", ".pt", ".pth")


class Tensor(NamedTuple):
  """Where a tensor lies."""

  path: str
  dtype: np.dtype
  shape: tuple[int, ...]
  # Of its first byte, in the file.
  offset: int


class Checkpoint:
  """The tensors of a folder with safetensors files.

  Attributes:
    tensors: every tensor by name.
    num_bytes: size of all tensors.
  """

  def __init__(self, folder: str):
    """Reads the headers of all files.

    Raises:
      UserError: a file is missing, truncated or no safetensors file.
    """
    self.tensors: dict[str, Tensor] = {}
    for name in _files(folder):
      self.tensors |= _read_header(os.path.join(folder, name))
    self.num_bytes = sum(
      math.prod(tensor.shape) * tensor.dtype.itemsize
      for tensor in self.tensors.values()
    )

  def expect(self, names: Iterable[str]) -> None:
    """Asks the system to read tensors from the disk while others are used."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:  # Not on macOS, where `read` waits for the disk.
      return
    for name in names:
      tensor = self.tensors[name]
      size = math.prod(tensor.shape) * tensor.dtype.itemsize
      with open(tensor.path, "rb") as file:
        advise(file.fileno(), tensor.offset, size, os.POSIX_FADV_WILLNEED)

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor in the dtype of the file."""
    tensor = self.tensors[name]
    count = math.prod(tensor.shape)
    flat = np.fromfile(tensor.path, tensor.dtype, count, offset=tensor.offset)
    if len(flat) != count:
      raise UserError(f"{tensor.path} became shorter while it was read")
    return flat.reshape(tensor.shape)


def _files(folder: str) -> list[str]:
  """Returns the names of the folder's safetensors files."""
  present = sorted(os.listdir(folder))
  if _INDEX in present:
    path = os.path.join(folder, _INDEX)
    try:
      with open(path, encoding="utf-8") as file:
        named = sorted(set(json.load(file)["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError) as error:
      raise UserError(f"{path} is damaged ({error})") from error
    missing = [name for name in named if name not in present]
    if missing:
      raise UserError(
        f"{folder}: {', '.join(missing)} of {_INDEX} is missing; download it"
      )
    return named
  if _SINGLE in present:
    return [_SINGLE]
  pickles = [name for name in present if name.endswith(_PICKLES)]
  if pickles:
    raise UserError(
      f"{folder} has weights as a pickle of PyTorch, {pickles[0]}, which can"
      " run any code; edl_jax reads safetensors alone. Convert it by"
      " AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )
  raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}")


def _read_header(path: str) -> dict[str, Tensor]:
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise UserError(f"{path} is truncated: its header is not complete")
    try:
      header: Mapping[str, Any] = json.loads(file.read(length))
      entries = {
        name: (
          str(entry["dtype"]),
          tuple(map(int, entry["shape"])),
          *map(int, entry["data_offsets"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
      }
    except (ValueError, LookupError, AttributeError, TypeError) as error:
      raise UserError(f"{path} is no safetensors file ({error})") from error
  found = {}
  for name, (code, shape, start, end) in entries.items():
    if code not in _DTYPES:
      raise UserError(
        f"{path}: {name} is of type {code}; edl_jax reads {', '.join(_DTYPES)}"
      )
    if 8 + length + end > size:
      raise UserError(
        f"{path} is truncated: it has {size:,} bytes, but {name} ends at byte"
        f" {8 + length + end:,}; download it again"
      )
    if math.prod(shape) * _DTYPES[code].itemsize != end - start:
      raise UserError(f"{path}: the bytes of {name} do not fit its shape")
    found[name] = Tensor(path, _DTYPES[code], shape, 8 + length + start)
  return found
