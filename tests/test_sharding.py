"""The mesh, and rules that fit every parameter exactly once."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.config import (
  Experiment,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  TrainConfig,
  UserError,
)
from edl_jax.model.transformer import abstract_model

MODELS = [
  ModelConfig(
    num_layers=2,
    num_dense_layers=dense,
    num_shared_experts=shared,
    balancing="both" if dense else "loss",
  )
  for dense in (0, 1)
  for shared in (0, 2)
]
MODELS.append(
  ModelConfig(
    qk_norm="full",
    attention_bias="all",
    num_shared_experts=1,
    shared_expert_gate=True,
    tied_embeddings=True,
  )
)


def names(model):
  leaves, _ = jax.tree_util.tree_flatten_with_path(model)
  return [sharding.path_name(path) for path, _ in leaves]


def test_rules_are_total_both_ways():
  every_name = {
    name for model in MODELS for name in names(abstract_model(model))
  }
  last = {name.rsplit("/")[-1] for name in every_name}
  assert last == sharding.PARAMETER_RULES.keys()


def test_rules_have_an_entry_for_each_axis_letter():
  for name, rule in sharding.PARAMETER_RULES.items():
    if name == "scale":
      continue
    letters = name.rsplit("_")[-1]
    assert len(rule.spec) == len(letters)
    assert (rule.is_expert or rule.is_state) == letters.startswith("E")
    # The size-two axis of gate and up, and heads' width, are never cut.
    assert not any(
      entry for letter, entry in zip(letters, rule.spec) if letter in "2H"
    )
    # Rows are spread over storage axes, so each is gathered before use.
    assert set(sharding.STORAGE_AXES) <= set(rule.gathered)


@pytest.mark.parametrize(
  "dispatch", ["gather", "ragged_all_to_all", "ring", "capacity"]
)
def test_only_gather_brings_experts_to_tokens(dispatch):
  moe = MoEConfig(dispatch=dispatch)
  experts = ("expert", "fsdp") if dispatch == "gather" else ("fsdp",)
  assert sharding.gathered_axes("down_EFM", moe) == experts
  assert sharding.gathered_axes("down_FM", moe) == ("expert", "fsdp")
  assert sharding.gathered_axes("embedding_VM", moe) == (
    "expert",
    "fsdp",
    "tensor",
  )


def test_specs_of_stacked_and_single_parameters():
  model = abstract_model(MODELS[-1])
  specs = sharding.parameter_specs(model)
  leaves = jax.tree.leaves(
    specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
  by_name = dict(zip(names(model), leaves, strict=True))
  assert by_name["embedding_VM"] == PartitionSpec(("tensor", "fsdp"), "expert")
  assert by_name["blocks/moe/gate_up_EM2F"] == PartitionSpec(
    None, "expert", "fsdp", None, "tensor"
  )
  assert by_name["final_norm/scale"] == PartitionSpec(None)
  assert by_name["blocks/attention_norm/scale"] == PartitionSpec(None, None)


def test_parameters_without_a_rule_raise():
  with pytest.raises(ValueError, match="blocks/new_MM has no sharding rule"):
    sharding.parameter_specs({"blocks": {"new_MM": np.zeros((2, 2))}})
  with pytest.raises(ValueError, match=r"embedding_VM.*does not fit"):
    sharding.parameter_specs({"embedding_VM": np.zeros((2,))})


@pytest.mark.parametrize("name", sharding.PARAMETER_RULES)
def test_gather_and_scatter_are_the_whole_and_its_transpose(name):
  """On a mesh that spreads every dimension that a rule spreads."""
  rule = sharding.PARAMETER_RULES[name]
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  spec = PartitionSpec(*rule.spec)
  kept = PartitionSpec(
    *(
      tuple(set(sharding.axes_of(entry)) - set(rule.gathered))
      for entry in rule.spec
    )
  )
  whole = np.random.default_rng(0).standard_normal((16,) * len(rule.spec))
  whole = whole.astype(np.float32)

  def there_and_back(x):
    gathered = sharding.gather(name, x)
    return (
      gathered,
      sharding.scatter(name, gathered),
      jax.vjp(lambda x: sharding.gather(name, x), x)[1](gathered)[0],
    )

  with jax.set_mesh(mesh):
    gathered, scattered, transposed = jax.jit(
      sharding.per_shard(there_and_back, (spec,), (kept, spec, spec))
    )(whole)
  np.testing.assert_array_equal(gathered, whole)
  # Every device that holds the whole adds it once.
  spread = {axis for entry in rule.spec for axis in sharding.axes_of(entry)}
  copies = 2 ** len(spread & set(rule.gathered))
  np.testing.assert_allclose(scattered, copies * whole, rtol=1e-6)
  np.testing.assert_array_equal(transposed, scattered)


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ((-1,), (8, 1, 1, 1, 1)),
    ((1, -1, 1, 2), (1, 4, 1, 2, 1)),
    ((2, 2, 2, -1), (2, 2, 2, 1, 1)),
    ((1, 1, 4, 2), (1, 1, 4, 2, 1)),
    ((1, 1, 2, 2, -1), (1, 1, 2, 2, 2)),
  ],
)
def test_mesh(sizes, shape):
  mesh = sharding.make_mesh(MeshConfig(*sizes))
  assert dict(mesh.shape) == dict(zip(sharding.MESH_AXES, shape, strict=True))


@pytest.mark.parametrize("sizes", [(3, 1, 1, -1), (2, 1, 1, 1), (16, 1, 1, 1)])
def test_mesh_that_does_not_fit_the_devices(sizes):
  with pytest.raises(UserError, match=f"mesh.data={sizes[0]}.* 8 devices"):
    sharding.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
  ("sizes", "model", "named"),
  [
    ((1, 8, 1, 1), {"width": 12}, "mesh.fsdp=8 .* model.width=12"),
    ((1, 1, 8, 1), {"num_experts": 12}, "mesh.expert=8 .*num_experts=12"),
    ((1, 1, 1, 8), {"num_heads": 4}, "mesh.tensor=8 .*num_heads=4"),
    ((4, 1, 1, 2), {"num_kv_heads": 1}, "mesh.tensor=2 .*num_kv_heads=1"),
    ((4, 1, 1, 2), {"expert_width": 3}, "mesh.tensor=2 .*expert_width=3"),
    (
      (4, 1, 1, 2),
      {"vocabulary_size": 4097},
      "vocabulary_size=4097; model.vocabulary_size=4098 fits",
    ),
    (
      (1, 2, 1, 4),
      {"vocabulary_size": 257},
      "mesh.tensor=4 x mesh.fsdp=2 .*model.vocabulary_size=264 fits",
    ),
    (
      (4, 1, 1, 2),
      {"dense_width": 3, "num_dense_layers": 1},
      "model.dense_width=3",
    ),
  ],
)
def test_mesh_that_does_not_divide_the_model(sizes, model, named):
  mesh = sharding.make_mesh(MeshConfig(*sizes))
  sharding.check_divisible(
    Experiment(model=ModelConfig(num_heads=8, num_kv_heads=8)), mesh
  )
  experiment = Experiment(
    model=ModelConfig(**{"num_heads": 8, "num_kv_heads": 8} | model)
  )
  with pytest.raises(UserError, match=named):
    sharding.check_divisible(experiment, mesh)


def test_only_what_is_spread_must_divide():
  """A vocabulary over `tensor` and `fsdp`, but not over `expert`."""
  mesh = sharding.make_mesh(MeshConfig(1, 2, 4, 1))
  model = ModelConfig(vocabulary_size=258)
  sharding.check_divisible(Experiment(model=model), mesh)
  parameters = abstract_model(model)
  for leaf, placed in zip(
    jax.tree.leaves(parameters),
    jax.tree.leaves(sharding.parameter_shardings(parameters, mesh)),
    strict=True,
  ):
    placed.shard_shape(leaf.shape)  # Raises where it does not divide.


def test_mesh_that_does_not_divide_the_rows():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
  train = TrainConfig(batch_size=16, accumulation_steps=2)
  sharding.check_divisible(Experiment(train=train), mesh)
  train = TrainConfig(batch_size=16, accumulation_steps=4)
  with pytest.raises(UserError, match="4 rows do not divide over 8 shards"):
    sharding.check_divisible(Experiment(train=train), mesh)


def test_mesh_that_does_not_divide_the_sequence():
  mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
  train = TrainConfig(batch_size=2, sequence_length=36)
  sharding.check_divisible(Experiment(train=train), mesh)
  train = TrainConfig(batch_size=2, sequence_length=38)
  with pytest.raises(
    UserError, match=r"mesh.sequence=4 .* train.sequence_length=38"
  ):
    sharding.check_divisible(Experiment(train=train), mesh)


def test_put_batch_spreads_rows():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=1, tensor=2))
  rows = np.arange(16).reshape(8, 2)
  placed = sharding.put_batch({"x": rows}, mesh)["x"]
  np.testing.assert_array_equal(placed, rows)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
