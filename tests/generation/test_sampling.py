"""Draws against a float64 form of temperature, top-k and top-p."""

import jax
import numpy as np
import pytest

from edl_jax.generation.sampling import draw, sample_keys
from edl_jax.generation.settings import Sampling

DRAWS = 20_000


def naive_probabilities(logits_V, temperature, top_k, top_p):
  """Removes tokens one at a time, in float64."""
  logits = np.asarray(logits_V, np.float64) / temperature
  ranked = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
  if top_k:
    ranked = ranked[:top_k]
  weights = {v: np.exp(logits[v] - logits.max()) for v in ranked}
  total, kept, mass = sum(weights.values()), [], 0.0
  for v in ranked:
    if mass / total >= top_p:
      break
    kept.append(v)
    mass += weights[v]
  probabilities = np.zeros(len(logits))
  for v in kept:
    probabilities[v] = weights[v] / mass
  return probabilities


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (1.5, 4, 1.0),
    (1.0, 0, 0.7),
    (0.8, 6, 0.9),
    (1.0, 0, 1e-6),
  ],
)
def test_frequencies_are_the_probabilities(temperature, top_k, top_p):
  logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32)
  want_V = naive_probabilities(logits_V, temperature, top_k, top_p)
  token_B = jax.jit(draw, static_argnums=3)(
    np.tile(logits_V, (DRAWS, 1)),
    sample_keys(0, np.arange(DRAWS)),
    0,
    Sampling(temperature, top_k, top_p),
  )
  count_V = np.bincount(np.asarray(token_B), minlength=12)
  assert not count_V[want_V == 0].any()
  deviation_V = np.sqrt(want_V * (1 - want_V) / DRAWS)
  assert (np.abs(count_V / DRAWS - want_V) <= 4.5 * deviation_V).all()


def test_of_equal_tokens_the_first_stay():
  logits_BV = np.zeros((200, 5), np.float32)
  keys_B = sample_keys(1, np.arange(200))
  token_B = draw(logits_BV, keys_B, 0, Sampling(1.0, top_k=2))
  assert set(np.asarray(token_B).tolist()) == {0, 1}


def test_zero_temperature_takes_the_likeliest():
  logits_BV = np.array([[0, 2, 1], [3, 0, 3]], np.float32)
  token_B = draw(logits_BV, sample_keys(0, np.arange(2)), 0, Sampling())
  assert token_B.tolist() == [1, 0]


def test_draws_differ_by_step_and_sample_alone():
  logits_BV = np.zeros((6, 1000), np.float32)
  keys_B = sample_keys(0, np.arange(6))
  first, second = (
    np.asarray(draw(logits_BV, keys_B, step, Sampling(1.0))) for step in (0, 1)
  )
  assert len(set(first.tolist() + second.tolist())) > 9
  alone = draw(logits_BV[:1], sample_keys(0, np.array([4])), 1, Sampling(1.0))
  assert int(alone[0]) == second[4]
