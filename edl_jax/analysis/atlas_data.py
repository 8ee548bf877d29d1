"""Collects what the atlas shows: where a checkpoint routes held-out text.

The text is that of the run's own evaluation, so the figures by layer equal
those of `--mode=eval`. Memory is bounded whatever the text's length: counts
add up, contexts pass through a short list for each expert, and the model runs
over as many rows at a time as `_CHUNK_ELEMENTS` router probabilities allow.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from edl_jax.checkpoint import Loaded
from edl_jax.config import Experiment
from edl_jax.losses import routing, routing_metrics
from edl_jax.model.choice import make_choice
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch
from edl_jax.text.input_pipeline import eval_batches
from edl_jax.text.mixture import Corpus
from edl_jax.text.prepared import PreparedCorpus
from edl_jax.text.taxonomy import Taxonomy

# Router probabilities (L P E) of the rows that run at once, 32 MiB.
_CHUNK_ELEMENTS = 2**23
# Tokens of each list of an expert; contexts of an expert; tokens that a context
# shows before and after its own.
TOP_TOKENS = 8
TOP_CONTEXTS = 3
CONTEXT_TOKENS = 6
# A chunk offers more contexts than are kept, as text repeats itself.
_CANDIDATES = 4 * TOP_CONTEXTS
# Active experts (D L T A) that all examples together show.
_EXAMPLE_ELEMENTS = 240_000
_EXAMPLE_TOKENS = (16, 160)

_METRICS = (
  "diversity",
  "inter_fraction",
  "purity",
  "normalized_mutual_information",
  "max_violation",
)


class Context(NamedTuple):
  """A token that an expert takes, with its neighbours in the document."""

  # The router's probability of the expert.
  probability: float
  # Index of the fine domain.
  domain: int
  # Token ids in reading order, and which of them the expert takes.
  tokens: tuple[int, ...]
  position: int


class Example(NamedTuple):
  """The start of a domain's held-out text, token by token."""

  tokens_T: np.ndarray
  # The active experts of each token by falling probability, and these.
  expert_LTA: np.ndarray
  probability_LTA: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunRouting:
  """One run's routing of its held-out text, as NumPy arrays."""

  name: str
  step: int
  experiment: Experiment
  taxonomy: Taxonomy
  # Held-out tokens by domain, int64 (D,).
  tokens_D: np.ndarray
  # Routed assignments by domain, int64 (L, D, E).
  assignments_LDE: np.ndarray
  # JSD of the domains' mean probabilities in nats, float64 (L, D, D).
  divergence_LDD: np.ndarray
  # Routing metrics by name, (L,) each; "inter" (D_inter in nats) and
  # "token_information" (NMI of token and expert) among them.
  metrics: Mapping[str, np.ndarray]
  # Tokens that both experts of a pair take, int64: two of one layer, (L, E, E),
  # with an expert's own tokens on the diagonal; and one of a layer with one of
  # the next, (L - 1, E, E).
  together_LEE: np.ndarray
  next_LEE: np.ndarray
  # For each layer and expert, (token id, assignments) of the tokens that it
  # takes most often; and of those that say most about it, by their part of the
  # mutual information of token and expert.
  frequent: Sequence[Sequence[Sequence[tuple[int, int]]]]
  typical: Sequence[Sequence[Sequence[tuple[int, int]]]]
  # Contexts of highest probability, for each layer and expert.
  contexts: Sequence[Sequence[Sequence[Context]]]
  # By domain; None for a domain without text.
  examples: Sequence[Example | None]
  # Text of each token id that occurs above.
  token_texts: Mapping[int, str]

  @property
  def layers(self) -> list[int]:
    """Numbers of the mixture-of-experts layers in the model, from 0."""
    first = self.experiment.model.num_dense_layers
    return list(range(first, first + len(self.assignments_LDE)))


class _ChunkRouting(NamedTuple):
  """The routing of some rows: `jax.Array`s, NumPy's once on the host."""

  stats: routing.RoutingStats
  together_LEE: Any
  next_LEE: Any
  expert_LBTA: Any
  # Probabilities of every token's active experts.
  probability_LBTA: Any
  # The highest probabilities of each expert among tokens that it takes, with
  # the tokens' places in the flattened rows, (L, E, I); negative: no token.
  best_LEI: Any
  place_LEI: Any


