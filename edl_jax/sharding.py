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
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from edl_jax.config import Experiment, MeshConfig, MoEConfig, UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# The axes over which rows of the global batch are spread.
ROW_AXES = ("data", "fsdp", "expert")

# The axes that only store parameters, in the order in which they are gathered.
# Gather over one axis at a time: TPUs turn a gather over a whole slice into an
# all-reduce. Gather over the smaller axis first, for a small intermediate.
STORAGE_AXES = ("expert", "fsdp")

_STORAGE = ("fsdp", "expert")

# Devices whose compiler has a ragged all-to-all: TPU v5p and v6e.
_RAGGED_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite")


class ParameterRule(NamedTuple):
  """How one parameter is stored, and how it gets to where it is used."""

  # The axes that each dimension is spread over, as in a PartitionSpec. A
  # leading dimension of stacked layers comes on top, and is never spread.
  spec: tuple[str | tuple[str, ...] | None, ...]
  # The axes to gather over before use, in this order; over other axes, the
  # parameter stays spread.
  gathered: tuple[str, ...] = STORAGE_AXES
  # A share of the experts. Under every dispatch but "gather" it stays on its
  # devices along `expert`.
  is_expert: bool = False
  # Travels in float32, whatever the compute dtype.
  is_float32: bool = False
  # Has no gradient, no moments and no decay: a rule of its own moves it.
  is_state: bool = False
  # The letters of the rows and of the columns of its matrices, which Muon
  # orthogonalises one by one; None where AdamW is the better rule.
  matrix: tuple[str, str] | None = None


