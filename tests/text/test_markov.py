"""Markov sources: nested, stationary, with the best loss of a naive form."""

import dataclasses
import itertools
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
  packed = PackedRows(
    np.array(stream, np.int32), length, START, 0, keep_partial=True
  )
  return [packed[row] for row in range(len(packed))]


def naive_loss(mixture, rows, prior):
  """Returns the best loss from joint probabilities of whole prefixes."""
  end = 1 / mixture.mean_length

  def joint(source, symbols):
    """P(source, symbols); the first symbol is stationary."""
    chance = prior[source]
    if symbols:
      chance *= mixture.stationary_DV[source, symbols[0]]
    for a, b in itertools.pairwise(symbols):
      chance *= mixture.next_DVV[source, a, b]
    return chance

  nats, tokens = 0.0, 0
  for row in rows:
    read = []
    length = int(row.weights_BT.sum())
    for token, target in zip(row.tokens_BT[:length], row.targets_BT):
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
  return nats / tokens


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("prior", [[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
def test_best_loss_is_that_of_joint_probabilities(shared, prior):
  mixture = MarkovMixture(shared, 3, 5, mean_length=20.0, seed=4)
  rows = pack(mixture.documents(1, 1500))
  assert len(rows) > 30 and not rows[-1].weights_BT.all()
  best = mixture.best_loss(rows, START, np.array(prior))
  assert best == pytest.approx(naive_loss(mixture, rows, prior), rel=1e-9)


def test_loss_of_a_known_source_approaches_the_entropy():
  """Apart from the ends of documents, whose entropy has a closed form."""
  mixture = MarkovMixture(0.3, 2, 16, mean_length=200.0)
  rows = pack(mixture.documents(0, 400_000), 2000)
  end = 1 / mixture.mean_length
  # A document's end or not, after each symbol; then the symbol.
  ends = -end * math.log(end) - (1 - end) * math.log1p(-end)
  chance = mixture.stationary_DV[0]
  first = -(chance * np.log(chance)).sum()
  per_document = first + 200 * ends + 199 * mixture.entropy
  expected = per_document / 201
  best = mixture.best_loss(rows, START, np.array([1.0, 0.0]))
  assert best == pytest.approx(expected, abs=0.005)
  unknown = mixture.best_loss(rows, START, np.array([0.5, 0.5]))
  assert best < unknown < best + 0.02


def test_stationary_symbols_follow_the_table():
  mixture = MarkovMixture(0.5, 3, 8)
  assert np.allclose(mixture.next_DVV.sum(-1), 1)
  for chance, following in zip(mixture.stationary_DV, mixture.next_DVV):
    # The left eigenvector of the eigenvalue 1.
    values, vectors = np.linalg.eig(following.T)
    vector = vectors[:, np.argmin(np.abs(values - 1))].real
    assert np.allclose(chance, vector / vector.sum(), atol=1e-9)


def test_shared_symbols_are_nested():
  tables = {
    shared: MarkovMixture(shared, 3, 32).next_DVV
    for shared in (0.0, 0.25, 0.75, 1.0)
  }
  alike = {
    shared: (table == table[:1]).all((0, 2)) for shared, table in tables.items()
  }
  assert {shared: sum(flags) for shared, flags in alike.items()} == {
    0.0: 0,
    0.25: 8,
    0.75: 24,
    1.0: 32,
  }
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
  counts = np.zeros((6, 6))
  for text in documents:
    symbols = [ALPHABET.index(letter) for letter in text]
    for pair in itertools.pairwise(symbols):
      counts[pair] += 1
  seen = counts.sum(-1) > 2000
  assert seen.sum() > 3
  share = counts[seen] / counts[seen].sum(-1, keepdims=True)
  assert np.abs(share - mixture.next_DVV[1][seen]).max() < 0.03
