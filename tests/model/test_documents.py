"""Whole documents on a mesh, against one device."""

import jax
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig
from edl_jax.model.documents import mesh_of
from edl_jax.model.transformer import Model

ROWS, LENGTH, VOCABULARY = 3, 13, 32
MESHES = (
  dict(data=2, fsdp=2, expert=2, tensor=1, sequence=1),
  dict(data=1, fsdp=2, expert=1, tensor=2, sequence=2),
)


def make_model(**settings):
  config = ModelConfig(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=2,
    head_width=8,
    num_experts=4,
    expert_width=16,
    **settings,
  )
  return Model(config, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens_BT():
  random = np.random.default_rng(0)
  return random.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32)


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_that_divides_neither_rows_nor_tokens(axes, tokens_BT):
  model = make_model()
  want_BTV = jax.jit(Model.__call__)(model, tokens_BT)
  probs_LBTE, expert_LBTA = jax.jit(Model.token_routing)(model, tokens_BT)
  mesh = sharding.make_mesh(MeshConfig(**axes))
  spread = jax.device_put(model, sharding.parameter_shardings(model, mesh))
  assert mesh_of(spread) == mesh and mesh_of(model) is None

  def check(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  with jax.set_mesh(mesh):
    check(jax.jit(Model.__call__)(spread, tokens_BT), want_BTV)
    got_LBTE, got_LBTA = jax.jit(Model.token_routing)(spread, tokens_BT)
  check(got_LBTE, probs_LBTE)
  np.testing.assert_array_equal(got_LBTA, expert_LBTA)
  # Without a mesh in use, that of the parameters counts.
  check(jax.jit(lambda tokens_BT: spread(tokens_BT))(tokens_BT), want_BTV)


def test_domains_of_rows_that_a_mesh_does_not_divide(tokens_BT):
  model = make_model(router="domain")
  domain_B = np.array([1, -1, 0])
  call = jax.jit(Model.__call__, static_argnums=3)
  mesh = sharding.make_mesh(MeshConfig(**MESHES[0]))
  spread = jax.device_put(model, sharding.parameter_shardings(model, mesh))
  with jax.set_mesh(mesh):
    got_BTV = call(spread, tokens_BT, domain_B, 2)
  want_BTV = call(model, tokens_BT, domain_B, 2)
  np.testing.assert_allclose(got_BTV, want_BTV, rtol=1e-4, atol=1e-5)
