"""Muon, matrix by matrix, against NumPy float64; and on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from edl_jax import muon, sharding
from edl_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from edl_jax.model.transformer import abstract_model
from edl_jax.optim import make_optimizer
from edl_jax.sharding import last_name, path_name

CONFIG = ModelConfig(
  vocabulary_size=24,
  num_layers=3,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  num_experts=8,
  num_active_experts=2,
  expert_width=8,
  num_shared_experts=1,
  num_dense_layers=1,
  dense_width=12,
)
# Where the axes of one matrix are, behind the axes that number matrices: a
# second source beside the rules, written down from the layers' einsums.
MATRICES = {
  "router_ME": [(slice(None), slice(None))],
  "query_MNH": "merge last two",
  "key_MKH": "merge last two",
  "value_MKH": "merge last two",
  "out_NHM": "merge first two",
  "gate_up_EM2F": "experts and halves",
  "down_EFM": "experts",
  "gate_up_M2F": "halves",
  "down_FM": [(slice(None), slice(None))],
}


def matrices(name, x):
  """Yields views of the matrices of one layer's parameter, as (R, C)."""
  match MATRICES[name]:
    case "merge last two":
      yield x.reshape(len(x), -1)
    case "merge first two":
      yield x.reshape(-1, x.shape[-1])
    case "experts and halves":
      for expert in x:
        yield from (expert[:, 0], expert[:, 1])
    case "experts":
      yield from x
    case "halves":
      yield from (x[:, 0], x[:, 1])
    case _:
      yield x


def newton_schulz(matrix):
  a, b, c = 3.4445, -4.7750, 2.0315
  x = matrix / np.linalg.norm(matrix)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + b * gram @ x + c * gram @ gram @ x
  return x


@functools.cache
def gradients():
  """Random gradients of all parameters at three steps, float64, by name."""
  random = np.random.default_rng(0)
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(CONFIG))
  return [
    {
      path_name(path): random.standard_normal(leaf.shape)
      for path, leaf in leaves
    }
    for _ in range(3)
  ]


def as_model(values):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(values[path_name(path)], jnp.float32),
    abstract_model(CONFIG),
  )


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


SETTINGS = OptimizerConfig(
  algorithm="muon",
  learning_rate=0.05,
  warmup_steps=0,
  schedule="wsd",
  decay_fraction=0.0,
  weight_decay=0.3,
  muon_momentum=0.9,
  clip_norm=1e9,
)


def test_steps_against_numpy_float64_matrix_by_matrix():
  optimizer = make_optimizer(SETTINGS, 100)
  start = {name: x + 0.1 for name, x in gradients()[2].items()}
  model = as_model(start)
  state = optimizer.init(model)
  want, momentum = dict(start), {name: 0.0 * x for name, x in start.items()}
  update = jax.jit(optimizer.update)
  for gradient in gradients():
    updates, state = update(as_model(gradient), state, model)
    model = optax.apply_updates(model, updates)
    for name, g in gradient.items():
      short = name.rpartition("/")[2]
      if short not in MATRICES:
        continue
      momentum[name] = 0.9 * momentum[name] + 0.1 * g
      ahead = 0.9 * momentum[name] + 0.1 * g
      for layer in ahead:
        for matrix in matrices(short, layer):
          made = newton_schulz(matrix)
          matrix[...] = 0.2 * np.sqrt(max(made.shape)) * made
      want[name] = want[name] - 0.05 * (ahead + 0.3 * want[name])
  got, checked = by_name(model), 0
  for name, value in want.items():
    if name.rpartition("/")[2] in MATRICES:
      np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5)
      checked += 1
  # Attention of two kinds of layers, router, experts, shared expert and MLP.
  assert checked == 2 * 4 + 1 + 2 + 2 + 2


@pytest.mark.slow
def test_the_rest_follows_adamw():
  muons, adamw = (
    make_optimizer(
      OptimizerConfig(algorithm=name, warmup_steps=0, clip_norm=1e9), 10
    )
    for name in ("muon", "adamw")
  )
  model = as_model(gradients()[2])
  results = []
  for optimizer in (muons, adamw):
    state, now = optimizer.init(model), model
    for gradient in gradients():
      updates, state = optimizer.update(as_model(gradient), state, now)
      now = optax.apply_updates(now, updates)
    results.append(by_name(now))
  same = {
    name
    for name in results[0]
    if np.array_equal(results[0][name], results[1][name])
  }
  others = {
    name for name in results[0] if name.rpartition("/")[2] not in MATRICES
  }
  assert same == others
  assert {"embedding_VM", "head_MV", "final_norm/scale"} <= others


def test_singular_values_come_near_one():
  random = np.random.default_rng(1)
  x = random.standard_normal((3, 2, 20, 9)).astype(np.float32)
  values = np.linalg.svd(np.asarray(muon.orthogonalized(x)), compute_uv=False)
  assert values.min() > 0.6 and values.max() < 1.3
  zero = muon.orthogonalized(jnp.zeros((2, 4, 4)))
  assert not np.any(zero)


def test_experts_stay_on_their_devices():
  """No device sends its experts' matrices to orthogonalise them."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 8, 1), jax.devices()[:8])
  placed = NamedSharding(mesh, PartitionSpec(None, "expert"))
  path = (jax.tree_util.DictKey("gate_up_EM2F"),)
  assert last_name(path) == "gate_up_EM2F"
  x = np.random.default_rng(2).standard_normal((2, 16, 12, 2, 8), np.float32)
  compiled = (
    jax.jit(
      functools.partial(muon.direction, path),
      in_shardings=placed,
      out_shardings=placed,
    )
    .lower(jax.ShapeDtypeStruct(x.shape, x.dtype))
    .compile()
  )
  sent = re.findall(
    r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text()
  )
  assert not sent
  got = compiled(jax.device_put(x, placed))
  np.testing.assert_allclose(got, muon.direction(path, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh_sizes", [(1, 2, 2, 2)])
def test_same_update_on_a_mesh(mesh_sizes):
  mesh = sharding.make_mesh(MeshConfig(*mesh_sizes), jax.devices()[:8])
  optimizer = make_optimizer(SETTINGS, 100)
  model, gradient = as_model(gradients()[1]), as_model(gradients()[0])
  update = jax.jit(optimizer.update)
  want, _ = update(gradient, optimizer.init(model), model)
  placed = sharding.parameter_shardings(model, mesh)
  model, gradient = (jax.device_put(x, placed) for x in (model, gradient))
  got, _ = update(gradient, optimizer.init(model), model)
  for name, value in by_name(want).items():
    np.testing.assert_allclose(by_name(got)[name], value, rtol=1e-4, atol=1e-6)
