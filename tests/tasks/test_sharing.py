"""Shared computation gives what one whole forward pass for each text gives."""

import functools
import random

import jax
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig, UserError
from edl_jax.model.transformer import Model
from edl_jax.tasks import sharing
from edl_jax.tasks.sharing import score_sequences

CONFIG = ModelConfig(
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
LENGTH = 96


@functools.cache
def make_model() -> Model:
  model = jax.jit(Model, static_argnums=0)(CONFIG, jax.random.key(0))
  # Larger than at the start of training, so that tokens differ.
  return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 2 else leaf, model)


def make_sequences():
  """Questions behind common examples, others without, and some too long."""
  generator = random.Random(0)

  def some(count):
    return [generator.randrange(48) for _ in range(count)]

  sequences = []
  for examples, questions in ((some(40), 20), (some(50), 17), ([], 5)):
    for _ in range(questions):
      context = [0, *examples, *some(generator.randint(1, 9))]
      for _ in range(4):
        answer = some(generator.randint(1, 6))
        sequences.append((np.array([*context, *answer]), len(context)))
  # Two that the model cannot read whole, and the longest continuation.
  sequences += [(np.array(some(LENGTH + 9)), LENGTH) for _ in range(2)]
  sequences += [(np.array(some(LENGTH + 1)), 1)]
  # Enough continuations of one context for several rows.
  sequences += [(np.array([0, *some(12)]), 1) for _ in range(12)]
  generator.shuffle(sequences)
  return sequences


@functools.cache
def naive():
  """Scores each sequence by itself, in float64 from logits."""
  forward = jax.jit(Model.__call__)
  found = []
  for tokens, first in make_sequences():
    count = len(tokens) - first
    tokens = tokens[-(LENGTH + 1) :]
    padded_BT = np.zeros((1, LENGTH), np.int32)
    padded_BT[0, : len(tokens) - 1] = tokens[:-1]
    logits_TV = np.asarray(forward(make_model(), padded_BT)[0], np.float64)
    logits_TV = logits_TV[: len(tokens) - 1][-count:]
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    picked_T = log_p_TV[np.arange(count), tokens[-count:]]
    is_greedy = (logits_TV.argmax(-1) == tokens[-count:]).all()
    found.append((picked_T.sum(), is_greedy))
  return found


@pytest.mark.parametrize(
  ("axes", "batch_tokens"),
  [({}, 8192), ({"expert": 2, "tensor": 2}, 512), ({"fsdp": 2}, 1)],
)
def test_sums_are_those_of_one_text_at_a_time(axes, batch_tokens):
  mesh_config = MeshConfig(**{"data": 1, **axes})
  size = int(np.prod([*axes.values()], initial=1))
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:size])
  model = make_model()
  placed = jax.device_put(model, sharding.parameter_shardings(model, mesh))
  before = sharing._score._cache_size()
  found = score_sequences(placed, make_sequences(), LENGTH, mesh, batch_tokens)
  assert sharing._score._cache_size() - before <= 4
  wanted = naive()
  assert {greedy for _, greedy in wanted} == {False, True}
  for one, (nats, greedy) in zip(found, wanted, strict=True):
    assert one.log_likelihood == pytest.approx(nats, abs=1e-4)
    assert one.greedy == greedy


def test_what_is_shared_is_computed_once():
  groups = sharing._plan(make_sequences(), LENGTH)
  assert sorted(len(group.stem) for group in groups) == [0, 41, 51]
  by_stem = {len(group.stem): group.rows for group in groups}
  assert (len(by_stem[41]), len(by_stem[51])) == (20, 17)
  assert all(len(row.parts) == 4 for row in by_stem[41])
  # The question once, and all but the last token of each answer.
  for row in by_stem[41]:
    counts = [count for _, count in row.parts]
    assert len(row.targets) == sum(counts)
    assert len(row.tokens) == row.branches.count(0) + sum(counts) - 4
  assert all(len(row) <= LENGTH for rows in by_stem.values() for row in rows)


def test_lengths_need_the_least_padding():
  assert sharing._lengths([3, 16, 17, 70]) == [16, 32, 80]
  sizes = [10] * 9 + [40] * 5 + [50] * 4 + [100] * 3 + [200, 210]
  assert sharing._lengths(sizes) == [16, 64, 112, 224]


def test_wrong_sequences_are_refused():
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  tokens = np.zeros(LENGTH + 2, np.int32)
  with pytest.raises(UserError, match="continuation 1 has 97 tokens"):
    score_sequences(make_model(), [(tokens, 1)], LENGTH, mesh)
  assert score_sequences(make_model(), [], LENGTH, mesh) == []
