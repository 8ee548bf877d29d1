"""Log-likelihoods equal those of one full forward pass at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from edl_jax import sharding
from edl_jax.config import MeshConfig, UserError
from edl_jax.tasks.scoring import (
  _halved,
  check_scoring,
  encode_pair,
  encode_pairs,
  score,
  score_windows,
  windows_of,
)
from edl_jax.text.tokenizer import (
  Tokenizer,
  byte_tokenizer,
  train_tokenizer,
)
from tests.tasks.naive import (
  CONFIG,
  LENGTH,
  log_likelihood,
  make_model,
  nats_of,
  router_probabilities,
  tokens_of,
)

PAIRS = [
  ("2 + 2 =", " 4"),
  ("", "empty context"),
  ("which? A: ", "this"),
  ("a context that is too long for the model to read it all", " yes"),
  ("a", "b" * LENGTH),
  ("éé", "üüü"),
]


def one_device():
  return sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.mark.parametrize(
  ("axes", "batch_tokens"),
  [({}, 8192), ({}, 1), ({"data": 2, "sequence": 2}, 64), ({"tensor": 2}, 64)],
)
def test_scores_equal_one_pass_at_a_time(axes, batch_tokens):
  mesh_config = MeshConfig(**{"data": 1, **axes})
  size = int(np.prod([*axes.values()], initial=1))
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
  placed = jax.device_put(
    make_model(), sharding.parameter_shardings(make_model(), mesh)
  )
  scores = score(
    placed, byte_tokenizer(), PAIRS[::-1], LENGTH, mesh, batch_tokens
  )[::-1]
  for pair, found in zip(PAIRS, scores, strict=True):
    tokens, scored = tokens_of(*pair)
    assert found.log_likelihood == pytest.approx(
      log_likelihood(*pair), abs=1e-4
    )
    assert found.tokens == scored
    assert found.truncated == (len(tokens) - 1 > LENGTH)


def test_a_continuation_that_is_too_long_is_scored_in_pieces():
  text = "abcdefghijklmnopqrstuvwxyz"
  (found,) = score(
    make_model(), byte_tokenizer(), [("01", text)], LENGTH, one_device()
  )
  # Pieces of half the length, each after what still fits before it.
  whole = "01" + text
  pieces = [(0, 2, 10), (1, 10, 18), (9, 18, 26), (11, 26, 28)]
  nats = 0.0
  for start, first, end in pieces:
    tokens = [256, *whole.encode()][start + (start > 0) : end + 1]
    assert len(tokens) <= LENGTH + 1
    nats += nats_of(tokens, end - first)
  assert found.log_likelihood == pytest.approx(nats, abs=1e-4)
  assert (found.tokens, found.truncated) == (26, True)


def test_windows_score_each_token_once():
  tokens = np.arange(40, dtype=np.int32)
  for first in (1, 5, 30, 39):
    for max_length in (1, 2, 7, 16, 39, 64):
      windows = windows_of(tokens, first, max_length)
      scored = [t for w in windows for t in w.tokens[w.first :]]
      assert scored == list(range(first, 40))
      for window in windows:
        assert len(window.tokens) <= max_length + 1
        assert window.first >= 1
        assert window.truncated == (window.tokens[0] > 0)


def test_routing_is_summed_by_label():
  rows = [
    windows_of(*encode_pair(byte_tokenizer(), *pair), LENGTH)[0]
    for pair in PAIRS
  ]
  labels = [1, -1, 0, 1, -1, 1]
  _, routing = score_windows(
    make_model(), rows, labels, 3, LENGTH, one_device(), 40
  )
  assert routing.sequences_LD.tolist() == [[1, 3, 0]]
  for label in (0, 1):
    texts = [PAIRS[i] for i in range(len(PAIRS)) if labels[i] == label]
    np.testing.assert_allclose(
      routing.probability_LDE[:, label],
      sum(router_probabilities(*text) for text in texts),
      atol=1e-5,
    )
    tokens = sum(min(LENGTH, len(tokens_of(*text)[0]) - 1) for text in texts)
    assert routing.assignments_LDE[0, label].sum() == 2 * tokens
  assert not routing.assignments_LDE[:, 2].any()


def test_white_space_moves_to_the_continuation():
  tokenizer = train_tokenizer(["one two three " * 50], 300)
  tokens, first = encode_pair(tokenizer, "one ", "two")
  assert tokens[0] == tokenizer.document_start_id
  assert tokenizer.decode(tokens[first:]) == " two"


def test_texts_that_cannot_be_encoded_are_named():
  with pytest.raises(UserError, match="continuation 2 is empty"):
    encode_pairs(byte_tokenizer(), [("a", "b"), ("a", "")])
  # A tokenizer that lowers letters, as some of other projects do.
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
  library.normalizer = tokenizers.normalizers.Lowercase()
  with pytest.raises(UserError, match=r"of q: .* cannot encode 'Good'"):
    encode_pairs(Tokenizer(library), [("so ", "Good")], "of q".format)


def test_models_that_cannot_score_are_refused():
  mesh = sharding.make_mesh(MeshConfig(data=1, sequence=2), jax.devices()[:2])
  tokenizer = byte_tokenizer()
  check_scoring(CONFIG, tokenizer, LENGTH, mesh)
  with pytest.raises(UserError, match=r"max_length=15.* mesh.sequence=2"):
    check_scoring(CONFIG, tokenizer, 15, mesh)
  small = dataclasses.replace(CONFIG, vocabulary_size=256)
  with pytest.raises(UserError, match=r"257 tokens.*vocabulary_size=256"):
    check_scoring(small, tokenizer, LENGTH, mesh)
  by_domain = dataclasses.replace(CONFIG, router="domain")
  with pytest.raises(UserError, match="router=domain"):
    check_scoring(by_domain, tokenizer, LENGTH, mesh)


def test_batches_become_smaller_without_memory():
  mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(jnp.zeros((1 << 50,), jnp.int8))
  error = caught.value
  # Four rows on each device, then two, then one.
  assert _halved(error, 16, 8 * 16 + 5, mesh) == 4 * 16
  assert _halved(error, 16, 4 * 16, mesh) == 2 * 16
  with pytest.raises(UserError, match="one row of 16 tokens on a device"):
    _halved(error, 16, 2 * 16, mesh)
  other = jax.errors.JaxRuntimeError("INTERNAL: another error")
  with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
    _halved(other, 16, 8 * 16, mesh)
