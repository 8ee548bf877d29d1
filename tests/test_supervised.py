"""The loss of packed supervised examples, against NumPy in float64."""

import functools

import jax
import numpy as np
import pytest

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  ModelConfig,
  TrainConfig,
)
from edl_jax.evaluate import make_eval_step
from edl_jax.model.transformer import abstract_model
from edl_jax.step import loss_and_gradient
from edl_jax.text.batch import ExampleRows, stack
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.token_stream import EncodedDocuments
from edl_jax.text.tokenizer import byte_tokenizer

START = 256
LENGTH = 24
TAXONOMY = Taxonomy.from_names(["a", "b"])
EXPERIMENT = Experiment(
  model=ModelConfig(
    vocabulary_size=260,
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    num_experts=4,
    expert_width=16,
  ),
  losses=LossesConfig(divergence_weight=0.1),
  train=TrainConfig(batch_size=4, sequence_length=LENGTH),
  data=DataConfig(tokenizer="byte"),
)


def make_examples(domain):
  rng = np.random.default_rng(domain)
  tokens = [rng.integers(0, 256, size) for size in (3, 10, 6, 11, 9)]
  masks = [np.arange(len(ids)) >= len(ids) // 2 for ids in tokens]
  # A conversation of two turns, and one that goes on after the answer.
  masks[1][:2] = [False, True]
  masks[3][-2:] = False
  return tokens, masks


def rows_of(domain, tokens, masks):
  encoded = EncodedDocuments.from_array(
    np.concatenate(tokens), [*map(len, tokens)], np.concatenate(masks)
  )
  rows = ExampleRows(encoded, LENGTH, START, domain)
  return [rows[i] for i in range(len(rows))]


@functools.cache
def model():
  random = np.random.default_rng(2)
  return jax.tree.map(
    lambda leaf: np.float32(0.3 * random.standard_normal(leaf.shape)),
    abstract_model(EXPERIMENT.model),
  )


@functools.cache
def logits_of(domain):
  """Logits of each example in a row by itself; what follows it has no say."""
  tokens, _ = make_examples(domain)
  inputs_IT = np.zeros((len(tokens), LENGTH), np.int32)
  for row_T, ids in zip(inputs_IT, tokens):
    row_T[: len(ids)] = [START, *ids[:-1]]
  call = jax.jit(lambda model, tokens: model(tokens))
  return np.asarray(call(model(), inputs_IT), np.float64)


def naive_nats(domain, number):
  """Cross-entropy of the counted targets of one example, in float64."""
  targets, counted_T = (each[number] for each in make_examples(domain))
  logits_TV = logits_of(domain)[number, : len(targets)]
  largest_T1 = logits_TV.max(-1, keepdims=True)
  norm_T = np.log(np.exp(logits_TV - largest_T1).sum(-1)) + largest_T1[:, 0]
  nats_T = norm_T - logits_TV[np.arange(len(targets)), targets]
  return float(nats_T[counted_T].sum()), int(counted_T.sum())


@jax.jit
def terms_of(model, batch):
  sums, terms, gradient = loss_and_gradient(model, batch, EXPERIMENT, TAXONOMY)
  return sums, terms, gradient


def test_loss_is_that_of_each_completion_by_itself():
  rows, nats, count = [], np.zeros(2), np.zeros(2)
  for domain in range(2):
    tokens, masks = make_examples(domain)
    rows += rows_of(domain, tokens, masks)
    for number in range(len(tokens)):
      own = naive_nats(domain, number)
      nats[domain] += own[0]
      count[domain] += own[1]
  batch = stack(rows)
  # Several examples share a row.
  assert len(rows) == 4 and batch.segments_BT.max() > 1
  sums, terms, _ = terms_of(model(), batch)
  wanted = nats.sum() / count.sum()
  assert float(terms["lm_loss"]) == pytest.approx(wanted, rel=1e-5)
  assert float(sums.tokens) == count.sum()
  step = make_eval_step(2, byte_tokenizer())
  found = step(model(), batch)
  np.testing.assert_allclose(found.nats_D, nats, rtol=1e-5)
  np.testing.assert_array_equal(found.tokens_D, count)
  np.testing.assert_array_equal(found.bytes_D, count)


def test_routing_is_averaged_over_all_tokens():
  batch = stack(
    [row for d in range(2) for row in rows_of(d, *make_examples(d))]
  )
  sums, terms, gradient = terms_of(model(), batch)
  others, plain, whole = terms_of(
    model(), batch._replace(loss_weights_BT=batch.weights_BT)
  )
  jax.tree.map(np.testing.assert_array_equal, sums.routing, others.routing)
  for name in ("divergence_loss", "balance_loss"):
    assert terms[name] == plain[name]
  assert float(others.tokens) == batch.weights_BT.sum() > float(sums.tokens)
  assert float(terms["lm_loss"]) != float(plain["lm_loss"])
  different = jax.tree.map(lambda x, y: bool((x != y).any()), gradient, whole)
  assert all(jax.tree.leaves(different))


@jax.jit
def nats_of(model, batch):
  return model.batch_sums(batch, 2)[1]


def test_an_example_alters_no_loss_of_its_neighbours():
  tokens, masks = make_examples(0)
  batch = stack(rows_of(0, tokens, masks))
  before_BT = np.asarray(nats_of(model(), batch))
  for number in range(len(tokens)):
    changed = [ids.copy() for ids in tokens]
    changed[number] = (changed[number] + 1) % 256
    other = stack(rows_of(0, changed, masks))
    after_BT = np.asarray(nats_of(model(), other))
    own_BT = np.zeros(before_BT.shape, bool)
    for row in range(len(own_BT)):
      # The segment whose tokens changed.
      at = np.nonzero(batch.tokens_BT[row] != other.tokens_BT[row])[0]
      if len(at):
        own_BT[row] = batch.segments_BT[row] == batch.segments_BT[row][at[0]]
    assert own_BT.any() and not own_BT.all()
    # Experts compute tokens in groups, whose sizes alter the last bits.
    np.testing.assert_allclose(after_BT[~own_BT], before_BT[~own_BT], rtol=1e-5)
    counted_BT = own_BT & (batch.loss_weights_BT > 0)
    assert np.abs(before_BT - after_BT)[counted_BT].max() > 0.1
