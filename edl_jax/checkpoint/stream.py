"""Writes a checkpoint of parameters that need not fit the memory at once.

Orbax takes whole arrays. Here it writes the checkpoint with an array of one
element in place of each, in its own format: a Zarr array for each parameter,
named by its path with dots, in an OCDBT store. TensorStore, by which Orbax
reads and writes them, then replaces each by one of the right shape and fills
it block by block.
"""

import collections
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from edl_jax import storage
from edl_jax.checkpoint.checkpointer import saved_items
from edl_jax.checkpoint.digest import StreamedDigest, json_digest
from edl_jax.checkpoint.event_loops import patient_loops
from edl_jax.checkpoint.folders import FOLDER, sealed
from edl_jax.checkpoint.provenance import Provenance

# Largest part of an array that is read or written at once, in bytes.
_CHUNK_BYTES = 1 << 26
# Blocks that are written while the next one is made.
_PENDING = 3


def save_streamed(
  workdir: str,
  shapes: Mapping[str, tuple[int, ...]],
  blocks: Iterable[tuple[str, tuple[int, ...], np.ndarray]],
  provenance: Provenance,
) -> None:
  """Writes a checkpoint of step 0 that holds parameters alone.

  It has no optimizer state, so that runs start from it and none resumes it.
  At most four blocks are in memory at a time.

  Args:
    workdir: a local folder.
    shapes: of every parameter by path, such as "blocks/moe/router_ME".
    blocks: path, where the block begins on the first axes, and the block,
      float32: whole rows of the first axis, or whole rows of the second within
      one of the first. `rows_of_blocks` says how many. All elements must come.
      A block must not change after it was yielded.
    provenance: of the checkpoint.

  Raises:
    OSError, ValueError: the disk is full or cannot be written.
  """
  data: dict[str, Any] = {}
  nested: dict[str, Any] = {}
  for path in shapes:
    *parents, name = path.split("/")
    holder = nested
    for parent in parents:
      holder = holder.setdefault(parent, {})
    holder[name] = np.zeros(1, np.float32)
  with (
    patient_loops(),
    ocp.CheckpointManager(os.path.join(workdir, FOLDER)) as manager,
  ):
    manager.save(
      0, args=saved_items({"parameters": nested}, data, provenance, {})
    )
  checkpoint = os.path.join(workdir, FOLDER, "0")
  digests = _fill(os.path.join(checkpoint, "parameters"), shapes, blocks)
  digests["data"] = json_digest(data)
  storage.write_json(
    os.path.join(checkpoint, "provenance", "metadata"),
    sealed(provenance.to_dict() | {"digests": digests}),
  )


def _fill(
  folder: str,
  shapes: Mapping[str, tuple[int, ...]],
  blocks: Iterable[tuple[str, tuple[int, ...], np.ndarray]],
) -> dict[str, str]:
  """Writes the arrays; returns their digests."""
  stores = {
    path: _create(folder, path, shape) for path, shape in shapes.items()
  }
  digests = {
    path: StreamedDigest(shape, np.dtype(np.float32))
    for path, shape in shapes.items()
  }
  pending = collections.deque[Any]()
  for path, start, block in blocks:
    place = tuple(slice(at, at + size) for at, size in zip(start, block.shape))
    pending.append(
      stores[path][place].write(
        block, can_reference_source_data_indefinitely=True
      )
    )
    digests[path].add(start, block)
    if len(pending) == _PENDING:
      pending.popleft().result()
  for written in pending:
    written.result()
  return {f"parameters/{path}": each.text() for path, each in digests.items()}


def rows_of_blocks(shape: tuple[int, ...], axis: int) -> int:
  """Returns how many rows of an axis are stored together.

  Blocks of so many, from a multiple of it on, are written once each.
  """
  return _chunks(shape)[axis]


def _create(folder: str, path: str, shape: tuple[int, ...]) -> ts.TensorStore:
  return ts.open(
    {
      "driver": "zarr",
      "kvstore": {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{os.path.abspath(folder)}/"},
        "path": f"{path.replace('/', '.')}/",
      },
      "metadata": {
        "dtype": "<f4",
        "shape": shape,
        "chunks": _chunks(shape),
        # Bits of the same place side by side: half of them are zero in weights
        # that came in bfloat16. It takes a fifth of the time of Zstandard.
        "compressor": {
          "id": "blosc",
          "cname": "lz4",
          "clevel": 1,
          "shuffle": 2,
        },
      },
    },
    create=True,
    delete_existing=True,
  ).result()


def _chunks(shape: tuple[int, ...]) -> list[int]:
  """Returns the shape of parts: whole rows of the last axes, cut from the left.

  A layer is never in a part with another, as blocks are layers.
  """
  chunks = [1, *shape[1:]] if len(shape) > 2 else list(shape)
  for axis in range(len(shape)):
    rest = 4 * math.prod(chunks[axis + 1 :])
    chunks[axis] = min(chunks[axis], max(1, _CHUNK_BYTES // rest))
    if chunks[axis] > 1:
      break
  return chunks
