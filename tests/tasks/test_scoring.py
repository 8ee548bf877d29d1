"""Log-likelihoods equal those of one full forward pass at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig, UserError
from edl_jax.model.transformer import Model
from edl_jax.tasks import scoring
from edl_jax.tasks.scoring import check_scoring, score, score_texts
from edl_jax.tasks.windows import windows_of
from edl_jax.text.tokenizer import byte_tokenizer
from tests.tasks.naive import (
  CONFIG,
  LENGTH,
  log_likelihood,
  make_model,
  nats_of,
  tokens_of,
)
from tests.tasks.test_sharing import LONGEST, make_texts

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


# A model of other tokens, for texts that share stems and contexts.
SHARING = ModelConfig(
  vocabulary_size=48,
  num_layers=3,
  num_dense_layers=1,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  num_experts=8,
  num_active_experts=2,
  expert_width=8,
  dense_width=16,
  num_shared_experts=1,
)
NUM_LABELS = 4


@functools.cache
def sharing_model() -> Model:
  model = jax.jit(Model, static_argnums=0)(SHARING, jax.random.key(0))
  # Larger than at the start of training, so that tokens differ.
  return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 2 else leaf, model)


@functools.cache
def texts_and_labels():
  texts = [windows_of(tokens, first, LONGEST) for tokens, first in make_texts()]
  # Several texts of one context have labels; one label has no text.
  labels = [i % NUM_LABELS - 1 for i in range(len(texts))]
  return texts, labels


@functools.cache
def naive():
  """Scores each window by itself, in float64 from logits; sums up routing."""
  forward = jax.jit(
    lambda model, tokens_BT: (model(tokens_BT), model.token_routing(tokens_BT))
  )
  scores, shape = [], (SHARING.num_layers - 1, NUM_LABELS, SHARING.num_experts)
  probability_LDE, assignments_LDE = np.zeros(shape), np.zeros(shape)
  for text, label in zip(*texts_and_labels(), strict=True):
    nats, greedy = 0.0, True
    for tokens, first, _ in text:
      count = len(tokens) - 1
      padded_BT = np.zeros((1, LONGEST), np.int32)
      padded_BT[0, :count] = tokens[:-1]
      logits_BTV, (probs_LBTE, expert_LBTA) = forward(
        sharing_model(), padded_BT
      )
      logits_TV = np.asarray(logits_BTV, np.float64)[0, first - 1 : count]
      log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
      nats += log_p_TV[np.arange(count + 1 - first), tokens[first:]].sum()
      greedy &= (logits_TV.argmax(-1) == tokens[first:]).all()
      if label >= 0:
        probs_LTE = np.asarray(probs_LBTE, np.float64)[:, 0, :count]
        probability_LDE[:, label] += probs_LTE.mean(1)
        for layer, expert_TA in enumerate(expert_LBTA[:, 0, :count]):
          assignments_LDE[layer, label] += np.bincount(
            expert_TA.ravel(), minlength=SHARING.num_experts
          )
    scores.append((nats, greedy))
  return scores, probability_LDE, assignments_LDE


def check(found, routing):
  """Compares what texts share with one text at a time."""
  wanted, probability_LDE, assignments_LDE = naive()
  assert {greedy for _, greedy in wanted} == {False, True}
  for one, (nats, greedy) in zip(found, wanted, strict=True):
    assert one.log_likelihood == pytest.approx(nats, abs=1e-4)
    assert one.greedy == greedy
  np.testing.assert_allclose(
    routing.probability_LDE, probability_LDE, rtol=1e-5
  )
  np.testing.assert_array_equal(routing.assignments_LDE, assignments_LDE)
  texts, labels = texts_and_labels()
  for label in range(NUM_LABELS):
    windows = sum(len(t) for t, of in zip(texts, labels) if of == label)
    assert (routing.sequences_LD[:, label] == windows).all()


@pytest.mark.parametrize(
  ("axes", "batch_tokens"),
  [
    ({}, 8192),
    ({"expert": 2, "tensor": 2}, 512),
    ({"fsdp": 2, "sequence": 2}, 1),
  ],
)
def test_what_texts_share_changes_nothing(axes, batch_tokens):
  mesh_config = MeshConfig(**{"data": 1, **axes})
  size = int(np.prod([*axes.values()], initial=1))
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
  model = sharing_model()
  placed = jax.device_put(model, sharding.parameter_shardings(model, mesh))
  texts, labels = texts_and_labels()
  before = compiled(mesh)
  check(
    *score_texts(placed, texts, LONGEST, mesh, batch_tokens, labels, NUM_LABELS)
  )
  assert compiled(mesh) - before <= 6


def compiled(mesh):
  """Returns the number of shapes that were compiled."""
  programs: Any = scoring._programs(mesh)
  return sum(each._cache_size() for each in programs)


def test_without_texts_there_are_no_scores():
  scores, routing = score_texts(
    *(sharing_model(), [], LONGEST, one_device()), labels=[], num_labels=2
  )
  assert scores == [] and not routing.probability_LDE.any()


def test_models_that_cannot_score_are_refused():
  tokenizer = byte_tokenizer()
  check_scoring(CONFIG, tokenizer)
  small = dataclasses.replace(CONFIG, vocabulary_size=256)
  with pytest.raises(UserError, match=r"257 tokens.*vocabulary_size=256"):
    check_scoring(small, tokenizer)
  by_domain = dataclasses.replace(CONFIG, router="domain")
  with pytest.raises(UserError, match="router=domain"):
    check_scoring(by_domain, tokenizer)


@pytest.fixture(scope="module")
def no_memory():
  """Returns the error of a device without memory."""
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(jnp.zeros((1 << 50,), jnp.int8))
  return caught.value


def with_memory_for(tokens, error, monkeypatch):
  """Lets batches of more than `tokens` tokens fail."""
  real = scoring._programs

  def programs(mesh):
    run_stem, run_rows = real(mesh)

    def limited(model, tokens_BT, *rest):
      if tokens_BT.size > tokens:
        raise error
      return run_rows(model, tokens_BT, *rest)

    return run_stem, limited

  monkeypatch.setattr(scoring, "_programs", programs)


def test_batches_become_smaller_without_memory(no_memory, monkeypatch):
  limit = 2 * LONGEST
  with_memory_for(limit, no_memory, monkeypatch)
  texts, labels = texts_and_labels()
  said = []
  check(
    *score_texts(
      *(sharing_model(), texts, LONGEST, one_device(), 2048),
      *(labels, NUM_LABELS, said.append),
    )
  )
  assert 1 <= len(said) <= 4
  assert said[-1].startswith("out of memory: batches now have ")
  assert int(said[-1].split()[-2]) <= limit


def test_a_row_that_does_not_fit_is_refused(no_memory, monkeypatch):
  texts, _ = texts_and_labels()
  with_memory_for(LONGEST // 2, no_memory, monkeypatch)
  with pytest.raises(UserError, match=f"one row of {LONGEST} tokens on a dev"):
    score_texts(
      *(sharing_model(), texts, LONGEST, one_device(), 512),
      say=lambda _: None,
    )
  other = jax.errors.JaxRuntimeError("INTERNAL: another error")
  with_memory_for(0, other, monkeypatch)
  with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
    score_texts(sharing_model(), texts, LONGEST, one_device())
