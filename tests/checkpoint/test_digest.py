"""Digests against sums of Python's own integers, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from edl_jax import sharding
from edl_jax.checkpoint import digest
from edl_jax.config import MeshConfig

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool")


def draw(dtype, shape=(8, 6)):
  values = np.random.default_rng(0).standard_normal(shape)
  return jnp.asarray(values * 9).astype(dtype)


def naive(array):
  """Both sums of the module's docstring, one element at a time."""
  array = np.asarray(array)
  width = array.dtype.itemsize
  content = array.tobytes()
  first = second = 0
  for position in range(array.size):
    start = position * width
    word = int.from_bytes(content[start : start + width], "little")
    mixed = word ^ (position * 0x9E3779B1 % 2**32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % 2**32
    mixed ^= mixed >> 13
    row = position // (array.size // (len(array) if array.ndim else 1))
    first += mixed
    second += mixed * (2 * row + 1)
  return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (5, 16), (2, 3, 8)])
def test_sums_are_those_of_exact_integers(dtype, shape):
  array = draw(dtype, shape)
  inner = ",".join(map(str, shape))
  wanted = f"{dtype}[{inner}]:{naive(array)}"
  assert digest.array_digests({"a": array}) == {"a": wanted}


@pytest.mark.parametrize(
  ("dtype", "shape"),
  [*((dtype, (2,)) for dtype in DTYPES[:-1]), ("int8", (1, 8))],
)
def test_every_single_flipped_bit_changes_both_sums(dtype, shape):
  content = np.asarray(draw(dtype, shape))
  before = digest.array_digests([content])["0"].partition(":")[2]
  flipped = []
  for bit in range(content.nbytes * 8):
    raw = bytearray(content.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    flipped.append(np.frombuffer(raw, content.dtype).reshape(content.shape))
  for text in digest.array_digests(flipped).values():
    after = text.partition(":")[2]
    assert after[:8] != before[:8] and after[8:] != before[8:]


def test_position_shape_and_dtype_count():
  array = draw("float32")
  others = [
    array,
    array[::-1],
    array.T,
    array.reshape(-1),
    jax.lax.bitcast_convert_type(array, jnp.int32),
    -array,
  ]
  assert len(set(digest.array_digests(others).values())) == len(others)
  zeros = digest.array_digests([jnp.zeros(3), -jnp.zeros(3)])
  assert zeros["0"] != zeros["1"]


@pytest.mark.parametrize(
  ("config", "spec"),
  [
    (MeshConfig(1, 2, 2, 2), PartitionSpec("fsdp", "tensor")),
    (MeshConfig(2, 2, 1, 2), PartitionSpec(("data", "fsdp"), None)),
    (MeshConfig(8, 1, 1, 1), PartitionSpec()),
  ],
)
def test_the_mesh_has_no_part(config, spec):
  mesh = sharding.make_mesh(config)
  for dtype, width in (("float32", 6), ("bfloat16", 16), ("int32", 16)):
    array = draw(dtype, (8, width))
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
      found = digest.array_digests({"a": placed})
    assert found == digest.array_digests({"a": array})


def test_json_and_samples():
  one, other = {"a": 1, "b": [2]}, {"b": [2], "a": 1}
  assert digest.json_digest(one) == digest.json_digest(other)
  assert digest.json_digest(one) != digest.json_digest({"a": 1, "b": [3]})
  names = [str(i) for i in range(10)]
  samples = [digest.sample(names, step) for step in range(40)]
  assert {len(each) for each in samples} == {3}
  assert set().union(*samples) == set(names)
  assert digest.sample(["a"], 0) == {"a"}
  assert digest.differing({"a": "1", "b": "2"}, {"a": "1"}) == ["b"]
