"""Log-likelihoods of continuations given contexts."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.config import UserError
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch, padded_batches, padding_row
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
  # Whether the context lost tokens at its left.
  truncated: bool


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, int]:
  """Tokenises a context and what follows it, as a whole.

  As in lm-evaluation-harness, white space at the end of the context moves to
  the continuation, and the context has as many tokens as it has alone. Unlike
  there, at least one token is left to the continuation.

  Returns:
    The tokens, int32, after a document start; and the index of the first token
    of the continuation.
  """
  stripped = context.rstrip()
  whole, alone = tokenizer.encode_batch([context + continuation, stripped])
  start = np.array([tokenizer.document_start_id], np.int32)
  first = 1 + min(len(alone), len(whole) - 1)
  return np.concatenate([start, whole]), first


@jax.jit
def _nats(model: Model, batch: Batch) -> jax.Array:
  """Returns the cross-entropy of each target, float32 (B, T)."""
  return model.batch_sums(batch, 1)[1]


def score(
  model: Model,
  tokenizer: Tokenizer,
  pairs: Sequence[tuple[str, str]],
  max_length: int,
  mesh: Mesh,
  batch_tokens: int = 8192,
) -> list[Score]:
  """Scores (context, continuation) pairs, in their order.

  Rows of similar length share a batch, so at most six shapes are compiled. For
  one process; contexts are encoded anew for each continuation.

  Args:
    model: laid out on `mesh`.
    tokenizer: the model's.
    pairs: texts; no continuation is empty.
    max_length: most tokens that the model reads of a pair, divisible by the
      mesh's `sequence` axis.
    mesh: the mesh in use.
    batch_tokens: tokens of a batch, padding included; a batch has at least one
      row for each device that holds rows.

  Raises:
    UserError: a continuation is empty or longer than `max_length`, or the model
      needs a domain for each text.
  """
  if model.config.router == "domain":
    raise UserError("model.router=domain: continuations have no domain label")
  rows, firsts, truncated = [], [], []
  for number, (context, continuation) in enumerate(pairs, 1):
    if not continuation:
      raise UserError(f"continuation {number} is empty")
    tokens, first = encode_pair(tokenizer, context, continuation)
    if len(tokens) - first > max_length:
      raise UserError(
        f"continuation {number} has {len(tokens) - first} tokens, more than"
        f" the {max_length} that the model reads"
      )
    lost = max(0, len(tokens) - 1 - max_length)
    rows.append(tokens[lost:])
    firsts.append(first - lost)
    truncated.append(lost > 0)
  scores: list[Score | None] = [None] * len(rows)
  with jax.set_mesh(mesh):
    for indices, batch in _batches(rows, max_length, mesh, batch_tokens):
      nats_BT = jax.device_get(_nats(model, sharding.put_batch(batch, mesh)))
      for i, nats_T in zip(indices, nats_BT):
        # Target t is token t + 1.
        nats_T = nats_T[firsts[i] - 1 : len(rows[i]) - 1]
        scores[i] = Score(
          -float(nats_T.sum(dtype=np.float64)), len(nats_T), truncated[i]
        )
  return [each for each in scores if each is not None]


def _batches(
  rows: Sequence[np.ndarray], max_length: int, mesh: Mesh, batch_tokens: int
) -> Iterator[tuple[list[int], Batch]]:
  """Yields batches and the indices of their rows."""
  across = mesh.shape["sequence"]
  lengths = sorted(
    max_length >> k
    for k in range(_NUM_LENGTHS)
    if max_length >> k and (max_length >> k) % across == 0
  )
  shards = int(np.prod([mesh.shape[axis] for axis in sharding.ROW_AXES]))
  by_length: dict[int, list[int]] = {length: [] for length in lengths}
  for i, tokens in enumerate(rows):
    fitting = (each for each in lengths if each >= len(tokens) - 1)
    by_length[next(fitting)].append(i)
  for length, indices in by_length.items():
    size = max(1, batch_tokens // length // shards) * shards
    padded = [_row(rows[i], length) for i in indices]
    for number, batch in enumerate(padded_batches(padded, size)):
      yield indices[number * size : (number + 1) * size], batch


def _row(tokens: np.ndarray, length: int) -> Batch:
  """Returns a row of `length` tokens: a Batch whose arrays lack the axis B."""
  count = len(tokens) - 1
  row = padding_row(length)
  row.tokens_BT[:count] = tokens[:-1]
  row.targets_BT[:count] = tokens[1:]
  row.segments_BT[:count] = 1
  row.positions_BT[:count] = np.arange(count)
  row.weights_BT[:count] = 1
  return row
