"""Log-likelihoods of continuations given contexts; the one scorer.

What texts share is computed once: see `edl_jax.tasks.sharing`. The sums are
those of one text at a time.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax.config import ModelConfig, UserError
from edl_jax.model.branching import ROW_AXES, STEM_SPEC, Routed, branching
from edl_jax.model.cached import Cache, empty_cache, in_compute_dtype
from edl_jax.model.transformer import Model
from edl_jax.tasks import sharing
from edl_jax.tasks.sharing import Batch
from edl_jax.tasks.windows import Window, encode_pairs, windows_of
from edl_jax.text.tokenizer import Tokenizer

# Tokens that the head runs on at a time.
_HEAD_TOKENS = 256


class Score(NamedTuple):
  """How likely a model finds a continuation."""

  # Log-likelihood of the continuation given the context, in nats.
  log_likelihood: float
  # Scored tokens.
  tokens: int
  # Whether tokens at the left were cut off: the model did not read all that
  # stands before some scored token.
  truncated: bool
  # Whether each scored token is the likeliest behind those before it.
  greedy: bool


class TaskRouting(NamedTuple):
  """How the model routed the windows of each label; float64 sums."""

  # Sum over windows of their mean router probabilities, (L, D, E).
  probability_LDE: np.ndarray
  # Windows, (L, D).
  sequences_LD: np.ndarray
  # Tokens sent to each expert, (L, D, E).
  assignments_LDE: np.ndarray


class _Results(NamedTuple):
  """What `_rows` returns of a batch, and the routing of its stem."""

  nats_P: Any
  greedy_P: Any
  rows: Routed
  stem: Routed


def check_scoring(config: ModelConfig, tokenizer: Tokenizer) -> None:
  """Checks that a model can score what a tokenizer encodes.

  Raises:
    UserError: the model needs a domain for each text, or has fewer tokens than
      the tokenizer.
  """
  if config.router == "domain":
    raise UserError("model.router=domain: continuations have no domain label")
  if tokenizer.vocabulary_size > config.vocabulary_size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocabulary_size:,} tokens, more than the"
      f" model's model.vocabulary_size={config.vocabulary_size}"
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

  With several processes, all must call this with the same pairs, and all get
  all scores.

  Args:
    model: laid out on `mesh`.
    tokenizer: the model's.
    pairs: texts; no continuation is empty.
    max_length: most tokens that the model reads at a time. See `windows_of` for
      longer texts.
    mesh, batch_tokens: see `score_texts`.

  Raises:
    UserError: see `check_scoring` and `encode_pairs`.
  """
  check_scoring(model.config, tokenizer)
  texts = [
    windows_of(tokens, first, max_length)
    for tokens, first in encode_pairs(tokenizer, pairs)
  ]
  return score_texts(model, texts, max_length, mesh, batch_tokens)[0]


def score_texts(
  model: Model,
  texts: Sequence[Sequence[Window]],
  max_length: int,
  mesh: Mesh,
  batch_tokens: int = 8192,
  labels: Sequence[int] | None = None,
  num_labels: int = 0,
  say: Callable[[str], object] = warnings.warn,
) -> tuple[list[Score], TaskRouting]:
  """Scores texts, and sums up the routing of those that have a label.

  At most five shapes are compiled: one for stems, and four for rows. With
  several processes, all must call this with the same texts.

  Args:
    model: laid out on `mesh`.
    texts: the windows of each, of a tokenizer that `check_scoring` allows.
    max_length: most tokens of a row, and of a window.
    mesh: the mesh in use. Devices along all axes but `tensor` take rows of
      their own.
    batch_tokens: tokens of a batch, padding included; a batch has at least one
      row for each device that takes rows. If the devices run out of memory, it
      is halved.
    labels: of each text, in [0, num_labels), or -1: its routing does not count.
      None stands for -1 everywhere.
    num_labels: D.
    say: is told in one line that the batches had to become smaller.

  Returns:
    The score of each text, and the routing by label.

  Raises:
    UserError: the devices have too little memory for one row each.
  """
  windows = [window for text in texts for window in text]
  labels = [-1] * len(texts) if labels is None else labels
  sums = _Sums(
    model.config,
    # A long continuation takes several windows; all of them have its label.
    [label for label, text in zip(labels, texts, strict=True) for _ in text],
    num_labels,
  )
  if windows:
    _run_all(model, windows, sums, max_length, mesh, batch_tokens, say)
  scores, start = [], 0
  for text in texts:
    end = start + len(text)
    scores.append(
      Score(
        float(-sums.nats_I[start:end].sum()),
        sum(len(window.tokens) - window.first for window in text),
        any(window.truncated for window in text),
        bool(sums.greedy_I[start:end].all()),
      )
    )
    start = end
  return scores, sums.routing


