"""Selection against naive routing, token by token in NumPy float64."""

import functools
import itertools

import jax
import numpy as np
import pytest

from edl_jax.analysis.carve import selection
from edl_jax.config import ModelConfig
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch
from tests.model import naive_model

CONFIG = ModelConfig(
  vocabulary_size=31,
  num_layers=4,
  num_dense_layers=1,
  dense_width=8,
  width=12,
  num_heads=2,
  num_kv_heads=1,
  head_width=6,
  num_experts=5,
  num_active_experts=2,
  expert_width=7,
)
LAYERS, LENGTH = 3, 8


@functools.cache
def model():
  start = Model(CONFIG, jax.random.key(0))
  # Layers depend on those below them only if these add something.
  return jax.tree.map(lambda x: 3 * x, start)


@functools.cache
def batches(domain):
  """Two batches of one domain; the last row is padding."""
  random = np.random.default_rng(domain)
  made = []
  for _ in range(2):
    tokens_BT = random.integers(0, 31, (3, LENGTH)).astype(np.int32)
    ones_BT = np.ones_like(tokens_BT)
    ones_BT[-1] = 0
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    made.append(
      Batch(
        tokens_BT,
        tokens_BT,
        ones_BT,
        positions_BT,
        ones_BT.astype(np.float32),
        np.full(3, domain, np.int32),
      )
    )
  return made


def naive_shares(domain, kept_LE, score):
  routed: list[naive_model.Routed] = []
  for batch in batches(domain):
    for tokens_T in batch.tokens_BT[:-1]:
      naive_model.logits(model(), tokens_T, kept_LE, routed)
  total_LE = np.zeros((LAYERS, CONFIG.num_experts))
  for token in routed:
    if score == "probability":
      total_LE[token.layer] += token.probabilities
      continue
    for expert, gate, y in zip(token.experts, token.gates, token.outputs):
      by = 1 if score == "assignments" else gate * np.linalg.norm(y)
      total_LE[token.layer, expert] += by
  return total_LE / total_LE.sum(1, keepdims=True)


@functools.cache
def selector(score, greedy):
  return selection.Selector(
    selection.make_score_step(score),
    model(),
    {domain: batches(domain) for domain in (0, 1)},
    greedy=greedy,
  )


@pytest.mark.parametrize("score", selection.SCORES)
def test_scores_are_those_of_a_naive_router(score):
  kept_LE = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1] * 5], bool)
  for mask_LE in (np.ones_like(kept_LE), kept_LE):
    want = [naive_shares(domain, mask_LE, score) for domain in (0, 1)]
    got = selector(score, False).shares([0, 1], mask_LE)
    np.testing.assert_allclose(got, np.mean(want, 0), rtol=1e-4, atol=1e-6)


def largest(score_E, keep):
  """The subset of `keep` experts whose scores add up to most, by trying all."""
  subsets = itertools.combinations(range(len(score_E)), keep)
  return max(subsets, key=lambda subset: sum(score_E[e] for e in subset))


@pytest.mark.parametrize("domains", [(0,), (0, 1)])
@pytest.mark.parametrize("score", selection.SCORES)
def test_greedy_is_that_of_brute_force(score, domains):
  for keep in (2, 3):
    kept_LE = np.ones((LAYERS, CONFIG.num_experts), bool)
    for layer in range(LAYERS):
      shares = [naive_shares(d, kept_LE, score) for d in domains]
      best = largest(np.mean(shares, 0)[layer], keep)
      kept_LE[layer] = np.isin(np.arange(CONFIG.num_experts), best)
    got = selector(score, True).select(domains, keep)
    np.testing.assert_array_equal(got, kept_LE)


def test_without_greedy_layers_are_scored_in_the_whole_model():
  whole_LE = np.ones((LAYERS, CONFIG.num_experts), bool)
  share_LE = naive_shares(1, whole_LE, "assignments")
  got = selector("assignments", False).select([1], 2)
  for layer, kept_E in enumerate(got):
    assert tuple(np.flatnonzero(kept_E)) == largest(share_LE[layer], 2)
  # Greedy choices differ somewhere, so that the tests tell the two apart.
  assert any(
    not np.array_equal(*(selector(s, g).select([d], keep) for g in (0, 1)))
    for s, d, keep in itertools.product(selection.SCORES, (0, 1), (2, 3))
  )


def test_of_equal_scores_the_lower_number_is_kept():
  kept_LE = selection.most(np.array([[1.0, 2, 1, 2], [0, 0, 0, 1]]), 3)
  assert selection.expert_numbers(kept_LE) == [[0, 1, 3], [0, 1, 3]]


def test_random_experts_are_uniform_and_the_same_again():
  draws = [selection.random_experts((6, 4), 2, draw) for draw in range(400)]
  np.testing.assert_array_equal(
    draws[7], selection.random_experts((6, 4), 2, 7)
  )
  assert {int(kept_E.sum()) for kept_LE in draws for kept_E in kept_LE} == {2}
  # A share of 2400 draws of one half has a standard deviation of 0.01.
  assert np.mean(draws, (0, 1)) == pytest.approx(0.5, abs=0.05)


def test_unknown_score_raises():
  with pytest.raises(ValueError, match="'uses': must be one of assignments"):
    selection.make_score_step("uses")
