"""Mesh axes, parameter rules, and what crosses devices.

Five axes exist in every mesh: `data`, `fsdp`, `expert`, `tensor` and
`sequence`. Rows of a batch are spread over the first three, and the positions
of each row over the last. Parameters are stored spread over `fsdp`, `expert`
and `tensor`, and gathered where they are used.

A model runs inside one `per_shard`, in which every axis is manual: arrays are
a device's own, and every transfer is an explicit call: parameters and sums
here, tokens in `expert_parallel`, keys and values in `attention`. JAX sums
gradients over the axes that a parameter is not spread over; XLA adds the sums
over rows behind the model and the sum of the gradient's norm.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from edl_jax.config import Experiment, MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# The axes over which rows of the global batch are spread.
ROW_AXES = ("data", "fsdp", "expert")

# The axes that only store parameters, in the order in which they are gathered:
# one at a time, as TPUs make an all-reduce of a gather over a whole slice, and
# the smaller first, so that the intermediate result is the smaller one.
STORAGE_AXES = ("expert", "fsdp")

_STORAGE = ("fsdp", "expert")

# Devices whose compiler has a ragged all-to-all: TPU v5p and v6e.
_RAGGED_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite")

# What each dimension of a parameter is spread over, by the parameter's name,
# whose axis letters say the dimensions. Layers (a leading dimension that
# scanned blocks have) are never spread. Of the large ones no minor dimension
# is cut below the tiles of a TPU: experts' F and not M.
PARAMETER_RULES: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
  "embedding_VM": (("tensor", "fsdp"), "expert"),
  "head_MV": (_STORAGE, "tensor"),
  "query_MNH": (_STORAGE, "tensor", None),
  "key_MKH": (_STORAGE, "tensor", None),
  "value_MKH": (_STORAGE, "tensor", None),
  "out_NHM": ("tensor", None, _STORAGE),
  "router_ME": ("fsdp", None),
  "gate_up_EM2F": ("expert", "fsdp", None, "tensor"),
  "down_EFM": ("expert", ("tensor", "fsdp"), None),
  "gate_up_M2F": (_STORAGE, None, "tensor"),
  "down_FM": ("tensor", _STORAGE),
  # Of norms.
  "scale": (None,),
}


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Lays `devices` (default: all) out on the five axes.

  Neighbours along an axis are neighbours in the torus of a TPU slice; several
  slices lie along `data`, whose gradients alone cross the slower network
  between them. Axis types are Auto throughout the program.

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
  shape = [sizes[axis] for axis in MESH_AXES]
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes["data"] % slices:
    raise UserError(
      f"{shown}: {slices} slices need mesh.data to be a multiple of {slices};"
      " between slices only gradients should travel"
    )
  # A mesh axis may be a part of an axis of the torus.
  if slices > 1:
    laid_out = mesh_utils.create_hybrid_device_mesh(
      [shape[0] // slices, *shape[1:]],
      [slices, *[1] * len(shape[1:])],
      devices,
      allow_split_physical_axes=True,
    )
  else:
    laid_out = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_divisible(experiment: Experiment, mesh: Mesh) -> None:
  """Raises UserError unless the mesh divides the model and the batch.

  Nor may several processes share a row, as each reads rows of its own, or
  `moe.dispatch` be one that the devices cannot run.
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
  kind = mesh.devices.flat[0].device_kind
  if (
    experiment.moe.dispatch == "ragged_all_to_all"
    and size["expert"] > 1
    and kind not in _RAGGED_KINDS
  ):
    raise UserError(
      f"moe.dispatch='ragged_all_to_all': {kind} devices have no such exchange;"
      " choose 'ring' or 'gather'"
    )
  owners = collections.defaultdict(set)
  shards = row_sharding(mesh).devices_indices_map((row_shards,))
  for device, (shard,) in shards.items():
    owners[shard.indices(row_shards)].add(device.process_index)
  if any(len(processes) > 1 for processes in owners.values()):
    shown = " x ".join(
      f"mesh.{axis}={size[axis]}"
      for axis in ("tensor", "sequence")
      if size[axis] > 1
    )
    raise UserError(
      f"{shown} spreads the same rows over several processes, each of which"
      " reads rows of its own; lower it to the devices of one process"
    )
  for axes, name, value in (
    (("fsdp", "expert"), "model.width", model.width),
    (("expert",), "model.num_experts", model.num_experts),
    (("tensor",), "model.num_heads", model.num_heads),
    (("tensor",), "model.num_kv_heads", model.num_kv_heads),
    (("tensor", "fsdp"), "model.expert_width", model.expert_width),
    (("tensor", "fsdp"), "model.vocabulary_size", model.vocabulary_size),
    (("sequence",), "train.sequence_length", train.sequence_length),
    *(
      [(("tensor",), "model.dense_width", model.dense_width)]
      if model.num_dense_layers
      else []
    ),
  ):
    if value % int(np.prod([size[axis] for axis in axes])):
      shown = " x ".join(f"mesh.{axis}={size[axis]}" for axis in axes)
      more = (
        "; it may be larger than the tokenizer's"
        if name == "model.vocabulary_size"
        else ""
      )
      raise UserError(f"{shown} does not divide {name}={value}{more}")


