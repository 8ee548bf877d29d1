"""What texts share is planned once, and the plan leaves little padding."""

import random

import numpy as np

from edl_jax.tasks import sharing
from edl_jax.tasks.windows import windows_of

# Most tokens that a model reads.
LONGEST = 96


def make_texts():
  """Questions behind common examples, others without, and some too long.

  Returns:
    Of each text its tokens, and the index of the first one to score.
  """
  generator = random.Random(0)

  def some(count):
    return [generator.randrange(48) for _ in range(count)]

  texts = []
  for examples, questions in ((some(40), 20), (some(50), 17), ([], 5)):
    for _ in range(questions):
      context = [0, *examples, *some(generator.randint(1, 9))]
      for _ in range(4):
        answer = some(generator.randint(1, 6))
        texts.append((np.array([*context, *answer]), len(context)))
  # Two that the model cannot read whole, the longest continuation, and one that
  # is longer.
  texts += [(np.array(some(LONGEST + 9)), LONGEST) for _ in range(2)]
  texts += [(np.array(some(LONGEST + 1)), 1), (np.array(some(LONGEST + 5)), 1)]
  # Enough continuations of one context for several rows.
  texts += [(np.array([0, *some(12)]), 1) for _ in range(12)]
  generator.shuffle(texts)
  return texts


def make_groups(counts=lambda i: False):
  windows = [
    window
    for tokens, first in make_texts()
    for window in windows_of(tokens, first, LONGEST)
  ]
  is_counted = [counts(i) for i in range(len(windows))]
  return windows, sharing.plan_rows(windows, is_counted, LONGEST)


def test_what_is_shared_is_computed_once():
  _, groups = make_groups()
  assert sorted(len(group.stem) for group in groups) == [0, 41, 51]
  by_stem = {len(group.stem): group.rows for group in groups}
  assert (len(by_stem[41]), len(by_stem[51])) == (20, 17)
  assert all(len(row.parts) == 4 for row in by_stem[41])
  # The question once, and all but the last token of each answer.
  for row in by_stem[41]:
    counts = [count for _, count in row.parts]
    assert len(row.targets) == sum(counts)
    assert len(row.tokens) == row.branches.count(0) + sum(counts) - 4
  assert all(len(row) <= LONGEST for rows in by_stem.values() for row in rows)


def test_a_row_counts_the_routing_of_one_window():
  windows, groups = make_groups(lambda i: i % 2 == 0)
  counted = {}
  for stem, rows in groups:
    for row in rows:
      if row.counted >= 0:
        tokens = np.array(row.tokens)[row.is_counted].tolist()
        counted[row.counted] = [*stem.tolist(), *tokens]
  assert sorted(counted) == list(range(0, len(windows), 2))
  for number, tokens in counted.items():
    assert tokens == windows[number].tokens[:-1].tolist()


def test_lengths_need_the_least_padding():
  assert sharing.row_lengths([3, 16, 17, 70]) == [16, 32, 80]
  sizes = [10] * 9 + [40] * 5 + [50] * 4 + [100] * 3 + [200, 210]
  assert sharing.row_lengths(sizes) == [16, 64, 112, 224]


def parts(batches):
  return sorted(p for each in batches for row in each.rows for p in row.parts)


def test_batches_hold_every_row_once():
  windows, groups = make_groups()
  lengths = sharing.row_lengths(
    [len(r) for group in groups for r in group.rows]
  )
  for batch_tokens, shards in ((4096, 1), (512, 4), (1, 2)):
    batches = sharing.plan_batches(groups, lengths, batch_tokens, shards)
    assert parts(batches) == [
      (i, len(each.tokens) - each.first) for i, each in enumerate(windows)
    ]
    for batch in batches:
      assert len(batch.rows) <= batch.size and batch.size % shards == 0
      assert max(map(len, batch.rows)) <= batch.length
      assert batch.size * batch.length <= max(batch_tokens, shards * LONGEST)
    # Each stem comes up once, and each length has one number of rows.
    stems = [len(batch.stem) for batch in batches]
    assert stems == sorted(stems, key=stems.index)
    assert len({(each.length, each.size) for each in batches}) <= 4
    left = sharing.plan_batches(
      *(sharing.regrouped(batches[2:]), lengths, batch_tokens, shards)
    )
    assert parts(left) == parts(batches[2:])


def test_batches_are_smaller_where_that_saves_padding():
  row = sharing.Row([1] * 64, [0] * 64, [0] * 64)
  groups = [sharing.Group(np.ones(i), [row] * 17) for i in range(9)]
  groups.append(sharing.Group(np.ones(9), [row] * 128))
  batches = sharing.plan_batches(groups, [64], 8192, 1)
  assert {batch.size for batch in batches} == {32}
  # A single stem leaves nothing to save.
  (batch,) = sharing.plan_batches(groups[-1:], [64], 8192, 1)
  assert batch.size == 128


def test_padding_counts_nowhere():
  row = sharing.Row([5, 6, 7], [0, 1, 2], [0, 0, 1], [1, 2], [7, 8], [(0, 2)])
  row.counted, row.counted_branch = 0, 1
  arrays = sharing.batch_arrays(sharing.Batch(np.ones(0), [row], 4, 2))
  assert arrays.tokens_BT.tolist() == [[5, 6, 7, 0], [0] * 4]
  assert arrays.branch_BT.tolist() == [[0, 0, 1, -1], [-1] * 4]
  assert arrays.counted_BT.tolist() == [[1, 1, 1, 0], [0] * 4]
  assert arrays.before_P.tolist() == [1, 2, *[0] * 6]
  assert arrays.target_P.tolist() == [7, 8, *[0] * 6]
  assert arrays.num_scored == 2
