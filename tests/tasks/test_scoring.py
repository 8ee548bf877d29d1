"""Log-likelihoods equal those of one full forward pass at a time."""

import jax
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig, UserError
from edl_jax.model.transformer import Model
from edl_jax.tasks.scoring import encode_pair, score
from edl_jax.text.tokenizer import byte_tokenizer, train_tokenizer

CONFIG = ModelConfig(
  vocabulary_size=260,
  num_layers=2,
  width=16,
  num_heads=2,
  head_width=8,
  num_experts=4,
  expert_width=8,
  dtype="float32",
)
LENGTH = 32
PAIRS = [
  ("2 + 2 =", " 4"),
  ("", "empty context"),
  ("Question: which? Answer: ", "this"),
  ("a context that is too long for the model to read it all", " yes"),
  ("a", "b" * LENGTH),
  ("é", "ü"),
]


@pytest.fixture(scope="module")
def model():
  return Model(CONFIG, jax.random.key(0))


def naive(model, context, continuation):
  """Scores bytes with a forward pass of their own, in float64 from logits."""
  body = list((context + continuation).encode())
  scored = len(body) - len(context.rstrip().encode())
  tokens = np.array([256, *body])[-(LENGTH + 1) :]
  logits_TV = np.asarray(model(tokens[None, :-1])[0], np.float64)
  log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  picked_T = log_p_TV[np.arange(len(tokens) - 1), tokens[1:]]
  return picked_T[-scored:].sum(), scored


@pytest.mark.parametrize(
  ("axes", "batch_tokens"),
  [({}, 8192), ({}, 1), ({"data": 2, "sequence": 2}, 64), ({"tensor": 2}, 64)],
)
def test_scores_equal_one_pass_at_a_time(model, axes, batch_tokens):
  mesh_config = MeshConfig(**{"data": 1, **axes})
  size = int(np.prod([*axes.values()], initial=1))
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
  placed = jax.device_put(model, sharding.parameter_shardings(model, mesh))
  scores = score(
    placed, byte_tokenizer(), PAIRS[::-1], LENGTH, mesh, batch_tokens
  )[::-1]
  for pair, found in zip(PAIRS, scores, strict=True):
    nats, tokens = naive(model, *pair)
    assert found.log_likelihood == pytest.approx(nats, abs=1e-4)
    assert found.tokens == tokens
    assert found.truncated == (len("".join(pair).encode()) > LENGTH)


def test_white_space_moves_to_the_continuation():
  tokenizer = train_tokenizer(["one two three " * 50], 300)
  tokens, first = encode_pair(tokenizer, "one ", "two")
  assert tokens[0] == tokenizer.document_start_id
  assert tokenizer.decode(tokens[first:]) == " two"


def test_wrong_continuations_are_refused(model):
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  for text, words in [("", "is empty"), ("x" * (LENGTH + 1), "33 tokens")]:
    with pytest.raises(UserError, match=f"continuation 1.* {words}"):
      score(model, byte_tokenizer(), [("a", text)], LENGTH, mesh)