# A rule for each parameter, by the last part of its name, whose suffix gives
# the dimensions. A TPU stores the last two dimensions in tiles, so a large
# parameter spreads dimensions that stay larger than a tile: experts' F, not M.
PARAMETER_RULES: dict[str, ParameterRule] = {
  "embedding_VM": ParameterRule(
    (("tensor", "fsdp"), "expert"), gathered=(*STORAGE_AXES, "tensor")
  ),
  "head_MV": ParameterRule((_STORAGE, "tensor")),
  "query_MNH": ParameterRule((_STORAGE, "tensor", None), matrix=("M", "NH")),
  "key_MKH": ParameterRule((_STORAGE, "tensor", None), matrix=("M", "KH")),
  "value_MKH": ParameterRule((_STORAGE, "tensor", None), matrix=("M", "KH")),
  "out_NHM": ParameterRule(("tensor", None, _STORAGE), matrix=("NH", "M")),
  "router_ME": ParameterRule(
    ("fsdp", None), is_float32=True, matrix=("M", "E")
  ),
  "query_bias_NH": ParameterRule(("tensor", None)),
  "key_bias_KH": ParameterRule(("tensor", None)),
  "value_bias_KH": ParameterRule(("tensor", None)),
  "out_bias_M": ParameterRule((None,)),
  "bias_E": ParameterRule((None,), is_float32=True, is_state=True),
  "gate_up_EM2F": ParameterRule(
    ("expert", "fsdp", None, "tensor"), is_expert=True, matrix=("M", "F")
  ),
  "down_EFM": ParameterRule(
    ("expert", ("tensor", "fsdp"), None), is_expert=True, matrix=("F", "M")
  ),
  "gate_up_M2F": ParameterRule((_STORAGE, None, "tensor"), matrix=("M", "F")),
  "down_FM": ParameterRule(("tensor", _STORAGE), matrix=("F", "M")),
  "shared_gate_M": ParameterRule((None,), is_float32=True),
  # Norms.
  "scale": ParameterRule((None,), is_float32=True),
  "scale_NH": ParameterRule(("tensor", None), is_float32=True),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Lays `devices` (default: all) out on the five axes.

  Neighbours along an axis are neighbours in the torus of a TPU slice. Several
  slices lie along `data`, so that only gradients cross the slower network
  between slices. Axis types are Auto throughout the program.

  Raises:
    UserError: the axis sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  known = math.prod(size for size in sizes.values() if size != -1)
  shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  if len(devices) % known:
    raise UserError(f"{shown}: does not divide {len(devices)} devices")
  sizes = {
    axis: len(devices) // known if size == -1 else size
    for axis, size in sizes.items()
  }
  if math.prod(sizes.values()) != len(devices):
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
  # A mesh axis may take a part of a torus axis.
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
  """Checks that the experiment can run on the mesh.

  Raises:
    UserError: the mesh does not divide the model or the batch, several
      processes would share a row, although each reads rows of its own, or the
      devices cannot run `moe.dispatch`.
  """
  train, size = experiment.train, mesh.shape
  rows = train.batch_size // train.accumulation_steps
  row_shards = math.prod(size[axis] for axis in ROW_AXES)
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
  _check_rows_of_processes(mesh)
  for axes, key, value in _divisions(experiment):
    parts = math.prod(size[axis] for axis in axes)
    if value % parts:
      shown = " x ".join(f"mesh.{axis}={size[axis]}" for axis in axes)
      more = (
        f"; {key}={-(-value // parts) * parts} fits, and may be more than the"
        " tokenizer has"
        if key == "model.vocabulary_size"
        else ""
      )
      raise UserError(f"{shown} does not divide {key}={value}{more}")


def _check_rows_of_processes(mesh: Mesh) -> None:
  """Raises UserError if several processes share a row."""
  size = mesh.shape
  row_shards = math.prod(size[axis] for axis in ROW_AXES)
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


def _divisions(
  experiment: Experiment,
) -> Iterator[tuple[tuple[str, ...], str, int]]:
  """Yields mesh axes, and the field that their product must divide."""
  model = experiment.model
  fields = {
    "V": "vocabulary_size",
    "M": "width",
    "N": "num_heads",
    "K": "num_kv_heads",
    "E": "num_experts",
  }
  for name, rule in PARAMETER_RULES.items():
    # A shared expert uses the rules of dense layers. Its hidden width is a
    # multiple of the experts', which must divide by more axes.
    fields["F"] = "expert_width" if rule.is_expert else "dense_width"
    is_checked = rule.is_expert or model.num_dense_layers
    for letter, entry in zip(name.rpartition("_")[2], rule.spec):
      if entry and (letter != "F" or is_checked):
        field = fields[letter]
        yield axes_of(entry), f"model.{field}", getattr(model, field)
  length = experiment.train.sequence_length
  yield ("sequence",), "train.sequence_length", length


def path_name(path: Sequence[Any]) -> str:
  """Returns a readable name of a leaf, such as `blocks/moe/router_ME`."""
  name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
  return name.removesuffix("/value")


def last_name(path: Sequence[Any]) -> str:
  """Returns the last part of a leaf's name, such as `router_ME`."""
  return path_name(path).rpartition("/")[2]


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of one dimension of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else entry or ()


def parameter_rule(path: Sequence[Any], leaf: Any) -> ParameterRule:
  """Returns the rule of a parameter.

  Raises:
    ValueError: the parameter has no rule, or another rank than its rule.
  """
  rule = PARAMETER_RULES.get(last_name(path))
  if rule is None:
    raise ValueError(f"parameter {path_name(path)} has no sharding rule")
  if leaf.ndim - len(rule.spec) not in (0, 1):
    raise ValueError(
      f"parameter {path_name(path)} {leaf.shape} does not fit {rule.spec}"
    )
  return rule


def is_state(path: Sequence[Any]) -> bool:
  """Says whether a leaf of a model is moved by a rule of its own."""
  rule = PARAMETER_RULES.get(last_name(path))
  return rule is not None and rule.is_state


def parameter_spec(path: Sequence[Any], leaf: Any) -> PartitionSpec:
  """Returns the PartitionSpec of a parameter.

  Raises:
    ValueError: the parameter has no rule, or another rank than its rule.
  """
  rule = parameter_rule(path, leaf)
  layers = leaf.ndim - len(rule.spec)
  return PartitionSpec(*(None,) * layers, *rule.spec)


def parameter_specs(parameters: Any, apart: bool = False) -> Any:
  """Returns the PartitionSpec of every parameter, as the same pytree.

  Args:
    parameters: arrays, or shapes in their place.
    apart: whether they come from `apart`.

  Raises:
    ValueError: a parameter has no rule, or another rank than its rule.
  """
  if not apart:
    return jax.tree_util.tree_map_with_path(parameter_spec, parameters)
  return jax.tree.map(
    lambda spec: PartitionSpec(_copy_axes(spec), *spec),
    parameter_specs(jax.eval_shape(first_copy, parameters)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def _copy_axes(spec: PartitionSpec) -> tuple[str, ...]:
  """Returns the axes along which devices hold copies of the same shard."""
  spread = {axis for entry in spec for axis in axes_of(entry)}
  return tuple(axis for axis in MESH_AXES if axis not in spread)


def apart(parameters: Any) -> Any:
  """Gives the devices that hold the same shard a copy each.

  Copies are stacked along a new first axis, which is spread over these devices,
  and take no memory beyond what the devices hold. The gradient by a copy is
  that of its device's rows alone, and `together` sums it over devices.
  """
  mesh = jax.sharding.get_abstract_mesh()

  def stack(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    axes = _copy_axes(spec)
    count = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    copies = jnp.broadcast_to(x, (count, *x.shape))
    if mesh.empty:
      return copies
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(axes, *spec))

  return jax.tree.map(
    stack,
    parameter_specs(parameters),
    parameters,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def together(gradient: Any) -> Any:
  """Returns the gradient by parameters from that by what `apart` returns."""
  return jax.tree.map(lambda x: x.sum(0), gradient)


def first_copy(parameters: Any) -> Any:
  """Returns a device's own copy of what `apart` returns."""
  return jax.tree.map(lambda x: x[0], parameters)


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
  # Intentional transfer; the transfer guard would reject it with several
  # processes.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
    )


def per_shard(
  function: Callable[..., Any],
  in_specs: Sequence[Any],
  out_specs: Any,
  mesh: Mesh | None = None,
) -> Callable[..., Any]:
  """Maps `function` over the shards of a mesh, by default the mesh in use.

  Inside, every mesh axis is manual and arrays are local; the functions below
  move data across devices. Outside a mesh, or on one device, this returns
  `function` itself, and the functions below do nothing.
  """
  used = mesh or jax.sharding.get_abstract_mesh()
  if used.empty or used.size == 1:
    return function
  # Pallas kernels do not declare varying axes, so skip that check.
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(in_specs),
    out_specs=out_specs,
    check_vma=False,
  )


def spread_axes(axes: Sequence[str]) -> tuple[str, ...]:
  """Returns those of `axes` that are manual here and larger than one."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1
  )


def gathered_axes(name: str, moe: MoEConfig) -> tuple[str, ...]:
  """Returns the axes over which a parameter is gathered before use.

  Args:
    name: a key of `PARAMETER_RULES`.
    moe: how tokens and experts meet; every dispatch but "gather" leaves experts
      on their devices.
  """
  rule = PARAMETER_RULES[name]
  if rule.is_expert and moe.dispatch != "gather":
    return tuple(axis for axis in rule.gathered if axis != "expert")
  return rule.gathered


def gather(
  name: str, x: jax.Array, axes: Sequence[str] | None = None
) -> jax.Array:
  """Gathers the shards of a parameter.

  Its transpose, `scatter`, sums and scatters the gradient. Shards travel cut
  along their first dimension, because a TPU may turn a reduce-scatter along a
  tiled dimension into an all-reduce.

  Args:
    name: the parameter's, a key of `PARAMETER_RULES`.
    x: this device's shard, of one layer, in the dtype to send. Dimensions
      behind the last one that is gathered may differ from the parameter's.
    axes: mesh axes to gather over; None for those of the rule.
  """
  for axis, dimension in _gathers(name, axes):
    x = jnp.moveaxis(x, dimension, 0)
    x = jnp.moveaxis(jax.lax.all_gather(x, axis, tiled=True), 0, dimension)
  return x


def scatter(
  name: str, x: jax.Array, axes: Sequence[str] | None = None
) -> jax.Array:
  """Sums over devices and keeps this one's shard: the transpose of `gather`."""
  for axis, dimension in reversed(_gathers(name, axes)):
    x = jnp.moveaxis(x, dimension, 0)
    x = jnp.moveaxis(jax.lax.psum_scatter(x, axis, tiled=True), 0, dimension)
  return x


def _gathers(name: str, axes: Sequence[str] | None) -> list[tuple[str, int]]:
  """Lists the axes to gather over, and the dimension of each."""
  rule = PARAMETER_RULES[name]
  return [
    (axis, dimension)
    for axis in spread_axes(rule.gathered if axes is None else axes)
    for dimension, entry in enumerate(rule.spec)
    if axis in axes_of(entry)
  ]


def sum_over(x: Any, axes: Sequence[str]) -> Any:
  """Sums over mesh axes."""
  axes = spread_axes(axes)
  return jax.lax.psum(x, axes) if axes else x


def mean_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Averages over mesh axes."""
  axes = spread_axes(axes)
  return jax.lax.pmean(x, axes) if axes else x


def max_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Takes the maximum over mesh axes."""
  axes = spread_axes(axes)
  return jax.lax.pmax(x, axes) if axes else x


def index_along(axis: str) -> jax.Array | int:
  """Returns the device's index along a mesh axis."""
  return jax.lax.axis_index(axis) if spread_axes((axis,)) else 0
