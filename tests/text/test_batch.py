"""Packing: rows of a token stream."""

import numpy as np
import pytest

from edl_jax.text.batch import (
  Batch,
  PackedRows,
  padded_batches,
  padding_row,
  stack,
)

START = 256


def naive_rows(stream, length, keep_partial):
  """One token at a time, with lists."""
  rows = []
  for first in range(0, len(stream) - 1, length):
    row = {name: [] for name in ("token", "target", "segment", "position")}
    segment, position = 0, 0
    for at in range(first, min(first + length, len(stream) - 1)):
      if stream[at] == START or at == first:
        segment, position = segment + 1, 0
      row["token"].append(stream[at])
      row["target"].append(stream[at + 1])
      row["segment"].append(segment)
      row["position"].append(position)
      position += 1
    row["weight"] = [1] * len(row["token"])
    missing = length - len(row["token"])
    if not missing or keep_partial:
      rows.append([values + [0] * missing for values in row.values()])
  return rows


@pytest.mark.parametrize("keep_partial", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 64])
def test_packing_matches_a_naive_loop(length, keep_partial):
  rng = np.random.default_rng(0)
  stream = []
  # Documents without any text, too.
  for size in rng.integers(0, 12, 20):
    stream += [START, *rng.integers(0, 256, size).tolist()]
  stream.append(START)
  rows = PackedRows(np.array(stream, np.int32), length, START, 3, keep_partial)
  expected = naive_rows(stream, length, keep_partial)
  assert len(rows) == len(expected)
  for index, arrays in enumerate(expected):
    row = rows[index]
    for name, array, values in zip(Batch._fields, row, arrays):
      assert array.tolist() == values, (index, name)
      assert array.dtype == (np.float32 if name == "weights_BT" else np.int32)
    assert row.domain_B == 3


def test_packing_leaves_the_stream_alone():
  stream = np.array([START, 1, 2, 3, 4, 5, START], np.int32)
  rows = PackedRows(stream, 3, START, 0)
  assert rows[1].segments_BT.tolist() == [1, 1, 1]
  assert rows[1].positions_BT.tolist() == [0, 1, 2]
  assert stream.tolist() == [START, 1, 2, 3, 4, 5, START]


def test_batch_has_a_row_of_each():
  stream = np.array([START, 1, 2, START, 3, 4, START], np.int32)
  rows = [PackedRows(stream, 3, START, domain)[domain] for domain in (0, 1)]
  batch = stack(rows)
  assert batch.tokens_BT.tolist() == [[START, 1, 2], [START, 3, 4]]
  assert batch.targets_BT.tolist() == [[1, 2, START], [3, 4, START]]
  assert batch.domain_B.tolist() == [0, 1]
  assert batch.domain_B.dtype == np.int32


def test_padding_fills_the_last_batch_and_counts_nothing():
  rows = [padding_row(3)._replace(domain_B=np.int32(n)) for n in range(5)]
  rows = [row._replace(weights_BT=np.ones(3, np.float32)) for row in rows]
  batches = padded_batches(rows, 2)
  assert [b.tokens_BT.shape for b in batches] == [(2, 3)] * 3
  domains = np.concatenate([b.domain_B for b in batches])
  counted = np.concatenate([b.weights_BT.sum(1) for b in batches])
  np.testing.assert_array_equal(domains, [0, 1, 2, 3, 4, 0])
  np.testing.assert_array_equal(counted, [3, 3, 3, 3, 3, 0])
  assert not batches[-1].segments_BT[-1].any()
  assert padded_batches([], 2) == []
