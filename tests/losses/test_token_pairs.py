"""Sampled pairs of tokens, against all pairs and loops in NumPy float64."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.divergence_accuracy import exact_jensen_shannon
from edl_jax.losses import token_pairs
from edl_jax.losses.divergence import (
  LN_2,
  sample_token_pairs,
  token_pair_divergence_loss,
  token_pair_sums,
)


def sampled_loss(probs_PE, domain_P, weights_P, key, num_pairs=4096):
  index_I2, counted_I = sample_token_pairs(weights_P, key, num_pairs)
  sums = token_pair_sums(probs_PE[index_I2], domain_P[index_I2], counted_I)
  return token_pair_divergence_loss(sums)


def naive_loss(probs_I2E, domain_I2):
  """Mean JSD of pairs of one domain less that of two, in float64."""
  same, other = [], []
  for (p, q), (j, k) in zip(probs_I2E, domain_I2):
    m = (p + q) / 2
    value = (p @ np.log(p / m) + q @ np.log(q / m)) / 2
    (same if j == k else other).append(value)
  return np.mean(same) - np.mean(other)


def test_many_samples_approach_the_mean_over_all_pairs():
  random = np.random.default_rng(9)
  probs = random.dirichlet(np.ones(4), 7).astype(np.float32)
  domain = np.array([0, 1, 0, 2, 1, 0, 2])
  weights = np.array([1, 1, 0, 1, 1, 1, 0], np.float32)
  same, different = [], []
  for i, j in np.ndindex(7, 7):
    if i != j and weights[i] and weights[j]:
      pair = exact_jensen_shannon(probs[i], probs[j])
      (same if domain[i] == domain[j] else different).append(pair)
  want = np.mean(same) - np.mean(different)

  def loss(probs):
    return sampled_loss(
      probs, jnp.array(domain), weights, jax.random.key(0), 1 << 16
    )

  value, gradient = jax.jit(jax.value_and_grad(loss))(probs)
  # The standard error of the mean is about 0.1 / sqrt(6000).
  assert float(value) == pytest.approx(want, abs=6e-3)
  assert np.array_equal(np.any(gradient, axis=1), weights > 0)


def test_value_and_gradient_against_naive_float64():
  """Of two layers, by the routers' logits, against central differences."""
  random = np.random.default_rng(3)
  logits = random.standard_normal((2, 9, 5))
  domain = np.array([0, 1, 1, 2, 0, 2, 1, 0, 0])
  weights = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1])
  index_I2, counted_I = sample_token_pairs(weights, jax.random.key(4), 30)
  domain_I2 = domain[index_I2]
  assert 0 < (domain_I2[:, 0] == domain_I2[:, 1]).sum() < 30

  def ours(logits):
    probs = jax.nn.softmax(logits)
    return token_pair_divergence_loss(
      token_pair_sums(probs[:, index_I2], domain_I2, counted_I)
    )

  def naive(logits):
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.array([naive_loss(p[index_I2], domain_I2) for p in probs])

  as_float32 = jnp.asarray(logits, jnp.float32)
  np.testing.assert_allclose(ours(as_float32), naive(logits), rtol=1e-5)
  gradient = jax.grad(lambda logits: ours(logits) @ jnp.array([1.0, 2.0]))(
    as_float32
  )
  for index in np.ndindex(logits.shape):
    moved = np.zeros_like(logits)
    moved[index] = 1e-6
    slope = (naive(logits + moved) - naive(logits - moved)) / 2e-6
    assert float(gradient[index]) == pytest.approx(
      slope @ [1, 2], rel=1e-4, abs=1e-7
    )


few_tokens = jax.jit(jax.value_and_grad(sampled_loss))


@pytest.mark.parametrize(
  ("domain", "sign"),
  [([4, 0, 4], 1), ([4, 4, 5], -1)],
)
def test_pairs_of_one_kind_only(domain, sign):
  """Two tokens: every sample is that pair, and never a token with itself."""
  value, gradient = few_tokens(
    jnp.eye(3), jnp.array(domain), jnp.array([1, 0, 1]), jax.random.key(1)
  )
  assert float(value) == pytest.approx(sign * LN_2, rel=1e-5)
  assert np.array_equal(np.any(gradient, axis=1), [True, False, True])


@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 1, 0], [0, 0, 1]])
def test_fewer_than_two_tokens_is_exactly_zero(weights):
  value, gradient = few_tokens(
    jnp.eye(3), jnp.arange(3), jnp.array(weights), jax.random.key(2)
  )
  assert float(value) == 0
  assert not np.any(gradient)


def random_rows():
  """Tokens, weights and domains of rows; one is padding, one has no domain."""
  random = np.random.default_rng(7)
  tokens_BT = random.integers(0, 50, (8, 6), np.int32)
  weights_BT = (random.random((8, 6)) < 0.8).astype(np.float32)
  weights_BT[2] = 0
  domain_B = np.array([0, 1, 2, 0, -1, 1, 2, 0], np.int32)
  return tokens_BT, weights_BT, domain_B


def test_pairs_are_of_two_counted_tokens_with_a_domain():
  tokens_BT, weights_BT, domain_B = random_rows()
  pairs = token_pairs.sample(
    tokens_BT, weights_BT, domain_B, jax.random.key(0), 20_000
  )
  assert np.all(pairs.counted_I)
  tokens = np.stack([pairs.row_I2, pairs.position_I2], -1)
  assert not np.any(np.all(tokens[:, 0] == tokens[:, 1], -1))
  np.testing.assert_array_equal(pairs.domain_I2, domain_B[pairs.row_I2])
  # Every token that counts, about equally often, and no other.
  count = collections.Counter(map(tuple, tokens.reshape(-1, 2)))
  counted_BT = (weights_BT > 0) & (domain_B >= 0)[:, None]
  assert sorted(count) == sorted(map(tuple, np.argwhere(counted_BT)))
  expected = 40_000 / counted_BT.sum()
  deviations = [abs(n - expected) / expected**0.5 for n in count.values()]
  assert max(deviations) < 4


def contents(pairs, tokens_BT):
  """What a model makes of pairs: their tokens' rows, positions and domains."""
  rows = np.asarray(tokens_BT)[np.asarray(pairs.row_I2)]
  return rows, np.asarray(pairs.position_I2), np.asarray(pairs.domain_I2)


def test_order_of_rows_and_padding_rows_change_no_pair():
  rows = random_rows()
  key = jax.random.key(5)
  want = contents(token_pairs.sample(*rows, key, 100), rows[0])
  order = np.random.default_rng(1).permutation(8)
  padding = (np.zeros((3, 6)), np.zeros((3, 6)), np.full(3, 1))
  for changed in (
    tuple(array[order] for array in rows),
    tuple(
      np.concatenate([array[:5], more.astype(array.dtype), array[5:]])
      for array, more in zip(rows, padding)
    ),
  ):
    got = contents(token_pairs.sample(*changed, key, 100), changed[0])
    for ours, theirs in zip(got, want):
      np.testing.assert_array_equal(ours, theirs)
  # The key, however, changes them.
  other = token_pairs.sample(*rows, jax.random.key(6), 100)
  assert not np.array_equal(contents(other, rows[0])[1], want[1])


def test_probabilities_are_those_of_the_sampled_tokens():
  rows = random_rows()
  pairs = token_pairs.sample(*rows, jax.random.key(0), 50)
  probs_BTE = np.random.default_rng(0).random((8, 6, 3), np.float32)
  got = token_pairs.local_probabilities(jnp.array(probs_BTE), pairs)
  np.testing.assert_array_equal(got, probs_BTE[pairs.row_I2, pairs.position_I2])
