"""Evaluation against loops over tokens in NumPy float64."""

import math

import jax
import numpy as np
import pytest

from edl_jax import evaluate as module
from edl_jax.config import Experiment, MeshConfig, ModelConfig
from edl_jax.evaluate import (
  EvalSums,
  Evaluation,
  NonFiniteError,
  evaluate,
  make_eval_step,
  sum_on_host,
)
from edl_jax.losses import routing
from edl_jax.model.transformer import Model
from edl_jax.sharding import make_mesh
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

CONFIG = ModelConfig(
  vocabulary_size=257,
  num_layers=3,
  num_dense_layers=1,
  dense_width=16,
  width=16,
  num_heads=2,
  num_kv_heads=1,
  head_width=8,
  num_experts=5,
  num_active_experts=2,
  expert_width=16,
)
ROWS, LENGTH = 4, 6
# The third domain has no text.
TAXONOMY = Taxonomy.from_names(["x/a", "x/b", "c", "d"])
DOMAINS = ([0, 1, 1, 3], [3, 0, 0, 3])


def make_batch(seed, domains):
  """Rows of whole documents; the last one ends in padding."""
  random = np.random.default_rng(seed)
  tokens = random.integers(0, 257, (ROWS, LENGTH + 1)).astype(np.int32)
  weights = np.ones((ROWS, LENGTH), np.float32)
  weights[-1, -2:] = 0
  return Batch(
    tokens_BT=tokens[:, :-1],
    targets_BT=tokens[:, 1:],
    segments_BT=weights.astype(np.int32),
    positions_BT=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    weights_BT=weights,
    domain_B=np.array(domains, np.int32),
  )


