"""Markov sources that are partly alike, whose best loss is known.

A symbol decides which symbols may follow. After a chosen share of the symbols,
every source goes on in the same way; after the others, each source has its own
way. A model's loss can be compared with that
of the best predictor, with and without knowledge of the source.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence

import numpy as np

from edl_jax.text.batch import Batch

# Probabilities of the symbols that may follow a symbol, 1.21 nats. They are the
# same after every symbol, so that all sources have the same entropy.
_NEXT = np.array([0.5, 0.25, 0.15, 0.1])
ALPHABET = string.ascii_letters


@dataclasses.dataclass(frozen=True)
class MarkovMixture:
  """Sources of order 1; two mixtures of one seed differ in `shared` alone.

  Symbols after which all sources agree at one `shared` are among those of every
  larger one. After the others, a source stays as it is.
  """

  # Share of the symbols after which all sources go on alike, from 0 to 1.
  shared: float
  num_sources: int = 8
  # At most the letters of `ALPHABET`.
  num_symbols: int = 48
  # Mean number of symbols of a document. A document ends after every symbol
  # with the same probability.
  mean_length: float = 500.0
  seed: int = 0

  @functools.cached_property
  def next_DVV(self) -> np.ndarray:
    """Probability of a symbol after another, float64 (D, V, V)."""
    count = self.num_symbols
    rng = np.random.default_rng(self.seed)

    def tables(number: int) -> np.ndarray:
      order = rng.random((number, count, count)).argsort(-1)
      probability = np.zeros((number, count, count))
      np.put_along_axis(probability, order[..., : len(_NEXT)], _NEXT, -1)
      return probability

    common, own = tables(1), tables(self.num_sources)
    alike = rng.permutation(count)[: round(self.shared * count)]
    own[:, alike] = common[:, alike]
    return own

  @functools.cached_property
  def stationary_DV(self) -> np.ndarray:
    """Probability of each symbol far from a start, float64 (D, V)."""
    chance_DV = np.full(self.next_DVV.shape[:2], 1 / self.num_symbols)
    for _ in range(10_000):
      moved_DV = (chance_DV[..., None] * self.next_DVV).sum(1)
      # Half a step: the iteration then ends where the chain has a period too.
      moved_DV = (chance_DV + moved_DV) / 2
      change = np.abs(moved_DV - chance_DV).max()
      chance_DV = moved_DV
      if change < 1e-15:
        break
    return chance_DV / chance_DV.sum(1, keepdims=True)

  @property
  def entropy(self) -> float:
    """Nats of a symbol after another, where the source is known."""
    return float(-(_NEXT * np.log(_NEXT)).sum())

  def documents(self, source: int, characters: int) -> list[str]:
    """Returns documents of one source with about `characters` symbols in all.

    They begin in the stationary distribution. The same arguments give the same
    documents.
    """
    rng = np.random.default_rng([self.seed, source, 1])
    count = max(1, round(characters / self.mean_length))
    length_I = rng.geometric(1 / self.mean_length, count)
    symbols = np.zeros((count, length_I.max()), np.int64)
    symbols[:, 0] = rng.choice(
      self.num_symbols, count, p=self.stationary_DV[source]
    )
    order = self.next_DVV[source].argsort(-1)[:, : -len(_NEXT) - 1 : -1]
    drawn = rng.choice(len(_NEXT), symbols.shape, p=_NEXT)
    for t in range(1, symbols.shape[1]):
      symbols[:, t] = order[symbols[:, t - 1], drawn[:, t]]
    letters = np.array(list(ALPHABET))[symbols]
    return ["".join(row[:length]) for row, length in zip(letters, length_I)]

  def best_loss(
    self,
    rows: Sequence[Batch],
    document_start_id: int,
    prior_D: np.ndarray,
  ) -> float:
    """Returns the mean loss, in nats, of the best predictor of some rows.

    It knows the mixture and infers the source from what it has read of the
    document, by Bayes' rule. Like the model, it sees no earlier document, and
    of a document that the row cuts, only what is in the row.

    Args:
      rows: their tokens are bytes of letters, and the document start; padding
        does not count.
      document_start_id: token that opens each document.
      prior_D: probability of each source before the first symbol, (D,).
        All on one source: the source is known.
    """
    end = 1 / self.mean_length
    symbol_of = np.full(document_start_id + 1, -1)
    for symbol, letter in enumerate(ALPHABET[: self.num_symbols]):
      symbol_of[ord(letter)] = symbol
    tokens_BT = symbol_of[np.stack([row.tokens_BT for row in rows])]
    targets_BT = symbol_of[np.stack([row.targets_BT for row in rows])]
    weights_BT = np.stack([row.weights_BT for row in rows])
    posterior_BD = np.tile(prior_D, (len(rows), 1))
    # The last symbol of each row's document; -1 where there is none.
    last_B = np.full(len(rows), -1)
    nats = 0.0
    for token_B, target_B, weight_B in zip(
      tokens_BT.T, targets_BT.T, weights_BT.T
    ):
      starts_B = token_B < 0
      posterior_BD = posterior_BD * self._next(last_B, token_B)
      posterior_BD[starts_B] = prior_D
      posterior_BD /= posterior_BD.sum(1, keepdims=True)
      last_B = token_B
      chance_B = (posterior_BD * self._next(last_B, target_B)).sum(1)
      # A document has a symbol at least.
      ends_B = np.where(starts_B, 0.0, end)
      chance_B = np.where(target_B < 0, ends_B, (1 - ends_B) * chance_B)
      nats -= np.log(chance_B[weight_B > 0]).sum()
    return float(nats / weights_BT.sum())

  def _next(self, last_B: np.ndarray, symbol_B: np.ndarray) -> np.ndarray:
    """Probability of each row's symbol by source, after another or first.

    Returns:
      float64 (B, D); without meaning where `symbol_B` is -1.
    """
    return np.where(
      last_B >= 0,
      self.next_DVV[:, last_B, symbol_B],
      self.stationary_DV[:, symbol_B],
    ).T