@functools.partial(jax.jit, static_argnames="num_domains")
def _route(model: Model, batch: Batch, num_domains: int) -> _ChunkRouting:
  """Routes rows of the batch on one device."""

  def keep(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT):
    rows = routing.row_routing(
      logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT
    )
    return rows, probs_BTE, expert_BTA

  _, (rows, probs_LBTE, expert_LBTA), _ = model.hidden(
    batch.tokens_BT,
    batch.segments_BT,
    batch.positions_BT,
    batch.weights_BT,
    routing.Summaries(routing=keep),
    choice=make_choice(model.config, batch.domain_B, num_domains),
  )
  num_layers, *_, num_experts = probs_LBTE.shape
  active_LBTE = jax.nn.one_hot(expert_LBTA, num_experts).sum(-2)
  active_LBTE *= batch.weights_BT[..., None]
  active_LPE = active_LBTE.reshape(num_layers, -1, num_experts)
  pairs = functools.partial(
    jnp.einsum, "LPE,LPe->LEe", precision=jax.lax.Precision.HIGHEST
  )
  probs_LPE = probs_LBTE.reshape(active_LPE.shape)
  best_LEI, place_LEI = jax.lax.top_k(
    jnp.where(active_LPE > 0, probs_LPE, -1).swapaxes(1, 2),
    min(_CANDIDATES, active_LPE.shape[1]),
  )
  return _ChunkRouting(
    stats=routing.collect(rows, batch.domain_B, num_domains),
    together_LEE=pairs(active_LPE, active_LPE),
    next_LEE=pairs(active_LPE[:-1], active_LPE[1:]),
    expert_LBTA=expert_LBTA,
    probability_LBTA=jnp.take_along_axis(probs_LBTE, expert_LBTA, axis=-1),
    best_LEI=best_LEI,
    place_LEI=place_LEI,
  )


def collect(
  loaded: Loaded, corpus: Corpus | PreparedCorpus, name: str
) -> RunRouting:
  """Routes the held-out rows of a run's evaluation on one device.

  Args:
    loaded: the run's checkpoint, on one device.
    corpus: its text.
    name: what the page calls the run.
  """
  experiment, taxonomy = loaded.experiment, loaded.taxonomy
  batches = eval_batches(corpus, loaded.tokenizer, experiment)
  rows: Batch = jax.tree.map(lambda *x: np.concatenate(x), *batches)
  used_B = rows.weights_BT.any(1)
  rows = jax.tree.map(lambda x: x[used_B], rows)
  counter = _Counter(rows, experiment, len(taxonomy.fine))
  for chunk in _chunks(rows, experiment):
    routed = jax.device_get(_route(loaded.model, chunk, len(taxonomy.fine)))
    counter.add(chunk, routed)
  return counter.finish(loaded, name)