class _Sums:
  """Collects the results of windows, batch after batch.

  Attributes:
    nats_I: cross-entropy of each window's scored tokens, float64.
    greedy_I: whether each of them is the likeliest token.
    label_I: the label of each window.
    routing: of the labels.
  """

  def __init__(
    self, config: ModelConfig, labels: Sequence[int], num_labels: int
  ):
    self.nats_I = np.zeros(len(labels))
    self.greedy_I = np.ones(len(labels), bool)
    self.label_I = np.array(labels, np.int32)
    shape = (config.num_layers - config.num_dense_layers, num_labels)
    by_expert = (*shape, config.num_experts)
    self.routing = TaskRouting(
      np.zeros(by_expert), np.zeros(shape), np.zeros(by_expert)
    )

  def add(self, batch: Batch, results: _Results) -> None:
    start = 0
    for b, row in enumerate(batch.rows):
      for number, count in row.parts:
        end = start + count
        self.nats_I[number] = results.nats_P[start:end].sum(dtype=np.float64)
        self.greedy_I[number] = results.greedy_P[start:end].all()
        start = end
      if row.counted < 0:
        continue
      label = self.label_I[row.counted]
      probability_LE, assignments_LE = (
        of_stem[:, 0].astype(np.float64) + of_rows[:, b]
        for of_stem, of_rows in zip(results.stem, results.rows)
      )
      tokens = len(batch.stem) + int(row.is_counted.sum())
      self.routing.probability_LDE[:, label] += probability_LE / tokens
      self.routing.assignments_LDE[:, label] += assignments_LE
      self.routing.sequences_LD[:, label] += 1


def _run_all(
  model: Model,
  windows: Sequence[Window],
  sums: _Sums,
  max_length: int,
  mesh: Mesh,
  batch_tokens: int,
  say: Callable[[str], object],
) -> None:
  """Runs all windows; in smaller batches if memory does not suffice."""
  counts = [label >= 0 for label in sums.label_I.tolist()]
  groups = sharing.plan_rows(windows, counts, max_length)
  lengths = sharing.row_lengths(
    [len(r) for group in groups for r in group.rows]
  )
  # One shape for all stems.
  slots = sharing.rounded(max(len(group.stem) for group in groups))
  shards = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))
  with jax.set_mesh(mesh):
    model = in_compute_dtype(model)
    while groups:
      batches = sharing.plan_batches(groups, lengths, batch_tokens, shards)
      done = 0
      try:
        for results in _results(model, batches, slots, shards, mesh):
          sums.add(batches[done], results)
          done += 1
      except jax.errors.JaxRuntimeError as error:
        # Those under way: the next batch starts before this one's results.
        failed = batches[done : done + 2]
        batch_tokens = _halved(error, failed, shards)
        say(f"out of memory: batches now have {batch_tokens:,} tokens")
      groups = sharing.regrouped(batches[done:])


def _halved(error: RuntimeError, failed: Sequence[Batch], shards: int) -> int:
  """Returns a smaller `batch_tokens`; raises `error` if that cannot help."""
  if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
    raise error
  tokens = [x.size * x.length for x in failed if x.size > shards]
  if not tokens:
    raise UserError(
      f"out of memory with one row of {max(x.length for x in failed)} tokens on"
      " a device; lower max_length, or spread the model over more devices"
    ) from error
  return max(tokens) // 2


