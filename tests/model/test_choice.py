"""Fixed experts of domains and pools of documents, against loops in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model import choice
from edl_jax.model.moe import MoE
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch

CONFIG = ModelConfig(
  vocabulary_size=32,
  num_layers=3,
  width=8,
  num_heads=2,
  num_kv_heads=1,
  head_width=4,
  num_experts=7,
  num_active_experts=2,
  expert_width=4,
)
POOLS = dataclasses.replace(CONFIG, pool_min=2, pool_max=5)
BY_DOMAIN = dataclasses.replace(CONFIG, router="domain")
ROWS, LENGTH = 4, 9


def rows():
  """Three documents a row; the last positions of the last are padding."""
  random = np.random.default_rng(0)
  segments_BT = np.repeat([[1, 1, 1, 2, 2, 2, 2, 3, 3]], ROWS, 0)
  segments_BT[2, 4:] = 2
  segments_BT[3, 7:] = 0
  tokens_BT = random.integers(0, 32, (ROWS, LENGTH), np.int32)
  return Batch(
    tokens_BT=tokens_BT,
    targets_BT=np.roll(tokens_BT, -1, 1),
    segments_BT=segments_BT.astype(np.int32),
    positions_BT=np.broadcast_to(
      np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)
    ),
    weights_BT=(segments_BT > 0).astype(np.float32),
    domain_B=np.array([1, 0, -1, 2], np.int32),
  )


@pytest.mark.parametrize(
  ("num_experts", "num_active", "num_domains", "want"),
  [
    (6, 2, 3, ["01", "23", "45"]),
    # All experts have a domain.
    (7, 2, 3, ["01", "23", "456"]),
    # Too few experts: neighbours share some, and the last turns the corner.
    (5, 2, 4, ["01", "12", "23", "34"]),
    (4, 2, 4, ["01", "12", "23", "30"]),
    (4, 4, 2, ["0123", "0123"]),
    (3, 1, 1, ["012"]),
  ],
)
def test_experts_of_domains(num_experts, num_active, num_domains, want):
  config = ModelConfig(num_experts=num_experts, num_active_experts=num_active)
  kept_DE = choice.domain_experts(config, num_domains)
  got = [set(np.flatnonzero(kept_E)) for kept_E in kept_DE]
  assert got == [set(map(int, text)) for text in want]


def test_rows_without_a_domain_use_all_experts():
  kept_LE, kept_LBE, pool = choice.make_choice(BY_DOMAIN, rows().domain_B, 3)
  assert kept_LE is None and pool is None
  assert kept_LBE.shape == (3, ROWS, 7)
  kept_DE = choice.domain_experts(BY_DOMAIN, 3)
  for kept_BE in kept_LBE:
    np.testing.assert_array_equal(kept_BE[jnp.array([1, 0, 3])], kept_DE)
    assert kept_BE[2].all()


def softmax(logits):
  exp = np.exp(logits - np.max(logits))
  return exp / exp.sum()


def naive_layer(layer, x_BTM, kept_BE, size_BI, segments_BT):
  """Routes token by token in float64; padding tokens choose anything.

  Returns:
    Probabilities of all tokens, and a dictionary of the active experts and
    their gates by row and position of the counted ones.
  """
  router_ME = np.asarray(layer.router_ME[...], np.float64)
  logits_BTE = np.asarray(x_BTM, np.float64) @ router_ME
  logits_BTE = np.where(kept_BE[:, None], logits_BTE, -np.inf)
  probs_BTE = np.array([[softmax(x) for x in row] for row in logits_BTE])
  active = {}
  for b, t in np.argwhere(segments_BT):
    pool = np.flatnonzero(kept_BE[b])
    if size_BI is not None:
      same_T = segments_BT[b] == segments_BT[b, t]
      sums_E = sum(probs_BTE[b, s] for s in np.flatnonzero(same_T))
      pool = np.argsort(-sums_E)[: size_BI[b, segments_BT[b, t]]]
    order = sorted(pool, key=lambda e: -logits_BTE[b, t, e])[:2]
    probs = softmax(logits_BTE[b, t, pool])
    chosen = np.array([probs[list(pool).index(e)] for e in order])
    active[b, t] = order, chosen / chosen.sum()
  return probs_BTE, active


@pytest.mark.parametrize("config", [POOLS, BY_DOMAIN, CONFIG])
def test_router_against_a_naive_one(config):
  layer = MoE(config, jax.random.key(0))
  batch = rows()
  x_BTM = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, 8))
  limits = choice.make_choice(
    config,
    batch.domain_B,
    3,
    pool_size_LBI=choice.draw_pool_sizes(config, batch, jax.random.key(2)),
  )
  of_layer = jax.tree.map(lambda x: x[1], limits)
  logits_BTE, probs_BTE, expert_BTA, gate_BTA = jax.jit(layer.route)(
    x_BTM, batch.weights_BT, batch.segments_BT, of_layer
  )
  kept_BE = np.ones((ROWS, 7), bool)
  if config is BY_DOMAIN:
    kept_BE = np.asarray(of_layer.kept_LBE)
    assert not kept_BE.all()
  want_BTE, active = naive_layer(
    layer, x_BTM, kept_BE, of_layer.pool_size_LBI, batch.segments_BT
  )
  np.testing.assert_allclose(probs_BTE, want_BTE, rtol=1e-5)
  np.testing.assert_allclose(
    jax.nn.softmax(logits_BTE, -1), want_BTE, rtol=1e-5
  )
  for (b, t), (order, gates) in active.items():
    assert expert_BTA[b, t].tolist() == order
    np.testing.assert_allclose(gate_BTA[b, t], gates, rtol=1e-5)
  free = jax.lax.top_k(jnp.asarray(want_BTE), 2)[1]
  is_free = np.all(expert_BTA == free, -1)[batch.segments_BT > 0]
  # The test would not see a pool that leaves out no expert of any token.
  assert is_free.all() == (config is not POOLS)


def test_equal_experts_enter_a_pool_by_index():
  probs_BTE = jnp.full((1, 4, 5), 0.2)
  kept_BTE = choice.document_pools(
    probs_BTE,
    jnp.ones((1, 4)),
    jnp.array([[1, 1, 2, 2]]),
    jnp.array([[1, 3, 2]]),
  )
  assert kept_BTE[0].sum(-1).tolist() == [3, 3, 2, 2]
  assert kept_BTE[0, 0, :3].all() and kept_BTE[0, 3, :2].all()


def test_a_pool_has_no_gradient_and_all_experts_have_one():
  """Losses of the router's probabilities see experts outside the pool."""
  layer, batch = MoE(POOLS, jax.random.key(0)), rows()
  x_BTM = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, 8))
  sizes_BI = jnp.full((ROWS, LENGTH + 1), 2)
  limits = choice.Choice(pool_size_LBI=sizes_BI)

  def of_layer(layer, result):
    out = layer.route(x_BTM, batch.weights_BT, batch.segments_BT, limits)
    return jnp.square(out[result][0, 0]).sum()

  used_E = np.isin(
    np.arange(7),
    layer.route(x_BTM, batch.weights_BT, batch.segments_BT, limits)[2][0, 0],
  )
  of_probs, of_gates = (
    jax.grad(of_layer)(layer, result).router_ME[...] for result in (1, 3)
  )
  assert np.abs(of_probs).min() > 0
  np.testing.assert_array_equal(np.abs(of_gates).max(0) > 0, used_E)


