"""Packing: rows of a token stream."""

import numpy as np
import pytest

from edl_jax.text.batch import (
  Batch,
  ExampleRows,
  PackedRows,
  best_fit,
  padded_batches,
  padding_row,
  stack,
)
from edl_jax.text.token_stream import EncodedDocuments

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


# --- Supervised examples -----------------------------------------------------


def examples_of(sizes):
  """Random examples of these sizes, each with some completion."""
  rng = np.random.default_rng(1)
  tokens = [rng.integers(0, 256, size) for size in sizes]
  masks = [rng.random(size) < 0.5 for size in sizes]
  for mask in masks:
    mask[rng.integers(len(mask))] = True
  encoded = EncodedDocuments.from_array(
    np.concatenate(tokens), sizes, np.concatenate(masks)
  )
  return encoded, tokens, masks


def test_rows_hold_whole_examples_side_by_side():
  sizes = np.random.default_rng(0).integers(2, 17, 40)
  encoded, tokens, masks = examples_of(sizes)
  rows = ExampleRows(encoded, 16, START, 3)
  seen = []
  for row in map(rows.__getitem__, range(len(rows))):
    assert row.domain_B == 3
    for name, array in zip(Batch._fields, row):
      floats = name in ("weights_BT", "loss_weights_BT")
      assert array.dtype == (np.float32 if floats else np.int32)
    at = 0
    for segment in range(1, row.segments_BT.max() + 1):
      (place,) = np.nonzero(row.segments_BT == segment)
      assert place.tolist() == list(range(at, at + len(place)))
      at += len(place)
      own = row.targets_BT[place].tolist()
      (number,) = (n for n, ids in enumerate(tokens) if ids.tolist() == own)
      seen.append(number)
      mask = masks[number].tolist()
      assert row.tokens_BT[place].tolist() == [START, *own[:-1]]
      assert row.positions_BT[place].tolist() == list(range(len(place)))
      assert row.weights_BT[place].all()
      assert row.loss_weights_BT[place].tolist() == mask
    for array in row[:5]:
      assert not array[at:].any()
  assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_wastes_little(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 33, rng.integers(1, 200)).tolist()
  bins = best_fit(sizes, 32)
  assert sorted(item for own in bins for item in own) == list(range(len(sizes)))
  filled = [sum(sizes[item] for item in own) for own in bins]
  assert max(filled) <= 32
  # Johnson et al. (1974): at most 11/9 of the fewest bins, and 4.
  assert len(bins) <= 11 / 9 * -(-sum(sizes) // 32) + 4
  # No two bins would fit into one.
  assert sum(sorted(filled)[:2]) > 32 or len(bins) == 1


def test_best_fit_by_hand():
  # 6 and 5 open bins; 4 fits beside 6 alone, 3 beside 5; then 2, and 1.
  assert best_fit([3, 6, 5, 4, 2, 1], 10) == [[1, 3], [0, 2, 4], [5]]
  assert best_fit([], 10) == []
  assert best_fit([10, 10], 10) == [[0], [1]]


def test_texts_beside_examples_count_whole():
  stream = np.array([START, 1, 2, START, 3, START], np.int32)
  rows = PackedRows(stream, 4, START, 0, keep_partial=True, supervised=True)
  for row in (rows[0], rows[1]):
    np.testing.assert_array_equal(row.loss_weights_BT, row.weights_BT)
  (batch,) = padded_batches([rows[1]], 2)
  np.testing.assert_array_equal(
    batch.loss_weights_BT, [[1, 0, 0, 0], [0, 0, 0, 0]]
  )
  assert batch.target_weights_BT is batch.loss_weights_BT
  plain = stack([PackedRows(stream, 4, START, 0)[0]])
  assert plain.loss_weights_BT is None
  assert plain.target_weights_BT is plain.weights_BT
