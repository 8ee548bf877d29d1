"""A model over its cache computes what it computes on whole documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig
from edl_jax.model.cached import advance, empty_cache, in_compute_dtype
from edl_jax.model.expert_parallel import few_mixed_outputs, mixed_outputs
from edl_jax.model.moe import GATHER
from edl_jax.model.transformer import Model

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


def make_model(**changes) -> Model:
  config = dataclasses.replace(CONFIG, **changes)
  return jax.jit(Model, static_argnums=0)(config, jax.random.key(0))


def logits_by_cache(model, tokens_BT, lengths, slots=16):
  """Prefills prompts of these lengths, then feeds the rest token by token."""
  rows, length = tokens_BT.shape
  step = jax.jit(advance)
  cache = empty_cache(model.config, rows, slots)
  last_B = np.array(lengths) - 1
  widest = max(lengths)
  # What stands behind a shorter prompt must not matter.
  padded_BT = np.where(
    np.arange(widest) <= last_B[:, None], tokens_BT[:, :widest], 7
  )
  positions_BT = np.tile(np.arange(widest), (rows, 1))
  logits_BV, cache, _ = step(model, padded_BT, positions_BT, last_B, cache)
  found = {(b, last_B[b]): logits_BV[b] for b in range(rows)}
  for _ in range(length - widest):
    last_B = last_B + 1
    token_B1 = np.take_along_axis(tokens_BT, last_B[:, None], axis=1)
    logits_BV, cache, _ = step(
      model, token_B1, last_B[:, None], np.zeros_like(last_B), cache
    )
    found |= {(b, last_B[b]): logits_BV[b] for b in range(rows)}
  return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_whole_documents(dtype):
  model = make_model(dtype=dtype)
  tokens_BT = np.asarray(jax.random.randint(jax.random.key(1), (3, 10), 0, 48))
  want_BTV = jax.jit(Model.__call__)(model, tokens_BT)
  found = logits_by_cache(in_compute_dtype(model), tokens_BT, [4, 6, 2])
  assert len(found) == 3 * 5
  for (b, t), logits_V in found.items():
    np.testing.assert_allclose(
      logits_V,
      want_BTV[b, t],
      **(dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(atol=0.03)),
    )


# On each number of devices, fewer routed tokens than its experts, and more: of
# the last, one expert fills several tiles.
@pytest.mark.parametrize(
  ("tokens", "devices"), [(3, 1), (8, 1), (1, 2), (3, 2), (37, 1), (21, 2)]
)
def test_few_tokens_are_dispatched_as_many_are(tokens, devices):
  random = np.random.default_rng(0)
  x_PM = random.normal(size=(tokens * devices, 6)).astype(np.float32)
  scores_PE = random.random((len(x_PM), 16))
  if tokens > 8:
    scores_PE[:, 11] = -1.0
  expert_PA = np.argsort(scores_PE, -1)[:, :2]
  gate_PA = random.random((len(x_PM), 2)).astype(np.float32)
  gate_up_EM2F = random.normal(size=(16, 6, 2, 4)).astype(np.float32)
  down_EFM = random.normal(size=(16, 4, 6)).astype(np.float32)
  arrays = (x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM)
  want_PM = mixed_outputs(*map(jnp.asarray, arrays), GATHER)
  # Layer 1 of 2; layer 0 must not be read.
  arrays = (
    *arrays[:3],
    *(np.stack([np.full_like(x, np.nan), x]) for x in arrays[3:]),
  )
  mesh = sharding.make_mesh(
    MeshConfig(data=1, fsdp=1, expert=devices), jax.devices()[:devices]
  )
  row, stack = (PartitionSpec(*x) for x in (["expert"], [None, "expert"]))
  with jax.set_mesh(mesh):
    few = sharding.per_shard(
      functools.partial(few_mixed_outputs, layer=1),
      (row, row, row, stack, stack),
      row,
    )
    y_PM = jax.jit(few)(*arrays)
  np.testing.assert_allclose(y_PM, want_PM, rtol=1e-5, atol=1e-5)


def test_parameters_in_the_compute_dtype():
  model = in_compute_dtype(make_model(dtype="bfloat16"))
  dtypes = {
    sharding.last_name(path): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(model)
  }
  assert dtypes.pop("router_ME") == dtypes.pop("scale") == jnp.float32
  assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