@functools.cache
def sizes(step=0):
  return np.asarray(choice.draw_pool_sizes(POOLS, rows(), jax.random.key(step)))


def test_sizes_of_pools_are_drawn_by_row_document_and_layer():
  size_LBI = sizes()
  assert size_LBI.shape == (3, ROWS, LENGTH + 1)
  assert set(size_LBI.ravel()) == {2, 3, 4, 5}
  for axis in range(3):
    first, second = np.moveaxis(size_LBI, axis, 0)[:2]
    assert (first != second).any()
  assert (sizes(1) != size_LBI).any()
  # In another order, and without some rows: the rows keep their own.
  some = Batch(*(x[[2, 0]] for x in rows()[:-1]))
  np.testing.assert_array_equal(
    choice.draw_pool_sizes(POOLS, some, jax.random.key(0)), size_LBI[:, [2, 0]]
  )


def test_sizes_of_pools_are_uniform():
  batch = rows()
  many = Batch(*(np.repeat(x, 500, 0) for x in batch[:-1]))
  tokens_BT = np.random.default_rng(0).integers(0, 32, many.tokens_BT.shape)
  size_LBI = choice.draw_pool_sizes(
    POOLS, many._replace(tokens_BT=tokens_BT), jax.random.key(0)
  )
  counts = np.bincount(np.ravel(size_LBI), minlength=6)[2:]
  # Each has 15,000 draws, of standard deviation 106.
  assert np.abs(counts - 15_000).max() < 500
  assert choice.draw_pool_sizes(CONFIG, batch, jax.random.key(0)) is None


def test_evaluation_and_inspection_use_no_pool():
  plain = Model(CONFIG, jax.random.key(0))
  pools = Model(POOLS, jax.random.key(0))
  tokens_BT = jnp.asarray(rows().tokens_BT)
  np.testing.assert_array_equal(plain(tokens_BT), pools(tokens_BT))
  for want, got in zip(
    plain.token_routing(tokens_BT), pools.token_routing(tokens_BT), strict=True
  ):
    np.testing.assert_array_equal(want, got)
  size_LBI = jnp.asarray(sizes())
  (free, _), (same, _), (pooled, _) = (
    model.batch_sums(rows(), 3, pool_size_LBI=size)
    for model, size in ((plain, None), (pools, None), (pools, size_LBI))
  )
  assert float(free.nats) == float(same.nats) != float(pooled.nats)


def test_reference_router_needs_labels_and_uses_them():
  model = Model(BY_DOMAIN, jax.random.key(0))
  batch = rows()
  tokens_BT = jnp.asarray(batch.tokens_BT)
  for function in (model, model.token_routing):
    with pytest.raises(ValueError, match="pass domain_B and num_domains"):
      function(tokens_BT)
  _, expert_LBTA = model.token_routing(tokens_BT, batch.domain_B, 3)
  kept_DE = choice.domain_experts(BY_DOMAIN, 3)
  for row, domain in enumerate(batch.domain_B):
    used = set(np.ravel(expert_LBTA[:, row]).tolist())
    if domain >= 0:
      assert used <= set(np.flatnonzero(kept_DE[domain]))
    else:
      assert len(used) > 3
  with pytest.raises(ValueError, match="needs a choice"):
    model.hidden(tokens_BT, *batch[2:5])
  with pytest.raises(ValueError, match="kept_LE cannot leave out"):
    model.batch_sums(batch, 3, kept_LE=jnp.ones((3, 7), bool))
  # Each expert has one domain, and statistics say so.
  sums, _ = model.batch_sums(batch, 3)
  share_LDE = np.asarray(sums.routing.probability_LDE)
  assert (share_LDE[:, ~kept_DE] == 0).all()
  assert np.isfinite(model(tokens_BT, batch.domain_B, 3)).all()
