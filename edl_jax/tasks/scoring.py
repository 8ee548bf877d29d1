"""Log-likelihoods of continuations given contexts."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax import sharding
from edl_jax.config import ModelConfig, UserError
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch, padding_row, stack
from edl_jax.text.tokenizer import Tokenizer

# Rows are padded to the longest length or to a half, a quarter, ... of it.
_NUM_LENGTHS = 6


@dataclasses.dataclass(frozen=True)
class Score:
  """How likely a model finds a continuation."""

  # Log-likelihood of the continuation given the context, in nats.
  log_likelihood: float
  # Scored tokens.
  tokens: int
  # Whether tokens at the left were cut off: the model did not read all that
  # stands before some scored token.
  truncated: bool


class Window(NamedTuple):
  """Tokens that the model reads in one row, some of which are scored."""

  # int32, at most one more than the model reads.
  tokens: np.ndarray
  # Index of the first scored token, at least 1; all later ones are scored too.
  first: int
  # Whether tokens before these were cut off.
  truncated: bool


class TaskRouting(NamedTuple):
  """How the model routed the rows of each label; float64 sums."""

  # Sum over rows of their mean router probabilities, (L, D, E).
  probability_LDE: np.ndarray
  # Rows, (L, D).
  sequences_LD: np.ndarray
  # Tokens sent to each expert, (L, D, E).
  assignments_LDE: np.ndarray


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, int]:
  """Tokenises a context and what follows it; see `encode_pairs`."""
  return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(
  tokenizer: Tokenizer,
  pairs: Sequence[tuple[str, str]],
  name: Callable[[int], str] = "continuation {}".format,
) -> list[tuple[np.ndarray, int]]:
  """Tokenises contexts, each with what follows it as a whole.

  As in lm-evaluation-harness, white space at the end of the context moves to
  the continuation, and the context has as many tokens as it has alone. Unlike
  there, at least one token is left to the continuation.

  Args:
    tokenizer: of the model.
    pairs: (context, continuation).
    name: returns what messages call the pair of a number, from 1.

  Returns:
    Of each pair its tokens, int32, after a document start; and the index of the
    first token of the continuation.

  Raises:
    UserError: a continuation is empty, or the tokenizer loses text.
  """
  wholes = [context + continuation for context, continuation in pairs]
  # The choices of a question share a context.
  contexts = list(dict.fromkeys(context.rstrip() for context, _ in pairs))
  encoded = tokenizer.encode_batch([*wholes, *contexts])
  alone = dict(zip(contexts, map(len, encoded[len(wholes) :])))
  start = np.array([tokenizer.document_start_id], np.int32)
  found = []
  for number, ((context, continuation), text, tokens) in enumerate(
    zip(pairs, wholes, encoded), 1
  ):
    if not continuation:
      raise UserError(f"{name(number)} is empty")
    if (decoded := tokenizer.decode(tokens.tolist())) != text:
      same = next(
        (i for i, (a, b) in enumerate(zip(text, decoded)) if a != b),
        min(len(text), len(decoded)),
      )
      raise UserError(
        f"{name(number)}: the tokenizer cannot encode"
        f" {text[same : same + 20]!r}"
      )
    first = 1 + min(alone[context.rstrip()], len(tokens) - 1)
    found.append((np.concatenate([start, tokens]), first))
  return found


def windows_of(tokens: np.ndarray, first: int, max_length: int) -> list[Window]:
  """Returns the rows that score a continuation; one, unless it is too long.

  A context that is too long loses tokens at its left. A continuation longer
  than `max_length` is scored in pieces of half that length, each after as many
  tokens as fit.

  Args:
    tokens, first: from `encode_pairs`.
    max_length: most tokens that the model reads.
  """
  fits = len(tokens) - first <= max_length
  step = len(tokens) - first if fits else max(1, max_length // 2)
  windows = []
  for start in range(first, len(tokens), step):
    end = min(start + step, len(tokens))
    lost = max(0, end - 1 - max_length)
    windows.append(Window(tokens[lost:end], start - lost, lost > 0))
  return windows


def check_scoring(
  config: ModelConfig, tokenizer: Tokenizer, max_length: int, mesh: Mesh
) -> None:
  """Checks that a model can score what a tokenizer encodes.

  Raises:
    UserError: the model needs a domain for each text or has fewer tokens than
      the tokenizer, or the mesh does not divide `max_length`.
  """
  if config.router == "domain":
    raise UserError("model.router=domain: continuations have no domain label")
  if tokenizer.vocabulary_size > config.vocabulary_size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocabulary_size:,} tokens, more than the"
      f" model's model.vocabulary_size={config.vocabulary_size}"
    )
  across = mesh.shape["sequence"]
  if max_length < 1 or max_length % across:
    raise UserError(
      f"max_length={max_length}: must be a positive multiple of"
      f" mesh.sequence={across}"
    )


def score(
  model: Model,
  tokenizer: Tokenizer,
  pairs: Sequence[tuple[str, str]],
  max_length: int,
  mesh: Mesh,
  batch_tokens: int = 8192,
) -> list[Score]:
  """Scores (context, continuation) pairs, in their order.

  Rows of similar length share a batch, so at most six shapes are compiled.
  Contexts are encoded anew for each continuation. With several processes, all
  must call this with the same pairs, and all get all scores.

  Args:
    model: laid out on `mesh`.
    tokenizer: the model's.
    pairs: texts; no continuation is empty.
    max_length: most tokens that the model reads in a row, divisible by the
      mesh's `sequence` axis. See `windows_of` for longer texts.
    mesh: the mesh in use.
    batch_tokens: tokens of a batch, padding included; a batch has at least one
      row for each device that holds rows. If the devices run out of memory, it
      is halved, with a warning.

  Raises:
    UserError: see `check_scoring` and `encode_pairs`.
  """
  check_scoring(model.config, tokenizer, max_length, mesh)
  windows = [
    windows_of(tokens, first, max_length)
    for tokens, first in encode_pairs(tokenizer, pairs)
  ]
  flat = [window for each in windows for window in each]
  nats, _ = score_windows(
    model, flat, [-1] * len(flat), 1, max_length, mesh, batch_tokens
  )
  return collect_scores(windows, nats)


def collect_scores(
  windows: Sequence[Sequence[Window]], nats: np.ndarray
) -> list[Score]:
  """Returns the scores of texts, from those of all windows one after another.

  Args:
    windows: of each text, in order.
    nats: log-likelihood of each window.
  """
  scores, start = [], 0
  for each in windows:
    end = start + len(each)
    scores.append(
      Score(
        float(nats[start:end].sum()),
        sum(len(window.tokens) - window.first for window in each),
        any(window.truncated for window in each),
      )
    )
    start = end
  return scores


def score_windows(
  model: Model,
  windows: Sequence[Window],
  labels: Sequence[int],
  num_labels: int,
  max_length: int,
  mesh: Mesh,
  batch_tokens: int,
  say: Callable[[str], object] = warnings.warn,
) -> tuple[np.ndarray, TaskRouting]:
  """Scores rows, and sums up the routing of those that have a label.

  Args:
    model, max_length, mesh, batch_tokens: as for `score`.
    windows: the rows.
    labels: of each row, in [0, num_labels), or -1: its routing does not count.
    num_labels: D.
    say: is told in one line that the batches had to become smaller.

  Returns:
    The log-likelihood of each row's scored tokens in nats, float64; and the
    routing by label.
  """
  nats_I = np.zeros(len(windows))
  run = _program(mesh)
  total: TaskRouting | None = None
  # The longest rows first: if memory does not suffice, it shows at once.
  by_length = _by_length(windows, max_length, mesh)[::-1]
  with jax.set_mesh(mesh):
    for length, indices in by_length:
      done = 0
      while done < len(indices):
        size = _rows(length, batch_tokens, mesh, len(indices))
        some = indices[done : done + size]
        batch = _batch(windows, labels, some, length, size)
        try:
          nats_BT, sums = jax.device_get(
            run(model, _on_devices(batch, mesh), num_labels)
          )
        except jax.errors.JaxRuntimeError as error:
          batch_tokens = _halved(error, length, size * length, mesh)
          say(f"out of memory: batches now have {batch_tokens:,} tokens")
          continue
        sums = TaskRouting(*(np.asarray(x, np.float64) for x in sums))
        total = (
          sums if total is None else TaskRouting(*map(np.add, total, sums))
        )
        for row, i in enumerate(some):
          # Target t is token t + 1.
          tokens, first, _ = windows[i]
          nats_T = nats_BT[row, first - 1 : len(tokens) - 1]
          nats_I[i] = -nats_T.sum(dtype=np.float64)
        done += size
  assert total is not None, "no rows"
  return nats_I, total


@functools.cache
def _program(mesh: Mesh) -> Callable[..., Any]:
  """Returns `_run`, compiled; every process gets all of its results."""
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.jit(_run, static_argnums=2, out_shardings=replicated)


def _run(
  model: Model, batch: Batch, num_labels: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns the cross-entropy of each target, float32 (B, T), and routing."""
  sums, nats_BT = model.batch_sums(batch, num_labels)
  stats = sums.routing
  return nats_BT, (
    stats.probability_LDE,
    stats.sequences_LD,
    stats.assignments_LDE,
  )


