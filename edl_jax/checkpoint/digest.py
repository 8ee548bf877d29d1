"""Digests of arrays: two 32-bit sums that any single flipped bit changes.

Both sums run over the elements of the logical array, modulo 2^32. Addition of
integers has no order, so that a digest is the same on every mesh, and devices
compute it where the array lies. Let w be an element's bits as an unsigned
number, p its position in row-major order and r its index along the first axis,
all modulo 2^32, and h a one-to-one mixing of 32 bits:

  first sum:  h(w xor p m)
  second sum: h(w xor p m) (2 r + 1)

Both terms are one-to-one in w. An array that differs in one element therefore
differs in both sums; other differences go unnoticed by chance alone.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from edl_jax.sharding import path_name

# Odd numbers: multiplying by one is one-to-one modulo 2^32. The first is 2^32
# over the golden ratio, the second that of MurmurHash3's finalizer.
_SPREAD, _MIX = 0x9E3779B1, 0x85EBCA6B
# What a CPU splits rows into, to add the parts element by element.
_PARTS = 8


def _words(array: jax.Array) -> jax.Array:
  """Returns the bits of an array as uint32, 64-bit elements as two."""
  if array.dtype == bool:
    return array.astype(jnp.uint32)
  bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _positions(shape: tuple[int, ...], first: jax.Array) -> jax.Array:
  positions = jnp.broadcast_to(first, shape)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    positions += along * jnp.uint32(stride)
  return positions


# One program for all arrays: several programs with transfers between devices,
# in flight at once, may wait for each other for ever.
@jax.jit
def _sums(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  return [_array_sums(array) for array in arrays]


def _array_sums(
  array: jax.Array, first: int | jax.Array = 0, row: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array]:
  """Returns both sums of an array, or of a part of one.

  Args:
    array: whole rows, or a part of one row whose elements follow each other.
    first: position of its first element in the whole.
    row: index of its first row in the whole.
  """
  start, row = jnp.uint32(first), jnp.uint32(row)
  # Offloaded moments lie in the memory of the host.
  words = _words(jax.device_put(array, jax.memory.Space.Device))
  mixed = words ^ (_positions(words.shape, start) * jnp.uint32(_SPREAD))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_MIX)
  mixed = jnp.atleast_1d(mixed ^ (mixed >> 13))
  rows = jax.lax.platform_dependent(
    mixed, cpu=_row_sums_on_cpu, default=_row_sums
  )
  weights = 2 * (row + jnp.arange(len(rows), dtype=jnp.uint32)) + 1
  weighted = jnp.sum(rows * weights, dtype=jnp.uint32)
  return jnp.sum(rows, dtype=jnp.uint32), weighted


def _row_sums(words: jax.Array) -> jax.Array:
  """Returns the sum of each row of the first axis, modulo 2^32."""
  return jnp.sum(words, tuple(range(1, words.ndim)), dtype=jnp.uint32)


def _row_sums_on_cpu(words: jax.Array) -> jax.Array:
  """Does the same in a fifth of the time on a CPU.

  XLA's reductions there add one element at a time, element-wise sums a vector.
  """
  if words.ndim > 1 and words.shape[-1] % _PARTS == 0:
    words = functools.reduce(jnp.add, jnp.split(words, _PARTS, axis=-1))
  return _row_sums(words)


def array_digests(tree: Any) -> dict[str, str]:
  """Returns a digest of each array, by its path in the tree.

  With several processes all must call it, as arrays may span them.

  Args:
    tree: arrays of at most 64 bits an element, laid out on any mesh.

  Returns:
    Texts such as "float32[16,8]:0123456789abcdef": dtype, shape and both sums.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  found = jax.device_get(_sums([leaf for _, leaf in leaves]))
  return {
    path_name(path): _text(array, int(mixed), int(weighted))
    for (path, array), (mixed, weighted) in zip(leaves, found)
  }


def _text(array: Any, mixed: int, weighted: int) -> str:
  shape = ",".join(map(str, array.shape))
  return f"{array.dtype}[{shape}]:{mixed:08x}{weighted:08x}"


_block_sums = jax.jit(_array_sums)


class StreamedDigest:
  """The digest of an array that comes in blocks, in any order."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
    """Takes the shape, of at least one axis, and the dtype of the whole."""
    self._whole = jax.ShapeDtypeStruct(shape, dtype)
    self._sums = [0, 0]
    # Of the last block, which may still be computed.
    self._last: tuple[jax.Array, jax.Array] | None = None

  def add(self, start: tuple[int, ...], block: np.ndarray) -> None:
    """Adds a block, in the background.

    Args:
      start: where it begins on the first axes, 0 on the others.
      block: whole rows of the first axis, or whole rows of the second within
        one of the first. It must not change afterwards.
    """
    shape = self._whole.shape
    first = sum(
      at * math.prod(shape[axis + 1 :]) for axis, at in enumerate(start)
    )
    # As arrays: the numbers may not fit 32 bits with a sign.
    place = np.array([first % 2**32, start[0]], np.uint32)
    rows = block.reshape(len(block), -1)
    self._finish()
    self._last = _block_sums(rows, place[0], place[1])

  def text(self) -> str:
    """Returns what `array_digests` gives for the array of all blocks."""
    self._finish()
    return _text(self._whole, *self._sums)

  def _finish(self) -> None:
    """Waits for the sums of the last block, and adds them."""
    if self._last is None:
      return
    sums, self._last = jax.device_get(self._last), None
    self._sums = [
      (old + int(new)) % 2**32 for old, new in zip(self._sums, sums)
    ]


def json_digest(value: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of a JSON object; the order of its keys has no part."""
  text = json.dumps(value, sort_keys=True)
  return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def differing(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
  """Returns the names in `saved` whose digest in `found` is another."""
  return [name for name, text in saved.items() if found.get(name) != text]


def sample(names: list[str], seed: int) -> set[str]:
  """Returns a quarter of the names, at least one, chosen by `seed`."""
  order = np.random.default_rng(seed).permutation(len(names))
  return {names[i] for i in order[: -(-len(names) // 4)]}