def _chunks(rows: Batch, experiment: Experiment) -> Iterator[Batch]:
  """Yields as many rows at a time as memory allows; padding fills the last."""
  model, (count, length) = experiment.model, rows.tokens_BT.shape
  row_elements = model.num_layers * model.num_experts * length
  size = min(count, max(1, _CHUNK_ELEMENTS // row_elements))
  for start in range(0, count, size):
    chunk = jax.tree.map(lambda x, at=start: x[at : at + size], rows)
    missing = size - len(chunk.domain_B)
    yield jax.tree.map(
      lambda x, n=missing: np.pad(x, ((0, n), *((0, 0),) * (x.ndim - 1))), chunk
    )


class _Counter:
  """Adds up chunks on the host."""

  def __init__(self, rows: Batch, experiment: Experiment, num_domains: int):
    model = experiment.model
    self._length = rows.tokens_BT.shape[1]
    self._num_experts = model.num_experts
    num_layers = model.num_layers - model.num_dense_layers
    sizes = num_layers, self._num_experts
    ids_I = rows.tokens_BT[rows.weights_BT > 0]
    known_I, count_I = np.unique(ids_I, return_counts=True)
    # The most frequent tokens; among equals those of the lowest ids.
    order_I = np.argsort(-count_I, kind="stable")[: routing.COUNTED_TOKENS]
    # V is the counted tokens alone. Their last place takes all others.
    self._id_V = np.sort(known_I[order_I])
    self._count_LVE = np.zeros(
      (num_layers, len(self._id_V) + 1, self._num_experts), np.int64
    )
    self._sums: Any = None
    self._contexts: list[list[list[Context]]] = [
      [[] for _ in range(sizes[1])] for _ in range(sizes[0])
    ]
    self._tokens_D = np.zeros(num_domains, np.int64)
    self._example_length = example_length(
      num_domains * num_layers * model.num_active_experts
    )
    self._examples: list[Example | None] = [None] * num_domains

  def add(self, rows: Batch, routed: _ChunkRouting) -> None:
    """Adds the rows that were routed."""
    sums = jax.tree.map(
      lambda x: np.asarray(x, np.float64),
      (routed.stats, routed.together_LEE, routed.next_LEE),
    )
    if self._sums is not None:
      sums = jax.tree.map(np.add, self._sums, sums)
    self._sums = sums
    tokens_B = rows.weights_BT.sum(1).astype(np.int64)
    np.add.at(self._tokens_D, rows.domain_B, tokens_B)
    self._count_tokens(rows, routed.expert_LBTA)
    self._keep_contexts(rows, routed)
    self._keep_examples(rows, routed)

  def _count_tokens(self, rows: Batch, expert_LBTA: np.ndarray) -> None:
    counted_BT = rows.weights_BT > 0
    ids_P = rows.tokens_BT[counted_BT]
    place_P = np.searchsorted(self._id_V, ids_P).clip(max=len(self._id_V) - 1)
    place_P[self._id_V[place_P] != ids_P] = len(self._id_V)
    for layer, expert_BTA in enumerate(expert_LBTA):
      key_PA = place_P[:, None] * self._num_experts + expert_BTA[counted_BT]
      count_VE = self._count_LVE[layer]
      count_VE += np.bincount(
        key_PA.reshape(-1), minlength=count_VE.size
      ).reshape(count_VE.shape)

  def _keep_contexts(self, rows: Batch, routed: _ChunkRouting) -> None:
    for layer, experts in enumerate(self._contexts):
      for expert, kept in enumerate(experts):
        for best, place in zip(
          routed.best_LEI[layer, expert].tolist(),
          routed.place_LEI[layer, expert].tolist(),
        ):
          full = len(kept) == TOP_CONTEXTS
          if best < 0 or (full and best <= kept[-1].probability):
            break
          row, place = divmod(place, self._length)
          _insert(kept, _context(rows, row, place, best))

  def _keep_examples(self, rows: Batch, routed: _ChunkRouting) -> None:
    for row, domain in enumerate(rows.domain_B.tolist()):
      tokens = int(rows.weights_BT[row].sum())
      if tokens and self._examples[domain] is None:
        end = min(tokens, self._example_length)
        self._examples[domain] = Example(
          rows.tokens_BT[row, :end],
          routed.expert_LBTA[:, row, :end],
          routed.probability_LBTA[:, row, :end],
        )

  def finish(self, loaded: Loaded, name: str) -> RunRouting:
    """Returns the figures of all that was added."""
    stats, together_LEE, next_LEE = self._sums
    metrics = routing_metrics.metrics_by_layer(
      jax.tree.map(jnp.float32, stats), _METRICS
    )
    _, inter_L = routing_metrics.diversity_decomposition(
      jax.tree.map(jnp.float32, stats)
    )
    divergence_LDD = routing_metrics.pairwise_divergence(
      jax.tree.map(jnp.float32, stats)
    )
    token_information_L = routing_metrics.token_mutual_information(
      stats._replace(token_assignments_LVE=jnp.float32(self._count_LVE))
    )
    frequent, typical = _top_tokens(self._id_V, self._count_LVE)
    used = {token for lists in (frequent, typical) for token in _ids(lists)}
    for experts in self._contexts:
      for kept in experts:
        used.update(token for context in kept for token in context.tokens)
    for example in self._examples:
      if example is not None:
        used.update(example.tokens_T.tolist())
    return RunRouting(
      name=name,
      step=loaded.step,
      experiment=loaded.experiment,
      taxonomy=loaded.taxonomy,
      tokens_D=self._tokens_D,
      assignments_LDE=np.rint(stats.assignments_LDE).astype(np.int64),
      divergence_LDD=np.asarray(divergence_LDD, np.float64),
      metrics={
        name: np.asarray(x_L, np.float64)
        for name, x_L in {
          **metrics,
          "inter": inter_L,
          "token_information": token_information_L,
        }.items()
      },
      together_LEE=np.rint(together_LEE).astype(np.int64),
      next_LEE=np.rint(next_LEE).astype(np.int64),
      frequent=frequent,
      typical=typical,
      contexts=self._contexts,
      examples=self._examples,
      token_texts={i: loaded.tokenizer.token_text(i) for i in sorted(used)},
    )


def example_length(elements: int) -> int:
  """Returns the tokens of an example, which the page's size bounds.

  Args:
    elements: what one token of every example takes, D L A.
  """
  low, high = _EXAMPLE_TOKENS
  return min(max(_EXAMPLE_ELEMENTS // elements, low), high)


def _ids(
  lists: Sequence[Sequence[Sequence[tuple[int, int]]]],
) -> Iterator[int]:
  return (token for layer in lists for expert in layer for token, _ in expert)


def _context(rows: Batch, row: int, place: int, probability: float) -> Context:
  """Cuts out a token with its neighbours of the same document."""
  segments_T = rows.segments_BT[row]
  low = max(place - CONTEXT_TOKENS, 0)
  near_T = np.arange(low, min(place + CONTEXT_TOKENS + 1, len(segments_T)))
  near_T = near_T[segments_T[near_T] == segments_T[place]]
  return Context(
    probability=probability,
    domain=int(rows.domain_B[row]),
    tokens=tuple(rows.tokens_BT[row, near_T].tolist()),
    position=int(np.searchsorted(near_T, place)),
  )


def _insert(kept: list[Context], context: Context) -> None:
  """Inserts a context where its probability belongs; drops repeated text."""
  if any(known[1:] == context[1:] for known in kept):
    return
  kept.append(context)
  # Stable: among equals, the first in the text stays first.
  kept.sort(key=lambda known: -known.probability)
  del kept[TOP_CONTEXTS:]


def _top_tokens(
  id_V: np.ndarray, count_LVE: np.ndarray
) -> tuple[list[list[list[tuple[int, int]]]], ...]:
  """Ranks the tokens of each expert; see `RunRouting.frequent`, `.typical`.

  Args:
    id_V: ids of the counted tokens.
    count_LVE: assignments of each to each expert; one more row than `id_V`, the
      last, holds all other tokens.
  """
  lists: tuple[list[list[list[tuple[int, int]]]], ...] = ([], [])
  for count_VE in count_LVE:
    total = max(count_VE.sum(), 1)
    expected_VE = count_VE.sum(1, keepdims=True) * count_VE.sum(0) / total
    count_VE = count_VE[: len(id_V)]
    ratio_VE = count_VE / np.maximum(expected_VE[: len(id_V)], 1e-9)
    score_VE = count_VE * np.log(np.maximum(ratio_VE, 1))
    for found, rank_VE in zip(lists, (count_VE, score_VE)):
      order_VE = np.argsort(-rank_VE, axis=0, kind="stable")[:TOP_TOKENS]
      found.append(
        [
          [
            (int(id_V[v]), int(count_VE[v, expert]))
            for v in order_VE[:, expert]
            if rank_VE[v, expert] > 0
          ]
          for expert in range(count_VE.shape[1])
        ]
      )
  return lists


def classical_scaling(distance_DD: np.ndarray) -> tuple[np.ndarray, float]:
  """Places points in the plane by classical multidimensional scaling.

  Torgerson (1952): the two leading eigenvectors of -J S J / 2, each scaled by
  the root of its eigenvalue, with S the squared distances and J the centring
  matrix. Each axis points to where its largest coordinate is positive.

  Args:
    distance_DD: distances between points, symmetric.

  Returns:
    Coordinates, float64 (D, 2); and the share of the sum of positive
    eigenvalues that these two are, 1 if all points coincide.
  """
  squared_DD = np.square(distance_DD)
  centred_DD = squared_DD - squared_DD.mean(0)
  centred_DD = centred_DD - centred_DD.mean(1, keepdims=True)
  value_D, vector_DD = np.linalg.eigh(-(centred_DD + centred_DD.T) / 4)
  value_D = np.maximum(value_D[::-1], 0)
  point_D2 = np.zeros((len(distance_DD), 2))
  axes = min(2, len(distance_DD))
  point_D2[:, :axes] = vector_DD[:, ::-1][:, :axes] * np.sqrt(value_D[:axes])
  largest_2 = point_D2[np.abs(point_D2).argmax(0), [0, 1]]
  point_D2 *= np.where(largest_2 < 0, -1, 1)
  total = value_D.sum()
  share = value_D[:2].sum() / total if total > 0 else 1.0
  return point_D2, float(share)


def turned_to(point_D2: np.ndarray, target_D2: np.ndarray) -> np.ndarray:
  """Rotates and mirrors points so that they come nearest to the target.

  The orthogonal Procrustes problem (Schoenemann, 1966). Maps of several layers
  and runs then show a domain in about the same direction.
  """
  left_22, _, right_22 = np.linalg.svd(point_D2.T @ target_D2)
  return point_D2 @ left_22 @ right_22


def domain_maps(
  divergence_LDD: np.ndarray, target_D2: np.ndarray | None = None
) -> tuple[np.ndarray, list[float]]:
  """Maps the domains by layer, and by the mean over layers first.

  Distances are square roots of the JSD, which is a metric (Endres and
  Schindelin, 2003).

  Args:
    divergence_LDD: JSD in nats.
    target_D2: what all maps are turned to; by default that of the mean.

  Returns:
    Coordinates, (L + 1, D, 2), and the share of `classical_scaling` of each.
  """
  every_LDD = np.concatenate([divergence_LDD.mean(0)[None], divergence_LDD])
  points, shares = zip(*map(classical_scaling, np.sqrt(every_LDD)))
  target = points[0] if target_D2 is None else target_D2
  return np.stack([turned_to(p, target) for p in points]), list(shares)


def effective_share(load_E: np.ndarray) -> float:
  """Returns exp(entropy of the load) / E, 1 where all experts share alike."""
  total = load_E.sum()
  share_E = load_E[load_E > 0] / max(total, 1)
  return math.exp(-(share_E * np.log(share_E)).sum()) / len(load_E)
