"""Log-likelihoods of continuations; what requests share is computed once.

Texts with the same context become one row that branches into continuations, and
what many rows begin with, such as examples before every question, is a stem
(`edl_jax.model.branching`). The sums are those of one text at a time.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.config import UserError
from edl_jax.model.branching import branching
from edl_jax.model.cached import Cache, empty_cache, in_compute_dtype
from edl_jax.model.transformer import Model

# Most lengths that rows are padded to, and what these are multiples of.
_NUM_LENGTHS = 4
_ROUND = 16
# A stem is worth batches of its own from this many tokens and rows on.
_SHORTEST_STEM = 32
_FEWEST_ROWS = 16
# Tokens that the head runs on at a time.
_HEAD_TOKENS = 256


class Likelihood(NamedTuple):
  """How likely a model finds the end of a token sequence."""

  # Of all scored tokens, in nats.
  log_likelihood: float
  # Whether each is the likeliest token behind those before it.
  greedy: bool


@dataclasses.dataclass
class _Row:
  """Tokens behind a stem, and what is scored."""

  tokens: list[int]
  positions: list[int]
  branches: list[int]
  # Of each scored token: where the token before it is in the row; and itself.
  before: list[int] = dataclasses.field(default_factory=list)
  targets: list[int] = dataclasses.field(default_factory=list)
  # The sequences that they belong to, one after the other: number and count.
  parts: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  def __len__(self) -> int:
    # A batch has one array for tokens and one for scored tokens.
    return max(len(self.tokens), len(self.targets))


class _Group(NamedTuple):
  """Rows behind one stem, which may be empty."""

  stem: np.ndarray
  rows: list[_Row]


def score_sequences(
  model: Model,
  sequences: Sequence[tuple[np.ndarray, int]],
  max_length: int,
  mesh: Mesh,
  batch_tokens: int = 8192,
) -> list[Likelihood]:
  """Scores the ends of token sequences, in their order; for one process.

  At most six shapes are compiled: one for stems, and four for rows.

  Args:
    model: laid out on `mesh`.
    sequences: tokens, int32, and the index of the first one to score, 1 or
      more.
    max_length: most tokens that the model reads of a sequence. A longer one
      loses tokens at its left.
    mesh: the mesh in use.
    batch_tokens: tokens of a batch, padding included; a batch has at least one
      row for each device that holds rows.

  Raises:
    UserError: there are more tokens to score than `max_length`, or the model
      needs a domain for each text.
  """
  if model.config.router == "domain":
    raise UserError("model.router=domain: continuations have no domain label")
  if not sequences:
    return []
  groups = _plan(sequences, max_length)
  nats_I = np.zeros(len(sequences))
  greedy_I = np.ones(len(sequences), bool)
  with jax.set_mesh(mesh):
    cast = in_compute_dtype(model)
    for rows, results in _batches(cast, groups, mesh, batch_tokens):
      nats_P, greedy_P = jax.device_get(results)
      start = 0
      for number, count in (part for row in rows for part in row.parts):
        end = start + count
        nats_I[number] = nats_P[start:end].sum(dtype=np.float64)
        greedy_I[number] = greedy_P[start:end].all()
        start = end
  return [Likelihood(-n, g) for n, g in zip(nats_I.tolist(), greedy_I.tolist())]


# --- What is shared ----------------------------------------------------------


def _plan(
  sequences: Sequence[tuple[np.ndarray, int]], max_length: int
) -> list[_Group]:
  """Returns rows that score all sequences, by their stems."""
  contexts: dict[bytes, tuple[np.ndarray, list[tuple[int, np.ndarray]]]] = {}
  for number, (tokens, first) in enumerate(sequences):
    if len(tokens) - first > max_length:
      raise UserError(
        f"continuation {number + 1} has {len(tokens) - first} tokens, more than"
        f" the {max_length} that the model reads"
      )
    lost = max(0, len(tokens) - 1 - max_length)
    context, end = tokens[lost:first], tokens[first:]
    # As bytes, contexts are sorted by their tokens.
    key = context.astype(">u4").tobytes()
    contexts.setdefault(key, (context, []))[1].append((number, end))
  ordered = [contexts[key] for key in sorted(contexts)]
  groups, others = [], _Group(np.zeros(0, np.int32), [])
  start = 0
  while start < len(ordered):
    end, common = _alike(ordered, start)
    if end - start < _FEWEST_ROWS:
      common = 0
    group = _Group(ordered[start][0][:common], []) if common else others
    for context, ends in ordered[start:end]:
      group.rows.extend(_rows(context, ends, common, max_length))
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
) -> Iterator[_Row]:
  """Yields rows of one context and some of its continuations."""
  rest = context[common:].tolist()

  def new() -> _Row:
    positions = list(range(common, len(context)))
    return _Row(list(rest), positions, [0] * len(rest))

  row = new()
  for number, end in ends:
    inputs = end[:-1].tolist()
    grown = (len(row.tokens) + len(inputs), len(row.targets) + len(end))
    if row.parts and max(grown) > max_length:
      yield row
      row = new()
    at = len(row.tokens)
    row.tokens += inputs
    row.positions += range(len(context), len(context) + len(inputs))
    row.branches += [len(row.parts) + 1] * len(inputs)
    row.before += [len(rest) - 1, *range(at, at + len(inputs))]
    row.targets += end.tolist()
    row.parts.append((number, len(end)))
  yield row


def _lengths(sizes: Sequence[int]) -> list[int]:
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


# --- Batches -----------------------------------------------------------------


def _batches(
  model: Model,
  groups: Sequence[_Group],
  mesh: Mesh,
  batch_tokens: int,
) -> Iterator[tuple[list[_Row], tuple[jax.Array, jax.Array]]]:
  """Yields rows, and their results from `_score`, which may yet be computed.

  Args:
    model: from `in_compute_dtype`.
    groups: the rows.
    mesh, batch_tokens: as for `score_sequences`.
  """
  shards = int(np.prod([mesh.shape[axis] for axis in sharding.ROW_AXES]))
  lengths = _lengths([len(row) for group in groups for row in group.rows])
  slots = max(len(group.stem) for group in groups)
  slots = -(-slots // _ROUND) * _ROUND
  parts = []
  for group in groups:
    by_length: dict[int, list[_Row]] = {length: [] for length in lengths}
    for row in group.rows:
      by_length[next(x for x in lengths if x >= len(row))].append(row)
    parts.append((group.stem, by_length))
  sizes = {
    length: shards
    * max(
      1,
      min(
        batch_tokens // length // shards,
        max(-(-len(by_length[length]) // shards) for _, by_length in parts),
      ),
    )
    for length in lengths
  }
  waiting = None
  for tokens, by_length in parts:
    stem = _run_stem(model, tokens, slots, shards, mesh)
    for length, rows in by_length.items():
      for start in range(0, len(rows), sizes[length]):
        some = rows[start : start + sizes[length]]
        arrays = _arrays(some, length, sizes[length])
        placed = sharding.put_batch(arrays[:3], mesh)
        count = np.int32(len(tokens))
        results = _score(model, *placed, stem, count, *arrays[3:])
        # The next batch is made while this one is computed.
        if waiting:
          yield waiting
        waiting = (some, results)
  if waiting:
    yield waiting


def _arrays(
  rows: Sequence[_Row], length: int, size: int
) -> tuple[np.ndarray, ...]:
  """Returns tokens, positions, branches, before_P, target_P and their count."""
  shape = (size, length)
  tokens_BT, positions_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  # A branch that no token has.
  branch_BT = np.full(shape, -1, np.int32)
  before_P, target_P = (np.zeros(size * length, np.int32) for _ in range(2))
  done = 0
  for b, row in enumerate(rows):
    for array_BT, values in (
      (tokens_BT, row.tokens),
      (positions_BT, row.positions),
      (branch_BT, row.branches),
    ):
      array_BT[b, : len(values)] = values
    end = done + len(row.targets)
    before_P[done:end] = b * length + np.array(row.before)
    target_P[done:end] = row.targets
    done = end
  counts = np.array(done, np.int32)
  return tokens_BT, positions_BT, branch_BT, before_P, target_P, counts


def _run_stem(
  model: Model, tokens: np.ndarray, slots: int, shards: int, mesh: Mesh
) -> Cache:
  """Returns the keys and values of a stem in this many slots."""
  if not slots:
    return empty_cache(model.config, 1, 0)
  # Every device that holds rows computes the same.
  padded_BT = np.zeros((shards, slots), np.int32)
  padded_BT[:, : len(tokens)] = tokens
  return _stem(model, *sharding.put_batch((padded_BT,), mesh))


@jax.jit
def _stem(model: Model, tokens_BT: jax.Array) -> Cache:
  positions_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  _, cache = branching(
    *(model, tokens_BT, positions_BT, jnp.zeros_like(tokens_BT)),
    *(empty_cache(model.config, 1, 0), jnp.int32(0)),
  )
  return jax.tree.map(lambda x: x[:, :1], cache)


@jax.jit
def _score(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  branch_BT: jax.Array,
  stem: Cache,
  stem_length: jax.Array,
  before_P: jax.Array,
  target_P: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Runs rows, and the head on the tokens before the scored ones alone.

  Returns:
    nats_P, float32, the cross-entropy of the first `count` of target_P, and
    greedy_P, whether each is the likeliest token. What follows means nothing.
  """
  x_BTM, _ = branching(
    model, tokens_BT, positions_BT, branch_BT, stem, stem_length
  )
  x_PM = x_BTM.reshape(-1, x_BTM.shape[-1])
  chunk = min(len(target_P), _HEAD_TOKENS)
  missing = -len(target_P) % chunk
  before_P, target_P = (jnp.pad(x, (0, missing)) for x in (before_P, target_P))

  def of_chunk(number, results):
    start = number * chunk
    before, target = (
      jax.lax.dynamic_slice_in_dim(x, start, chunk)
      for x in (before_P, target_P)
    )
    logits_PV = model.logits(x_PM[before])
    picked = jnp.take_along_axis(logits_PV, target[:, None], axis=-1)[:, 0]
    found = (
      jax.nn.logsumexp(logits_PV, axis=-1) - picked,
      logits_PV.argmax(-1) == target,
    )
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(into, x, start, 0)
      for into, x in zip(results, found)
    )

  nothing = (
    jnp.zeros(len(target_P), jnp.float32),
    jnp.zeros(len(target_P), bool),
  )
  return jax.lax.fori_loop(0, -(-count // chunk), of_chunk, nothing)
