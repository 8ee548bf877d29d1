"""Mesh axes, parameter rules and activation specs.

Four axes exist in every mesh: `data`, `fsdp`, `expert` and `tensor`. Rows of a
batch are spread over the first three. Parameters are stored spread over
`fsdp`, `expert` and `tensor`, and gathered where they are used.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from edl_jax.config import Experiment, MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# The axes over which rows of the global batch are spread.
ROW_AXES = ("data", "fsdp", "expert")

# What each dimension of a parameter is spread over, by the axis letters that
# end the parameter's name. Layers (a leading dimension that scanned blocks
# have) are never spread.
PARAMETER_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embedding_VM", ("tensor", "fsdp")),
  (r"head_MV", ("fsdp", "tensor")),
  (r".*/query_MNH", ("fsdp", "tensor", None)),
  (r".*/(key|value)_MKH", ("fsdp", "tensor", None)),
  (r".*/out_NHM", ("tensor", None, "fsdp")),
  (r".*/router_ME", ("fsdp", None)),
  (r".*/gate_up_EM2F", ("expert", "fsdp", None, "tensor")),
  (r".*/down_EFM", ("expert", "tensor", "fsdp")),
  (r".*/gate_up_M2F", ("fsdp", None, "tensor")),
  (r".*/down_FM", ("tensor", "fsdp")),
  (r"(.*/)?[a-z_]*norm/scale", (None,)),
)


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Lays `devices` (default: all) out on the four axes.

  Axis types are Auto throughout the program.

  Raises:
    UserError: the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  if len(devices) % known:
    raise UserError(f"{shown}: does not divide {len(devices)} devices")
  sizes = {
    axis: len(devices) // known if size == -1 else size
    for axis, size in sizes.items()
  }
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(
      f"{shown}: takes {known} of {len(devices)} devices; set one axis to -1"
    )
  return jax.make_mesh(
    tuple(sizes[axis] for axis in MESH_AXES),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def check_divisible(experiment: Experiment, mesh: Mesh) -> None:
  """Raises UserError unless the mesh divides the model and the batch.

  Nor may several processes share a row: each reads rows of its own.
  """
  model, train, size = experiment.model, experiment.train, mesh.shape
  rows = train.batch_size // train.accumulation_steps
  row_shards = int(np.prod([size[axis] for axis in ROW_AXES]))
  if rows % row_shards:
    raise UserError(
      f"train.batch_size={train.batch_size} in train.accumulation_steps="
      f"{train.accumulation_steps}: {rows} rows do not divide over"
      f" {row_shards} shards (mesh.data x mesh.fsdp x mesh.expert)"
    )
  owners = collections.defaultdict(set)
  shards = row_sharding(mesh).devices_indices_map((row_shards,))
  for device, (shard,) in shards.items():
    owners[shard.indices(row_shards)].add(device.process_index)
  if any(len(processes) > 1 for processes in owners.values()):
    raise UserError(
      f"mesh.tensor={size['tensor']} spreads the same rows over several"
      " processes, each of which reads rows of its own; lower mesh.tensor to"
      " the devices of one process"
    )
  checks = (
    ("fsdp", "model.width", model.width),
    ("expert", "model.num_experts", model.num_experts),
    ("tensor", "model.num_heads", model.num_heads),
    ("tensor", "model.num_kv_heads", model.num_kv_heads),
    ("tensor", "model.expert_width", model.expert_width),
    ("tensor", "model.vocabulary_size", model.vocabulary_size),
    *(
      [("tensor", "model.dense_width", model.dense_width)]
      if model.num_dense_layers
      else []
    ),
  )
  for axis, name, value in checks:
    if value % size[axis]:
      raise UserError(
        f"mesh.{axis}={size[axis]} does not divide {name}={value}"
      )


def path_name(path: Sequence[Any]) -> str:
  """Returns a readable name of a leaf, such as `blocks/moe/router_ME`."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return name.removesuffix("/value")


def parameter_specs(parameters: Any) -> Any:
  """Returns the PartitionSpec of every parameter, as the same pytree.

  Raises:
    ValueError: a parameter matches no rule or several, or has another rank
      than its rule.
  """

  def spec(path, leaf) -> PartitionSpec:
    name = path_name(path)
    found = [axes for rule, axes in PARAMETER_RULES if re.fullmatch(rule, name)]
    if len(found) != 1:
      raise ValueError(f"parameter {name} matches {len(found)} sharding rules")
    layers = leaf.ndim - len(found[0])
    if layers not in (0, 1):
      raise ValueError(f"parameter {name} {leaf.shape} does not fit {found[0]}")
    return PartitionSpec(*(None,) * layers, *found[0])

  return jax.tree_util.tree_map_with_path(spec, parameters)


def parameter_shardings(parameters: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of every parameter, as the same pytree."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    parameter_specs(parameters),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch row."""
  return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Assembles a global batch from the rows that this process holds."""
  sharding = row_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
  )


def constrain_rows(x: jax.Array) -> jax.Array:
  """Keeps `x` spread over rows; does nothing outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))


def per_shard(
  function: Callable[..., Any],
  in_specs: Sequence[PartitionSpec],
  out_specs: Any,
) -> Callable[..., Any]:
  """Maps `function` over the shards of the mesh in use.

  Inside, every mesh axis is manual and arrays are local; collectives such as
  `sum_over` say what crosses devices. Outside a mesh, or on one device,
  `function` is called as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  return jax.shard_map(
    function, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
  )


def sum_over(x: Any, axes: Sequence[str]) -> Any:
  """Sums over mesh axes inside `per_shard`; does nothing on one device."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.psum(x, tuple(axes))