def path_name(path: Sequence[Any]) -> str:
  """Returns a readable name of a leaf, such as `blocks/moe/router_ME`."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return name.removesuffix("/value")


def parameter_specs(parameters: Any) -> Any:
  """Returns the PartitionSpec of every parameter, as the same pytree.

  Raises:
    ValueError: a parameter has no rule, or another rank than its rule.
  """

  def spec(path, leaf) -> PartitionSpec:
    name = path_name(path)
    rule = PARAMETER_RULES.get(name.rsplit("/")[-1])
    if rule is None:
      raise ValueError(f"parameter {name} has no sharding rule")
    layers = leaf.ndim - len(rule)
    if layers not in (0, 1):
      raise ValueError(f"parameter {name} {leaf.shape} does not fit {rule}")
    return PartitionSpec(*(None,) * layers, *rule)

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
  # Meant, though of several processes JAX counts it as a slip.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
    )


def per_shard(
  function: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any
) -> Callable[..., Any]:
  """Maps `function` over the shards of the mesh in use.

  Inside, every mesh axis is manual and arrays are local; the functions below
  say what crosses devices. Outside a mesh, or on one device, `function` is
  called as it is, and they do nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function
  # What is checked otherwise, which axes an array varies over, Pallas' kernels
  # do not say.
  return jax.shard_map(
    function, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
  )


def spread_axes(axes: Sequence[str]) -> tuple[str, ...]:
  """Returns those of `axes` that spread arrays over devices here."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1
  )


def gather(
  name: str, x: jax.Array, axes: Sequence[str] = STORAGE_AXES
) -> jax.Array:
  """Gathers a device's piece of a parameter over storage axes.

  The gradient is summed and scattered the way back (`scatter`). What is sent
  is cut along its first dimension: along one that is tiled in memory a TPU may
  make an all-reduce of what is a reduce-scatter.

  Args:
    name: the parameter's, a key of `PARAMETER_RULES`.
    x: its piece, of one layer, in the dtype to send. Dimensions behind the
      last one that is gathered may have another shape than the parameter's.
    axes: which to gather over.
  """
  for axis, dimension in _gathers(name, axes):
    x = jnp.moveaxis(x, dimension, 0)
    x = jnp.moveaxis(jax.lax.all_gather(x, axis, tiled=True), 0, dimension)
  return x


def scatter(
  name: str, x: jax.Array, axes: Sequence[str] = STORAGE_AXES
) -> jax.Array:
  """Sums over storage axes and keeps a device's piece: `gather`'s transpose."""
  for axis, dimension in reversed(_gathers(name, axes)):
    x = jnp.moveaxis(x, dimension, 0)
    x = jnp.moveaxis(jax.lax.psum_scatter(x, axis, tiled=True), 0, dimension)
  return x


def _gathers(name: str, axes: Sequence[str]) -> list[tuple[str, int]]:
  """Lists the axes to gather over, and the dimension of each."""
  rule = PARAMETER_RULES[name]
  return [
    (axis, dimension)
    for axis in spread_axes(axes)
    for dimension, spread in enumerate(rule)
    if axis == spread or (isinstance(spread, tuple) and axis in spread)
  ]


def sum_over(x: Any, axes: Sequence[str]) -> Any:
  """Sums over mesh axes."""
  axes = spread_axes(axes)
  return jax.lax.psum(x, axes) if axes else x


def max_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Takes the maximum over mesh axes."""
  axes = spread_axes(axes)
  return jax.lax.pmax(x, axes) if axes else x


def index_along(axis: str) -> jax.Array | int:
  """Returns the device's index along a mesh axis."""
  return jax.lax.axis_index(axis) if spread_axes((axis,)) else 0