def _results(
  model: Model,
  batches: Sequence[Batch],
  slots: int,
  shards: int,
  mesh: Mesh,
) -> Iterator[_Results]:
  """Yields the results of each batch, on the host.

  Args:
    model: from `in_compute_dtype`.
    batches: see `sharing.plan_batches`.
    slots: tokens of a stem, padding included.
    shards: devices that take rows of their own.
    mesh: the mesh in use.
  """
  run_stem, run_rows = _programs(mesh)
  by_row = NamedSharding(mesh, PartitionSpec(ROW_AXES))
  replicated = NamedSharding(mesh, PartitionSpec())

  def put(array: np.ndarray, placed: NamedSharding) -> jax.Array:
    # Every process holds the array whole.
    return jax.make_array_from_callback(
      array.shape, placed, lambda index: array[index]
    )

  tokens = stem = count = waiting = None
  for batch in batches:
    if batch.stem is not tokens:
      tokens = batch.stem
      # Every device that takes rows computes the same.
      padded_BT = np.zeros((shards, slots), np.int32)
      padded_BT[:, : len(tokens)] = tokens
      count = put(np.array(len(tokens), np.int32), replicated)
      stem = run_stem(model, put(padded_BT, by_row), count)
    assert stem is not None
    arrays = sharing.batch_arrays(batch)
    placed = [put(x, by_row if x.ndim == 2 else replicated) for x in arrays]
    cache, of_stem = stem
    nats_P, greedy_P, of_rows = run_rows(model, *placed, cache, count)
    results = _Results(nats_P, greedy_P, of_rows, of_stem)
    # The next batch is made while this one is computed.
    if waiting:
      yield jax.device_get(waiting)
    waiting = results
  if waiting:
    yield jax.device_get(waiting)


@functools.cache
def _programs(mesh: Mesh) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns `_stem` and `_rows`, compiled; every process gets all results."""
  replicated = NamedSharding(mesh, PartitionSpec())
  cache = NamedSharding(mesh, STEM_SPEC)
  return (
    jax.jit(_stem, out_shardings=(cache, replicated)),
    jax.jit(_rows, out_shardings=replicated),
  )


def _stem(
  model: Model, tokens_BT: jax.Array, count: jax.Array
) -> tuple[Cache, Routed]:
  """Returns the keys and values, and the routing, of the first of equal rows.

  Args:
    model: from `in_compute_dtype`.
    tokens_BT: a stem, padded, in every row.
    count: its tokens.
  """
  config = model.config
  nothing = empty_cache(config, 1, 0)
  if not tokens_BT.shape[1]:
    layers = config.num_layers - config.num_dense_layers
    none_LBE = jnp.zeros((layers, 1, config.num_experts))
    return nothing, Routed(none_LBE, none_LBE)
  positions_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  counted_BT = (positions_BT < count).astype(jnp.float32)
  _, cache, routed = branching(
    *(model, tokens_BT, positions_BT, jnp.zeros_like(tokens_BT), counted_BT),
    *(nothing, jnp.int32(0)),
  )
  return jax.tree.map(lambda x: x[:, :1], (cache, routed))


def _rows(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  branch_BT: jax.Array,
  counted_BT: jax.Array,
  before_P: jax.Array,
  target_P: jax.Array,
  num_scored: jax.Array,
  stem: Cache,
  stem_length: jax.Array,
) -> tuple[jax.Array, jax.Array, Routed]:
  """Runs rows, and the head on the tokens before the scored ones alone.

  Args:
    model: from `in_compute_dtype`.
    tokens_BT, ..., num_scored: see `sharing.Arrays`.
    stem, stem_length: see `branching`.

  Returns:
    nats_P, float32, the cross-entropy of the first `num_scored` of target_P;
    greedy_P, whether each is the likeliest token; and the routing of rows. What
    follows them means nothing.
  """
  x_BTM, _, routed = branching(
    *(model, tokens_BT, positions_BT, branch_BT, counted_BT),
    *(stem, stem_length),
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
  nats_P, greedy_P = jax.lax.fori_loop(
    0, -(-num_scored // chunk), of_chunk, nothing
  )
  return nats_P, greedy_P, routed
