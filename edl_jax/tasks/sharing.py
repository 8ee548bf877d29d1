"""Rows that score many texts, and the batches that they fill.

Texts with the same context become one row that branches into continuations, and
what many rows begin with, such as examples before every question, is a stem
(`edl_jax.model.branching`). This module imports no JAX.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edl_jax.tasks.windows import Window

# Most lengths that rows are padded to, and what these are multiples of.
_NUM_LENGTHS = 4
_ROUND = 16
# A stem is worth batches of its own from this many tokens and rows on.
_SHORTEST_STEM = 32
_FEWEST_ROWS = 16
# Batches are halved this often, where that leaves less padding in them; one
# more batch is worth so many tokens.
_HALVINGS = 3
_TOKENS_OF_A_BATCH = 256


@dataclasses.dataclass
class Row:
  """Tokens behind a stem, and what is scored."""

  tokens: list[int]
  positions: list[int]
  branches: list[int]
  # Of each scored token: where the token before it is in the row; and itself.
  before: list[int] = dataclasses.field(default_factory=list)
  targets: list[int] = dataclasses.field(default_factory=list)
  # The windows that they belong to, one after the other: number and count.
  parts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
  # The window whose routing counts, and its branch; -1 without one.
  counted: int = -1
  counted_branch: int = -1

  @property
  def is_counted(self) -> np.ndarray:
    """Of each token, whether its routing counts."""
    return np.isin(self.branches, (0, self.counted_branch))

  def __len__(self) -> int:
    # A batch has one array for tokens and one for scored tokens.
    return max(len(self.tokens), len(self.targets))


class Group(NamedTuple):
  """Rows behind one stem, which may be empty."""

  stem: np.ndarray
  rows: list[Row]


class Batch(NamedTuple):
  """Rows behind one stem that are computed together."""

  stem: np.ndarray
  rows: list[Row]
  # Tokens and rows of its arrays, padding included.
  length: int
  size: int


class Arrays(NamedTuple):
  """A batch as the model reads it; int32 unless said otherwise."""

  tokens_BT: np.ndarray
  positions_BT: np.ndarray
  branch_BT: np.ndarray
  # 1 where the routing of a token counts, float32.
  counted_BT: np.ndarray
  # Of each scored token: where the token before it is in the flattened batch;
  # and itself.
  before_P: np.ndarray
  target_P: np.ndarray
  # The number of scored tokens; what follows them in these arrays is padding.
  num_scored: np.ndarray


def rounded(tokens: int) -> int:
  """Returns what this many tokens are padded to."""
  return -(-tokens // _ROUND) * _ROUND


def plan_rows(
  windows: Sequence[Window], counts: Sequence[bool], max_length: int
) -> list[Group]:
  """Returns rows that score all windows, by their stems.

  Args:
    windows: what to score.
    counts: of each window, whether its routing counts.
    max_length: most tokens of a row, and of a window.
  """
  contexts: dict[bytes, tuple[np.ndarray, list[tuple[int, np.ndarray]]]] = {}
  for number, (tokens, first, _) in enumerate(windows):
    context, end = tokens[:first], tokens[first:]
    # As bytes, contexts are sorted by their tokens.
    key = context.astype(">u4").tobytes()
    contexts.setdefault(key, (context, []))[1].append((number, end))
  ordered = [contexts[key] for key in sorted(contexts)]
  groups, others = [], Group(np.zeros(0, np.int32), [])
  start = 0
  while start < len(ordered):
    end, common = _alike(ordered, start)
    if end - start < _FEWEST_ROWS:
      common = 0
    group = Group(ordered[start][0][:common], []) if common else others
    for context, ends in ordered[start:end]:
      group.rows.extend(_rows(context, ends, common, max_length, counts))
    if common:
      groups.append(group)
    start = end
  return [*groups, others] if others.rows else groups


def _alike(
  ordered: Sequence[tuple[np.ndarray, object]], start: int
) -> tuple[int, int]:
  """Returns the end of a run of contexts that begin alike, and how far.

  Every context has a token behind what they share.
  """
  common, end = len(ordered[start][0]) - 1, start + 1
  while end < len(ordered):
    one, other = ordered[end - 1][0], ordered[end][0]
    limit = min(common, len(other) - 1)
    differs = np.flatnonzero(one[:limit] != other[:limit])
    both = int(differs[0]) if len(differs) else limit
    if both < _SHORTEST_STEM:
      break
    common, end = both, end + 1
  return end, common if end - start > 1 else 0


def _rows(
  context: np.ndarray,
  ends: Sequence[tuple[int, np.ndarray]],
  common: int,
  max_length: int,
  counts: Sequence[bool],
) -> Iterator[Row]:
  """Yields rows of one context and some of its continuations.

  A row has at most one window whose routing counts, so that the row's sums are
  the window's.

  Args:
    context: its tokens.
    ends: of each window its number, and the tokens behind the context.
    common: tokens of the context that are the stem's.
    max_length, counts: see `plan_rows`.
  """
  rest = context[common:].tolist()

  def new() -> Row:
    positions = list(range(common, len(context)))
    return Row(list(rest), positions, [0] * len(rest))

  row = new()
  for number, end in ends:
    inputs = end[:-1].tolist()
    grown = (len(row.tokens) + len(inputs), len(row.targets) + len(end))
    is_full = max(grown) > max_length or (counts[number] and row.counted >= 0)
    if row.parts and is_full:
      yield row
      row = new()
    at, branch = len(row.tokens), len(row.parts) + 1
    row.tokens += inputs
    row.positions += range(len(context), len(context) + len(inputs))
    row.branches += [branch] * len(inputs)
    row.before += [len(rest) - 1, *range(at, at + len(inputs))]
    row.targets += end.tolist()
    row.parts.append((number, len(end)))
    if counts[number]:
      row.counted, row.counted_branch = number, branch
  yield row


def row_lengths(sizes: Sequence[int]) -> list[int]:
  """Returns the lengths for these rows that need the least padding, rising."""
  count_I = np.bincount([-(-size // _ROUND) for size in sizes])
  most = len(count_I) - 1
  rows_I = np.cumsum(count_I)
  # cost[i]: padded tokens of the rows of up to i rounded tokens.
  cost = [0.0] + [np.inf] * most
  chosen: list[list[int]] = [[] for _ in range(most + 1)]
  for _ in range(_NUM_LENGTHS):
    better, longer = list(cost), list(chosen)
    for i in range(1, most + 1):
      for j in range(i):
        total = cost[j] + i * float(rows_I[i] - rows_I[j])
        if total < better[i]:
          better[i], longer[i] = total, [*chosen[j], i]
    cost, chosen = better, longer
  return [i * _ROUND for i in chosen[most]]


def plan_batches(
  groups: Sequence[Group],
  lengths: Sequence[int],
  batch_tokens: int,
  shards: int,
) -> list[Batch]:
  """Returns batches of all rows; those of one stem follow each other.

  Batches are smaller than `batch_tokens` where that saves more padding than it
  costs in batches.

  Args:
    groups: the rows by their stems.
    lengths: from `row_lengths`, rising.
    batch_tokens: most tokens of a batch, padding included; a batch has at least
      one row for each device.
    shards: devices that take rows of their own; they divide a batch's size.
  """
  plans = [
    list(_filled(groups, lengths, batch_tokens >> halvings, shards))
    for halvings in range(_HALVINGS + 1)
  ]
  return min(
    plans,
    key=lambda plan: sum(
      batch.length * batch.size + _TOKENS_OF_A_BATCH for batch in plan
    ),
  )


def _filled(
  groups: Sequence[Group],
  lengths: Sequence[int],
  batch_tokens: int,
  shards: int,
) -> Iterator[Batch]:
  """Yields batches of about `batch_tokens` tokens."""
  most = max(len(group.rows) for group in groups)
  for stem, rows in groups:
    # Shorter rows fill up a batch of longer ones. The longest come first: if
    # memory does not suffice, it shows at once.
    falling = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(falling):
      length = next(x for x in lengths if x >= len(falling[start]))
      fitting = max(1, batch_tokens // length // shards)
      size = shards * min(fitting, -(-most // shards))
      yield Batch(stem, falling[start : start + size], length, size)
      start += size


def regrouped(batches: Sequence[Batch]) -> list[Group]:
  """Returns the rows of batches by their stems."""
  groups: list[Group] = []
  for batch in batches:
    if not groups or groups[-1].stem is not batch.stem:
      groups.append(Group(batch.stem, []))
    groups[-1].rows.extend(batch.rows)
  return groups


def batch_arrays(batch: Batch) -> Arrays:
  """Returns the arrays of a batch; padding counts nowhere."""
  shape = (batch.size, batch.length)
  tokens_BT, positions_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  # A branch that no token has.
  branch_BT = np.full(shape, -1, np.int32)
  counted_BT = np.zeros(shape, np.float32)
  before_P, target_P = (
    np.zeros(batch.size * batch.length, np.int32) for _ in range(2)
  )
  done = 0
  for b, row in enumerate(batch.rows):
    for array_BT, values in (
      (tokens_BT, row.tokens),
      (positions_BT, row.positions),
      (branch_BT, row.branches),
    ):
      array_BT[b, : len(values)] = values
    if row.counted >= 0:
      counted_BT[b, : len(row.tokens)] = row.is_counted
    end = done + len(row.targets)
    before_P[done:end] = b * batch.length + np.array(row.before)
    target_P[done:end] = row.targets
    done = end
  return Arrays(
    *(tokens_BT, positions_BT, branch_BT, counted_BT, before_P, target_P),
    np.array(done, np.int32),
  )