@pytest.fixture(scope="module")
def model():
  return Model(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
  return [make_batch(seed, domains) for seed, domains in enumerate(DOMAINS)]


# Classes of several tokens.
CLASS_V = (np.arange(257) % 7).astype(np.int32)


def evaluate_on(mesh, model, batches):
  with jax.set_mesh(mesh):
    return evaluate(
      make_eval_step(4, byte_tokenizer(), CLASS_V),
      model,
      batches,
      mesh,
      TAXONOMY,
      Experiment(model=CONFIG),
    )


@pytest.fixture(scope="module")
def evaluation(model, batches):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return evaluate_on(mesh, model, batches)


def counted(model, batches):
  """Yields domain, target, nats and active experts by layer of each token."""
  logits = jax.jit(lambda model, tokens: model(tokens))
  token_routing = jax.jit(lambda model, tokens: model.token_routing(tokens))
  for batch in batches:
    logits_BTV = np.asarray(logits(model, batch.tokens_BT), np.float64)
    _, expert_LBTA = token_routing(model, batch.tokens_BT)
    expert_LBTA = np.asarray(expert_LBTA)
    for b, t in np.argwhere(batch.weights_BT):
      target = batch.targets_BT[b, t]
      row = logits_BTV[b, t]
      nats = math.log(np.exp(row).sum()) - row[target]
      yield batch.domain_B[b], target, nats, expert_LBTA[:, b, t]


def test_losses_are_those_of_every_counted_token(model, batches, evaluation):
  nats, tokens, size = (dict.fromkeys(range(4), 0) for _ in range(3))
  for domain, target, loss, _ in counted(model, batches):
    nats[domain] += loss
    tokens[domain] += 1
    # Token 256, the start of a document, stands for no byte.
    size[domain] += target < 256
  losses = evaluation.losses
  assert list(losses["domains"]) == ["a", "b", "d"]
  for domain, name in ((0, "a"), (1, "b"), (3, "d")):
    figures = losses["domains"][name]
    assert figures["tokens"] == tokens[domain]
    assert figures["bytes"] == size[domain]
    assert figures["lm_loss"] == pytest.approx(
      nats[domain] / tokens[domain], rel=1e-5
    )
    assert figures["bits_per_byte"] == pytest.approx(
      nats[domain] / math.log(2) / size[domain], rel=1e-5
    )
  total = sum(nats.values())
  assert losses["lm_loss"] == pytest.approx(
    total / sum(tokens.values()), rel=1e-5
  )
  assert losses["bits_per_byte"] == pytest.approx(
    total / math.log(2) / sum(size.values()), rel=1e-5
  )


def test_report_has_the_share_of_each_expert(model, batches, evaluation):
  count_LDE = np.zeros((2, 4, 5))
  for domain, _, _, expert_LA in counted(model, batches):
    for layer, active in enumerate(expert_LA):
      count_LDE[layer, domain, active] += 1
  share_LDE = count_LDE / np.maximum(count_LDE.sum(-1, keepdims=True), 1)
  report = evaluation.report
  np.testing.assert_allclose(report["assignments"], share_LDE, rtol=1e-6)
  assert report["domains"] == ["a", "b", "c", "d"]
  # Numbers of the mixture-of-experts layers in the model.
  assert report["layers"] == [1, 2]
  assert np.shape(report["probabilities"]) == (2, 4, 5)
  assert np.shape(report["pairwise_divergence"]) == (2, 4, 4)


def test_routing_figures_are_means_over_layers(evaluation):
  layers = evaluation.routing["layers"]
  assert len(layers) == 2
  names = set(evaluation.routing) - {"layers"}
  assert {"diversity", "inter_fraction", "max_violation"} <= names
  for name in names:
    values = [layer[name] for layer in layers]
    assert evaluation.routing[name] == pytest.approx(np.mean(values))


def entropy(count):
  share = count[count > 0] / count.sum()
  return -(share * np.log(share)).sum()


def test_token_information_is_that_of_every_counted_token(
  model, batches, evaluation
):
  token_routing = jax.jit(lambda model, tokens: model.token_routing(tokens))
  count_LVE = np.zeros((2, 7, 5))
  for batch in batches:
    _, expert_LBTA = token_routing(model, batch.tokens_BT)
    for b, t in np.argwhere(batch.weights_BT):
      for layer, expert_BTA in enumerate(np.asarray(expert_LBTA)):
        count_LVE[layer, batch.tokens_BT[b, t] % 7, expert_BTA[b, t]] += 1
  for count_VE, figures in zip(count_LVE, evaluation.routing["layers"]):
    token, expert = entropy(count_VE.sum(1)), entropy(count_VE.sum(0))
    information = token + expert - entropy(count_VE.reshape(-1))
    assert figures["token_mutual_information"] == pytest.approx(
      information / ((token + expert) / 2), rel=1e-4
    )
    assert information > 0.01


def test_token_information_is_that_of_any_mesh(model, batches, evaluation):
  mesh = make_mesh(MeshConfig(data=2, sequence=2), jax.devices()[:4])
  spread = evaluate_on(mesh, model, batches)
  for one, four in zip(evaluation.routing["layers"], spread.routing["layers"]):
    assert four["token_mutual_information"] == pytest.approx(
      one["token_mutual_information"], rel=1e-5
    )


def test_the_most_frequent_tokens_are_classes(monkeypatch):
  row = make_batch(0, DOMAINS[0])
  tokens_BT = np.array([[5, 5, 5, 9, 9, 2], [7, 7, 7, 7, 1, 3]], np.int32)
  rows = [
    row._replace(tokens_BT=tokens_T, weights_BT=weights_T)
    for tokens_T, weights_T in zip(
      tokens_BT, np.array([[1] * 6, [1, 1, 1, 1, 1, 0]])
    )
  ]
  monkeypatch.setattr(routing, "COUNTED_TOKENS", 3)
  monkeypatch.setattr(
    module, "held_out_rows", lambda *_: [[rows[0]], [rows[1]]]
  )
  model = ModelConfig(vocabulary_size=12)
  class_V = module.token_classes(None, None, Experiment(model=model))
  # By frequency: 7, 5, 9. All others are of one more class.
  assert class_V.tolist() == [3, 3, 3, 3, 3, 1, 3, 0, 3, 2, 3, 3]
  model = ModelConfig(vocabulary_size=3)
  class_V = module.token_classes(None, None, Experiment(model=model))
  assert class_V.tolist() == [0, 1, 2]


def test_metrics_are_named_by_figure_and_domain():
  evaluation = Evaluation(
    losses={
      "lm_loss": 3.0,
      "bits_per_byte": 2.0,
      "domains": {"a": {"lm_loss": 4.0, "bits_per_byte": 1.0, "tokens": 9}},
    },
    routing={"diversity": 0.5, "layers": [{"diversity": 0.5}]},
    report={},
  )
  assert evaluation.metrics() == {
    "eval/lm_loss": 3.0,
    "eval/lm_loss/a": 4.0,
    "eval/bits_per_byte": 2.0,
    "eval/bits_per_byte/a": 1.0,
    "eval/routing/diversity": 0.5,
  }


def test_sums_are_exact_beyond_what_float32_counts():
  # 2**24 + 1 has no float32.
  parts = [float(2**24), 1.0, 1.0, 1.0]
  sums = [
    EvalSums(*(np.full(2, x, np.float32),) * 3, routing=None) for x in parts
  ]
  total = sum_on_host(sums)
  assert total.tokens_D.dtype == np.float64
  assert total.tokens_D.tolist() == [2**24 + 3] * 2
  assert np.float32(2**24) + np.float32(1) == np.float32(2**24)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_no_result(evaluation, bad):
  evaluation.check_finite()
  domains = evaluation.losses["domains"]
  one = {**domains, "a": {**domains["a"], "lm_loss": bad}}
  wrong = evaluation._replace(losses={**evaluation.losses, "domains": one})
  with pytest.raises(NonFiniteError, match=f"lm_loss of 'a' is {bad}"):
    wrong.check_finite()
  wrong = evaluation._replace(losses={**evaluation.losses, "lm_loss": bad})
  with pytest.raises(NonFiniteError, match=f"held-out lm_loss is {bad}"):
    wrong.check_finite()
