"""What the kernels of attention compute, and how devices share it.

Their values are compared in `test_attention.py`.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from edl_jax.model import splash


@pytest.mark.parametrize(
  ("length", "shards", "fits"),
  [(128, 1, True), (200, 1, False), (512, 2, True), (384, 2, False)],
)
def test_rows_and_chunks_must_be_blocks_of_whole_registers(
  length, shards, fits
):
  assert splash.fits(length, shards) == fits


@pytest.mark.parametrize("length", [128, 384, 1152, 4096, 16384])
def test_flops_count_blocks_that_the_mask_does_not_empty(length):
  block = splash._block(length, shards=1)
  start = np.arange(0, length, block)
  # A block has a pair if its last query comes no earlier than its first key.
  met = (start[:, None] + block - 1 >= start).sum()
  pairs = met * block**2 * 3 * 5
  forward, backward = splash.flops(3, length, heads=5, width=64)
  assert forward == 4 * 64 * pairs
  assert backward == (10 if length < 16384 else 14) * 64 * pairs


def test_devices_share_the_queries_evenly():
  def shares(positions_BT):
    return splash._to_even_shares(positions_BT, "sequence")

  rows = PartitionSpec(None, "sequence")
  position = np.arange(64)
  share = jax.shard_map(
    shares,
    mesh=jax.make_mesh((8,), ("sequence",), (AxisType.Auto,)),
    in_specs=rows,
    out_specs=rows,
  )(position[None])
  np.testing.assert_array_equal(np.sort(share[0]), position)
  # A query at position t meets t + 1 keys.
  met = (share.reshape(8, 8) + 1).sum(1)
  assert set(met.tolist()) == {64 * 65 // 2 // 8}
  whole = splash.flops(1, 16384, heads=2, width=64)
  spread = splash.flops(1, 16384, heads=2, width=64, shards=8)
  # Blocks have the same size, as it divides a sixteenth of the row.
  assert spread == tuple(count // 8 for count in whole)