def _halved(
  error: RuntimeError, length: int, batch_tokens: int, mesh: Mesh
) -> int:
  """Returns a smaller `batch_tokens`; raises `error` if that cannot help."""
  rows = _rows(length, batch_tokens, mesh)
  if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
    raise error
  if rows == _rows(length, 1, mesh):
    raise UserError(
      f"out of memory with one row of {length} tokens on a device; lower"
      " max_length, or spread the model over more devices"
    ) from error
  return rows * length // 2


def _rows(
  length: int, batch_tokens: int, mesh: Mesh, most: int | None = None
) -> int:
  """Returns the number of rows in a batch of rows of `length` tokens.

  `most` rows, if it is given, are all that there are; rounded up to a power of
  two for each device, so that few programs serve many calls.
  """
  shards = int(np.prod([mesh.shape[axis] for axis in sharding.ROW_AXES]))
  rows = max(1, batch_tokens // length // shards)
  if most is not None:
    rows = min(rows, 1 << (-(-most // shards) - 1).bit_length())
  return rows * shards


def _by_length(
  windows: Sequence[Window], max_length: int, mesh: Mesh
) -> list[tuple[int, list[int]]]:
  """Returns lengths, rising, and the indices of the rows padded to each."""
  across = mesh.shape["sequence"]
  lengths = sorted(
    max_length >> k
    for k in range(_NUM_LENGTHS)
    if max_length >> k and (max_length >> k) % across == 0
  )
  indices: dict[int, list[int]] = {length: [] for length in lengths}
  for i, window in enumerate(windows):
    fitting = (each for each in lengths if each >= len(window.tokens) - 1)
    indices[next(fitting)].append(i)
  return list(indices.items())


def _batch(
  windows: Sequence[Window],
  labels: Sequence[int],
  indices: Sequence[int],
  length: int,
  size: int,
) -> Batch:
  """Returns `size` rows, of which padding fills up the last ones."""
  rows = [_row(windows[i].tokens, labels[i], length) for i in indices]
  return stack([*rows, *[padding_row(length)] * (size - len(rows))])


def _row(tokens: np.ndarray, label: int, length: int) -> Batch:
  """Returns a row of `length` tokens: a Batch whose arrays lack the axis B."""
  count = len(tokens) - 1
  row = padding_row(length)._replace(domain_B=np.int32(label))
  row.tokens_BT[:count] = tokens[:-1]
  row.targets_BT[:count] = tokens[1:]
  row.segments_BT[:count] = 1
  row.positions_BT[:count] = np.arange(count)
  row.weights_BT[:count] = 1
  return row


def _on_devices(batch: Batch, mesh: Mesh) -> Batch:
  """Spreads a batch, which every process holds whole, over the mesh."""
  placed = sharding.row_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, placed, lambda index, x=x: x[index]
    ),
    batch,
  )
