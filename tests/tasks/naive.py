"""A small model of bytes, and its likelihoods one text at a time in float64."""

import functools
import math

import jax
import numpy as np

from edl_jax.config import ModelConfig
from edl_jax.model.transformer import Model

CONFIG = ModelConfig(
  # More than the tokenizer's 257, and divisible by meshes.
  vocabulary_size=260,
  num_layers=2,
  num_dense_layers=1,
  dense_width=16,
  width=16,
  num_heads=2,
  head_width=8,
  num_experts=4,
  expert_width=8,
)
# Most tokens that the model reads of a text.
LENGTH = 16


@functools.cache
def make_model() -> Model:
  model = jax.jit(Model, static_argnums=0)(CONFIG, jax.random.key(0))
  # Larger than at the start of training, so that texts differ.
  return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, model)


_logits = jax.jit(Model.__call__)
_routing = jax.jit(Model.token_routing)


@functools.cache
def _forward(tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns log p_TV, and router probabilities p_LTE, both float64.

  One text at a time, padded at its end, which causal attention does not see.
  """
  tokens_BT = np.zeros((1, LENGTH), np.int32)
  tokens_BT[0, : len(tokens)] = tokens
  logits_BTV = _logits(make_model(), tokens_BT)
  probs_LBTE, _ = _routing(make_model(), tokens_BT)
  logits_TV = np.asarray(logits_BTV, np.float64)[0, : len(tokens)]
  probs_LTE = np.asarray(probs_LBTE, np.float64)[:, 0, : len(tokens)]
  return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True)), probs_LTE


def tokens_of(context: str, continuation: str) -> tuple[list[int], int]:
  """Returns a text's tokens and how many of them are scored."""
  body = list((context + continuation).encode())
  return [256, *body], len(body) - len(context.rstrip().encode())


def nats_of(tokens: list[int], scored: int) -> float:
  """Returns the nats of the last `scored` of at most LENGTH + 1 tokens."""
  log_p_TV, _ = _forward(tuple(tokens[:-1]))
  return sum(
    float(log_p_TV[t, tokens[t + 1]])
    for t in range(len(tokens) - 1 - scored, len(tokens) - 1)
  )


def log_likelihood(context: str, continuation: str) -> float:
  """Returns the nats of a continuation of at most LENGTH bytes."""
  tokens, scored = tokens_of(context, continuation)
  return nats_of(tokens[-(LENGTH + 1) :], scored)


def router_probabilities(context: str, continuation: str) -> np.ndarray:
  """Returns the mean over a text's input tokens, (L, E)."""
  tokens = tokens_of(context, continuation)[0][-(LENGTH + 1) :]
  _, probs_LTE = _forward(tuple(tokens[:-1]))
  return probs_LTE.mean(1)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
  """Returns the textbook form, H((p+q)/2) - (H(p) + H(q))/2."""

  def entropy(x) -> float:
    return -sum(v * math.log(v) for v in x if v > 0)

  return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
