"""Markov sources that are partly alike, whose best loss is known.

Two symbols in a row decide which symbols may follow. A chosen share of these
contexts is common to all sources: there every source goes on in the same way.
Elsewhere each source has its own way. A model's loss can be compared with that
of the best predictor, with and without knowledge of the source.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence

import numpy as np

from edl_jax.text.batch import Batch

# Probabilities of the symbols that may follow a context, in nats 1.21. They are
# the same in every context, so that all sources have the same entropy.
_NEXT = np.array([0.5, 0.25, 0.15, 0.1])
ALPHABET = string.ascii_letters


@dataclasses.dataclass(frozen=True)
class MarkovMixture:
  """Sources of order 2; two mixtures of one seed differ in `shared` alone.

  Contexts that are common at one `shared` are common at every larger one, and a
  source's own contexts stay as they are.
  """

  # Share of the contexts that all sources have in common, from 0 to 1.
  shared: float
  num_sources: int = 8
  # At most the letters of `ALPHABET`.
  num_symbols: int = 32
  # Mean number of symbols of a document. A document ends after every symbol
  # with the same probability.
  mean_length: float = 500.0
  seed: int = 0

  @functools.cached_property
  def next_DVVV(self) -> np.ndarray:
    """Probability of a symbol after two others, float64 (D, V, V, V)."""
    count, contexts = self.num_symbols, self.num_symbols**2
    rng = np.random.default_rng(self.seed)

    def tables(number: int) -> np.ndarray:
      order = rng.random((number, contexts, count)).argsort(-1)
      probability = np.zeros((number, contexts, count))
      np.put_along_axis(probability, order[..., : len(_NEXT)], _NEXT, -1)
      return probability

    common, own = tables(1), tables(self.num_sources)
    chosen = rng.permutation(contexts)[: round(self.shared * contexts)]
    own[:, chosen] = common[:, chosen]
    return own.reshape(self.num_sources, count, count, count)

  @functools.cached_property
  def pair_DVV(self) -> np.ndarray:
    """Stationary probability of two symbols in a row, float64 (D, V, V)."""
    pair_DVV = np.full(self.next_DVVV.shape[:3], self.num_symbols**-2.0)
    for _ in range(10_000):
      moved_DVV = (pair_DVV[..., None] * self.next_DVVV).sum(1)
      # Half a step: the iteration then ends where the chain has a period too.
      moved_DVV = (pair_DVV + moved_DVV) / 2
      change = np.abs(moved_DVV - pair_DVV).max()
      pair_DVV = moved_DVV
      if change < 1e-15:
        break
    return pair_DVV / pair_DVV.sum((1, 2), keepdims=True)

  @property
  def entropy(self) -> float:
    """Nats of a symbol whose source and context are known."""
    return float(-(_NEXT * np.log(_NEXT)).sum())

  def documents(self, source: int, characters: int) -> list[str]:
    """Returns documents of one source with about `characters` symbols in all.

    They begin in the stationary distribution. The same arguments give the same
    documents.
    """
    rng = np.random.default_rng([self.seed, source, 1])
    count = max(1, round(characters / self.mean_length))
    length_I = rng.geometric(1 / self.mean_length, count)
    symbols = np.zeros((count, max(2, length_I.max())), np.int64)
    flat = self.pair_DVV[source].ravel()
    first = rng.choice(len(flat), count, p=flat / flat.sum())
    symbols[:, 0], symbols[:, 1] = np.divmod(first, self.num_symbols)
    order = self.next_DVVV[source].argsort(-1)[..., : -len(_NEXT) - 1 : -1]
    drawn = rng.choice(len(_NEXT), symbols.shape, p=_NEXT)
    for t in range(2, symbols.shape[1]):
      before, last = symbols[:, t - 2], symbols[:, t - 1]
      symbols[:, t] = order[before, last, drawn[:, t]]
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
      rows: without padding; tokens are bytes of letters, and the document
        start.
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
    posterior_BD = np.tile(prior_D, (len(rows), 1))
    # The last two symbols of each row's document; -1 where there are none.
    before_B = last_B = np.full(len(rows), -1)
    nats = 0.0
    for token_B, target_B in zip(tokens_BT.T, targets_BT.T):
      starts_B = token_B < 0
      likely_BD = self._next(before_B, last_B, token_B)
      posterior_BD = posterior_BD * likely_BD
      posterior_BD[starts_B] = prior_D
      posterior_BD /= posterior_BD.sum(1, keepdims=True)
      before_B = np.where(starts_B, -1, last_B)
      last_B = token_B
      chance_B = (posterior_BD * self._next(before_B, last_B, target_B)).sum(1)
      # A document has a symbol at least.
      ends_B = np.where(last_B < 0, 0.0, end)
      chance_B = np.where(target_B < 0, ends_B, (1 - ends_B) * chance_B)
      nats -= np.log(chance_B).sum()
    return float(nats / targets_BT.size)

  def _next(
    self, before_B: np.ndarray, last_B: np.ndarray, symbol_B: np.ndarray
  ) -> np.ndarray:
    """Probability of each row's symbol by source, after 0 to 2 symbols.

    Returns:
      float64 (B, D); without meaning where `symbol_B` is -1.
    """
    pair_DVV = self.pair_DVV
    first_DV = pair_DVV.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
      second_DVV = pair_DVV / first_DV[:, :, None]
    chance_DB = np.where(
      before_B >= 0,
      self.next_DVVV[:, before_B, last_B, symbol_B],
      np.where(
        last_B >= 0,
        second_DVV[:, last_B, symbol_B],
        first_DV[:, symbol_B],
      ),
    )
    return np.nan_to_num(chance_DB).T
