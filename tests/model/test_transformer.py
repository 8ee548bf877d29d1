"""The transformer against itself in NumPy float64, written out in loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import (
  Experiment,
  LossesConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
)
from edl_jax.evaluate import make_eval_step
from edl_jax.losses import routing
from edl_jax.model.transformer import (
  Model,
  abstract_model,
  parameter_counts,
  training_flops,
)
from edl_jax.step import learned_names, loss_and_gradient
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer
from tests.model import naive_model

CONFIG = ModelConfig(
  vocabulary_size=31,
  num_layers=3,
  width=12,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  num_experts=5,
  num_active_experts=2,
  expert_width=7,
  num_shared_experts=2,
  num_dense_layers=1,
  dense_width=10,
  rope_theta=100.0,
)
ROWS, LENGTH = 2, 12


@functools.cache
def random_model(config=CONFIG):
  random = np.random.default_rng(0)

  def draw(path, leaf):
    value = random.standard_normal(leaf.shape)
    is_norm = sharding.last_name(path) == "scale"
    return jnp.asarray(1 + 0.2 * value if is_norm else 0.4 * value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_model(config))


def tokens():
  random = np.random.default_rng(1)
  return random.integers(0, CONFIG.vocabulary_size, (ROWS, LENGTH))


@jax.jit
def logits(model, tokens_BT):
  return model(tokens_BT)


@jax.jit
def hidden(model, tokens_BT, segments_BT, positions_BT):
  weights_BT = jnp.ones(tokens_BT.shape, jnp.float32)
  return model.hidden(tokens_BT, segments_BT, positions_BT, weights_BT)[0]


def test_logits_against_naive_float64():
  got = logits(random_model(), tokens())
  assert got.dtype == jnp.float32
  want = [naive_model.logits(random_model(), row) for row in tokens()]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert np.std(want) > 0.1


ROUTERS = [
  {"router_scores": "sigmoid"},
  {"router_scores": "sigmoid", "balancing": "bias", "gate_scale": 2.5},
  {"balancing": "both", "gates": "raw"},
  {"router_softcap": 0.7, "gates": "raw", "gate_scale": 0.5},
]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("settings", ROUTERS, ids=str)
def test_routers_against_naive_float64(settings, kept):
  model = random_model(dataclasses.replace(CONFIG, **settings))
  rows, kept_LE = batch(), KEPT_LE if kept else None
  _, nats_BT = jax.jit(
    lambda model: model.batch_sums(rows, ROWS, kept_LE=kept_LE)
  )(model)
  for row, targets, nats_T in zip(rows.tokens_BT, rows.targets_BT, nats_BT):
    naive = naive_model.logits(model, row, kept_LE)
    for logits_V, target, nats in zip(naive, targets, nats_T):
      want = np.log(np.exp(logits_V).sum()) - logits_V[target]
      assert float(nats) == pytest.approx(want, rel=1e-4, abs=1e-4)


# Two of five experts of one layer are all that may be active.
KEPT_LE = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]], bool)


def test_masked_experts_against_a_naive_router():
  rows = batch()
  sums, nats_BT = jax.jit(
    lambda model, kept_LE: model.batch_sums(
      rows,
      ROWS,
      routing.Summaries(outputs=routing.output_stats),
      kept_LE=kept_LE,
    )
  )(random_model(), KEPT_LE)
  routed: list[naive_model.Routed] = []
  for row, targets, nats_T in zip(rows.tokens_BT, rows.targets_BT, nats_BT):
    naive = naive_model.logits(random_model(), row, KEPT_LE, routed)
    for logits_V, target, nats in zip(naive, targets, nats_T):
      want = np.log(np.exp(logits_V).sum()) - logits_V[target]
      assert float(nats) == pytest.approx(want, rel=1e-4, abs=1e-4)
  load_LE, probability_LE, gated_LE = np.zeros((3, *KEPT_LE.shape))
  for token in routed:
    load_LE[token.layer, token.experts] += 1
    probability_LE[token.layer] += token.probabilities
    for expert, gate, y in zip(token.experts, token.gates, token.outputs):
      gated_LE[token.layer, expert] += gate * np.linalg.norm(y)
  stats = sums.routing
  np.testing.assert_array_equal(stats.assignments_LE, load_LE)
  assert not load_LE[~KEPT_LE].any()
  np.testing.assert_allclose(
    stats.token_probability_LE, probability_LE, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    stats.output_sums().gated_norm_E, gated_LE, rtol=1e-4, atol=1e-6
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums))


def test_keeping_every_expert_changes_nothing():
  def sums(model, kept_LE):
    return model.batch_sums(batch(), ROWS, kept_LE=kept_LE)

  whole = jax.jit(lambda model: sums(model, None))(random_model())
  masked = jax.jit(sums)(random_model(), np.ones_like(KEPT_LE))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    masked,
    whole,
  )


def test_a_position_sees_no_later_token():
  before = logits(random_model(), tokens())
  changed = tokens()
  changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocabulary_size
  after = logits(random_model(), changed)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (np.abs(before - after).max(-1)[:, 7:] > 1e-4).all()


def test_packed_documents_are_as_if_alone():
  lengths = (5, 4, 3)
  segments_BT = np.repeat([1, 2, 3], lengths)[None].repeat(ROWS, 0)
  positions_BT = np.concatenate([np.arange(n) for n in lengths])
  positions_BT = positions_BT[None].repeat(ROWS, 0)
  packed = hidden(random_model(), tokens(), segments_BT, positions_BT)
  start = 0
  for number, length in enumerate(lengths):
    # The document first in its row; what follows it is of no matter.
    alone = np.roll(tokens(), -start, 1)
    got = hidden(
      random_model(),
      alone,
      np.broadcast_to(np.arange(LENGTH) >= length, alone.shape) + 1,
      np.broadcast_to(np.arange(LENGTH), alone.shape),
    )
    np.testing.assert_allclose(
      got[:, :length],
      packed[:, start : start + length],
      rtol=1e-5,
      atol=1e-5,
      err_msg=f"document {number}",
    )
    start += length
  whole = hidden(
    random_model(),
    tokens(),
    np.ones_like(segments_BT),
    np.broadcast_to(np.arange(LENGTH), segments_BT.shape),
  )
  assert np.abs(whole - packed)[:, 5:].max() > 1e-2


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("shared", [0, 2])
def test_parameter_counts(dense, shared):
  config = dataclasses.replace(
    CONFIG, num_dense_layers=dense, num_shared_experts=shared
  )
  c = config
  attention = c.width * c.head_width * 2 * (c.num_heads + c.num_kv_heads)
  attention += 2 * c.head_width + 2 * c.width  # norms
  expert = 3 * c.width * c.expert_width
  moe_layers = c.num_layers - dense
  outside = 2 * c.vocabulary_size * c.width + c.width

  def count(experts):
    per_moe = c.width * c.num_experts + (experts + shared) * expert
    return (
      outside
      + c.num_layers * attention
      + dense * 3 * c.width * c.dense_width
      + moe_layers * per_moe
    )

  total, active = parameter_counts(config)
  assert total == count(c.num_experts)
  # A token looks one row of the embedding up.
  embedding = c.vocabulary_size * c.width
  assert active == count(c.num_active_experts) - embedding
  arrays = jax.tree.leaves(random_model(config))
  assert total == sum(array.size for array in arrays)


def test_training_flops_are_six_a_token_for_each_weight_at_work():
  rows, length = 3, 10
  _, active = parameter_counts(CONFIG)
  norms = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      abstract_model(CONFIG)
    )
    if sharding.last_name(path) == "scale"
  )
  weights = active - norms
  # A query and a key of one head, then a weight and a value.
  pairs = sum(range(1, length + 1)) * CONFIG.num_layers * CONFIG.num_heads
  products = length * weights + pairs * 2 * CONFIG.head_width
  flops = training_flops(CONFIG, rows, length)
  assert sum(flops.values()) == 6 * rows * products


def test_a_frozen_matrix_needs_no_gradient():
  everything = training_flops(CONFIG, 3, 10)
  optimizer = OptimizerConfig(trainable="*attention*,*router_ME,*norm*")
  experiment = Experiment(model=CONFIG, optimizer=optimizer)
  flops = training_flops(CONFIG, 3, 10, learned_names(experiment))
  for part in ("attention", "router"):
    assert flops[part] == everything[part]
  # Forward, and the gradient of what the matrix takes.
  for part in ("experts", "head"):
    assert 6 * flops[part] == 4 * everything[part]


def batch():
  ones = np.ones((ROWS, LENGTH))
  return Batch(
    tokens_BT=tokens(),
    targets_BT=np.roll(tokens(), -1, 1),
    segments_BT=ones.astype(np.int32),
    positions_BT=np.broadcast_to(np.arange(LENGTH), ones.shape),
    weights_BT=ones.astype(np.float32),
    domain_B=np.arange(ROWS),
  )


@pytest.mark.parametrize(
  ("dispatch", "orthogonality"), [("gather", 0.0), ("gather", 1.0), ("ring", 0)]
)
def test_training_evaluation_and_inspection_run_one_model(
  dispatch, orthogonality
):
  """The same tokens meet the same experts, whoever calls the model."""
  config = dataclasses.replace(
    CONFIG,
    vocabulary_size=257,
    num_active_experts=3,
    num_shared_experts=1,
    norm_epsilon=0.1,
    rope_theta=7.0,
  )
  model, rows = random_model(config), batch()
  experiment = Experiment(
    model=config,
    moe=MoEConfig(dispatch=dispatch),
    losses=LossesConfig(orthogonality_weight=orthogonality),
  )
  taxonomy = Taxonomy.from_names(["a", "b"])
  trained, _, _ = jax.jit(
    lambda model: loss_and_gradient(model, rows, experiment, taxonomy)
  )(model)

  evaluated = make_eval_step(ROWS, byte_tokenizer())(model, rows)
  np.testing.assert_allclose(evaluated.nats_D.sum(), trained.nats, rtol=1e-5)
  for name, want in trained.routing._asdict().items():
    # Only training sums up pairs, and outputs in the form that its loss needs.
    if isinstance(want, jax.Array):
      got = getattr(evaluated.routing, name)
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)

  logits_BTV = np.asarray(logits(model, rows.tokens_BT), np.float64)
  chosen_BT1 = np.take_along_axis(logits_BTV, rows.targets_BT[..., None], -1)
  nats = np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT1[..., 0]
  np.testing.assert_allclose(nats.sum(), trained.nats, rtol=1e-5)

  probs_LBTE, expert_LBTA = jax.jit(
    lambda model: model.token_routing(rows.tokens_BT)
  )(model)
  np.testing.assert_allclose(
    probs_LBTE.sum((1, 2)), trained.routing.token_probability_LE, rtol=1e-4
  )
  for expert_BTA, load_E in zip(expert_LBTA, trained.routing.assignments_LE):
    counts_E = np.bincount(np.ravel(expert_BTA), minlength=config.num_experts)
    np.testing.assert_array_equal(counts_E, load_E)


def test_bfloat16_computes_on_float32_parameters():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  model = random_model(config)
  x, rows, _ = jax.eval_shape(
    lambda model, b: model.hidden(
      b.tokens_BT, b.segments_BT, b.positions_BT, b.weights_BT
    ),
    model,
    batch(),
  )
  assert x.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in rows} == {jnp.dtype("float32")}
  gradient = jax.eval_shape(
    jax.grad(lambda model: model.batch_sums(batch(), ROWS)[0].nats), model
  )
  for tree in (abstract_model(config), gradient):
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    assert dtypes == {jnp.dtype("float32")}
  exact = np.asarray(logits(random_model(), tokens()))
  rounded = np.asarray(logits(model, tokens()))
  assert rounded.dtype == np.float32
  # Near, but not equal: routing may flip for a token, so compare the most.
  difference = np.abs(rounded - exact) / exact.std()
  assert 1e-4 < np.median(difference) < 0.05


def test_initialisation_has_its_stated_deviations():
  config = ModelConfig(
    vocabulary_size=512, num_layers=2, width=64, num_experts=4, expert_width=64
  )
  model = jax.jit(
    lambda: Model(config, jax.random.key(0)),
    compiler_options={"xla_backend_optimization_level": 0},
  )()
  # A normal cut at three standard deviations has 0.9866 of its deviation.
  fan_in, residual = 0.9866 / 64**0.5, 1 / 2
  moe, attention = model.blocks.moe, model.blocks.attention
  for parameter, deviation in (
    (model.embedding_VM, 0.02),
    (model.head_MV, fan_in),
    (moe.router_ME, fan_in),
    (moe.gate_up_EM2F, fan_in),
    (moe.down_EFM, fan_in * residual),
    (attention.query_MNH, fan_in),
    (attention.out_NHM, 0.9866 / 128**0.5 * residual),
  ):
    array = np.asarray(parameter[...])
    tolerance = 4 / (2 * array.size) ** 0.5
    assert array.std() == pytest.approx(deviation, rel=tolerance)
    assert abs(array.mean()) < 4 * deviation / array.size**0.5
  # No two layers or experts start alike.
  assert not np.array_equal(moe.down_EFM[0], moe.down_EFM[1])
  assert not np.array_equal(moe.down_EFM[0, 0], moe.down_EFM[0, 1])
