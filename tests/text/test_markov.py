"""Markov sources: nested, stationary, with the best loss of a naive form."""

import dataclasses
import math

import numpy as np
import pytest

from edl_jax.text.batch import PackedRows
from edl_jax.text.markov import ALPHABET, MarkovMixture

START = 256


def pack(documents, length=32):
  """Returns rows of the documents, whose tokens are bytes."""
  stream = [START]
  for text in documents:
    stream += [*text.encode(), START]
  packed = PackedRows(np.array(stream, np.int32), length, START, 0)
  return [packed[row] for row in range(len(packed))]


def naive_loss(mixture, rows, prior):
  """Returns the best loss from joint probabilities of whole prefixes."""
  end, count = 1 / mixture.mean_length, mixture.num_symbols

  def joint(source, symbols):
    """P(source, symbols): the first two are stationary."""
    pair = mixture.pair_DVV[source]
    if not symbols:
      return prior[source]
    if len(symbols) == 1:
      return prior[source] * sum(pair[symbols[0]])
    chance = prior[source] * pair[symbols[0], symbols[1]]
    for a, b, c in zip(symbols, symbols[1:], symbols[2:]):
      chance *= mixture.next_DVVV[source, a, b, c]
    return chance

  nats, tokens = 0.0, 0
  for row in rows:
    read = []
    for token, target in zip(row.tokens_BT, row.targets_BT):
      read = [] if token == START else [*read, ALPHABET.index(chr(token))]
      if target == START:
        chance = end
      else:
        following = [*read, ALPHABET.index(chr(target))]
        sources = range(mixture.num_sources)
        chance = sum(joint(s, following) for s in sources) / sum(
          joint(s, read) for s in sources
        )
        if read:
          chance *= 1 - end
      nats, tokens = nats - math.log(chance), tokens + 1
  assert count <= len(ALPHABET)
  return nats / tokens


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("prior", [[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
def test_best_loss_is_that_of_joint_probabilities(shared, prior):
  mixture = MarkovMixture(shared, 3, 5, mean_length=20.0, seed=4)
  rows = pack(mixture.documents(1, 1500))
  assert len(rows) > 30
  best = mixture.best_loss(rows, START, np.array(prior))
  assert best == pytest.approx(naive_loss(mixture, rows, prior), rel=1e-9)


def test_loss_of_a_known_source_approaches_the_entropy():
  """Apart from the ends of documents, whose entropy has a closed form."""
  mixture = MarkovMixture(0.3, 2, 16, mean_length=200.0)
  rows = pack(mixture.documents(0, 400_000), 2000)
  end = 1 / mixture.mean_length
  # A document's end or not, after each symbol; then the symbol.
  ends = -end * math.log(end) - (1 - end) * math.log1p(-end)
  # The first two symbols of a document are drawn from the stationary pairs.
  pair = mixture.pair_DVV[0]
  first = -(pair * np.log(pair, where=pair > 0, out=np.zeros_like(pair))).sum()
  per_document = first + 199 * ends + ends + 198 * mixture.entropy
  expected = per_document / 201
  best = mixture.best_loss(rows, START, np.array([1.0, 0.0]))
  assert best == pytest.approx(expected, abs=0.005)
  unknown = mixture.best_loss(rows, START, np.array([0.5, 0.5]))
  assert best < unknown < best + 0.02


def test_pairs_are_stationary_and_follow_the_table():
  mixture = MarkovMixture(0.5, 3, 8)
  pair, following = mixture.pair_DVV, mixture.next_DVVV
  assert np.allclose(following.sum(-1), 1)
  assert np.allclose(pair.sum((1, 2)), 1)
  for source in range(3):
    after = np.zeros((8, 8))
    for a, b, c in np.ndindex(8, 8, 8):
      after[b, c] += pair[source, a, b] * following[source, a, b, c]
    assert np.allclose(after, pair[source], atol=1e-12)


def test_shared_contexts_are_nested():
  tables = {
    shared: MarkovMixture(shared, 3, 8).next_DVVV.reshape(3, 64, 8)
    for shared in (0.0, 0.25, 0.75, 1.0)
  }
  alike = {
    shared: (table == table[:1]).all((0, 2)) for shared, table in tables.items()
  }
  assert alike[0.25].sum() >= 16 and alike[1.0].all()
  assert alike[0.0].sum() < 4  # by chance
  assert not (alike[0.25] & ~alike[0.75]).any()
  own = ~alike[0.75]
  assert np.array_equal(tables[0.0][:, own], tables[0.75][:, own])


def test_documents_follow_the_source():
  mixture = MarkovMixture(0.0, 2, 6, mean_length=50.0)
  documents = mixture.documents(1, 200_000)
  assert documents == dataclasses.replace(mixture).documents(1, 200_000)
  assert documents != mixture.documents(0, 200_000)
  lengths = [len(text) for text in documents]
  assert np.mean(lengths) == pytest.approx(50, rel=0.05)
  counts = np.zeros((6, 6, 6))
  for text in documents:
    symbols = [ALPHABET.index(letter) for letter in text]
    for triple in zip(symbols, symbols[1:], symbols[2:]):
      counts[triple] += 1
  seen = counts.sum(-1) > 2000
  share = counts[seen] / counts[seen].sum(-1, keepdims=True)
  assert seen.sum() > 10
  assert np.abs(share - mixture.next_DVVV[1][seen]).max() < 0.05
