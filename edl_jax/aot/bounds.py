"""Lower bounds of a training step, by products, memory and interconnect.

No program that follows the chosen strategy on the given chips can take less.
All figures are for one chip and one step.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.aot.hlo_costs import Collective
from edl_jax.aot.topologies import Topology
from edl_jax.config import Experiment

# The axes over which tokens of the global batch are spread.
_TOKEN_AXES = (*sharding.ROW_AXES, "sequence")


class StepBound(NamedTuple):
  """The least seconds that each resource needs, if it never waits."""

  products: float
  memory: float
  interconnect: float
  # What joins slices; 0 for one slice.
  network: float

  @property
  def seconds(self) -> float:
    return max(self)

  @property
  def binding(self) -> str:
    """The resource that takes longest."""
    return max(self._asdict().items(), key=lambda item: item[1])[0]


class _Weight(NamedTuple):
  """How often and over how many chips one parameter travels."""

  # Bytes that a chip holds once it has gathered the parameter, in all layers.
  bytes: float
  # Chips that it is gathered from.
  shards: int
  # Chips that hold the same shard and must agree on its gradient.
  copies: int
  # Gathers in one step.
  gathers: int


def _passes(experiment: Experiment) -> tuple[int, int]:
  """Returns the forward and backward passes of one step.

  See `loss_and_gradient`.
  """
  count = experiment.train.accumulation_steps
  exact = count > 1 and experiment.train.accumulation == "exact"
  return count * (2 if exact else 1), count


def _weights(
  experiment: Experiment, parameters: Any, mesh: Mesh
) -> Iterator[_Weight]:
  forward, backward = _passes(experiment)
  rematerialised = experiment.model.remat != "none"
  for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
    rule = sharding.parameter_rule(path, leaf)
    name = sharding.last_name(path)
    dtype = "float32" if rule.is_float32 else experiment.model.dtype
    spread = set(itertools.chain(*map(sharding.axes_of, leaf.sharding.spec)))
    gathered = spread & set(sharding.gathered_axes(name, experiment.moe))
    stays = spread - gathered
    shards = math.prod(mesh.shape[axis] for axis in gathered)
    split = math.prod(mesh.shape[axis] for axis in stays)
    token_shards = math.prod(
      mesh.shape[axis] for axis in _TOKEN_AXES if axis not in stays
    )
    in_layer = leaf.ndim > len(rule.spec)
    yield _Weight(
      leaf.size / split * jax.numpy.dtype(dtype).itemsize,
      shards,
      token_shards // shards,
      forward + (backward if in_layer and rematerialised else 0),
    )


def _residual_bytes(experiment: Experiment, mesh: Mesh) -> float:
  """Returns the bytes of one chip's residual stream (B, T, M) in one pass."""
  train, model = experiment.train, experiment.model
  shards = math.prod(mesh.shape[axis] for axis in _TOKEN_AXES)
  tokens = train.batch_size * train.sequence_length / shards
  itemsize = jax.numpy.dtype(model.dtype).itemsize
  return tokens / train.accumulation_steps * model.width * itemsize


def collective_bytes(
  experiment: Experiment, parameters: Any, mesh: Mesh
) -> float:
  """Returns the bytes that a chip must send in one step.

  Weights. `sharding.PARAMETER_RULES` says which axes spread a weight, over
  which of them it is gathered, and in which dtype it travels. A gather of b
  bytes from n chips sends (n - 1) / n b. A forward pass gathers each weight
  once; where layers are rematerialised, the backward pass gathers the layers'
  weights once more. A gradient is reduced and scattered once, at the same cost.
  Then the c chips that hold the same shard all-reduce it: 2 (c - 1) / c b / n.

  `tensor` = t > 1. Each layer adds the partial outputs of attention and of
  experts, forward and backward, and rematerialisation adds those of attention
  again. Each is an all-reduce of the residual stream: 2 (t - 1) / t of its
  bytes.

  `expert` = X > 1. With the dispatch "gather" experts travel, as weights do.
  With the others tokens travel to the experts and back, forward and backward,
  and forward again under rematerialisation. With P tokens a device and A active
  experts, a layer's way there and back takes, in rows of M numbers,
  2 (X - 1) / X P A for "ragged_all_to_all" at uniform routing,
  `moe.capacity_factor` times that for "capacity", and 2 (X - 1) P for "ring".

  `sequence` = s > 1. Each layer gathers the keys and the values of whole rows,
  each K H / t numbers a token: s - 1 times a chip's own. It does so forward,
  sums their gradients backward, and gathers again under rematerialisation.

  Each micro-batch has passes of its own, but gradients are reduced once a step.

  Args:
    experiment: its model, dispatch and accumulation count; `mesh` replaces its
      mesh.
    parameters: the model's, as `ShapeDtypeStruct`s with shardings.
    mesh: the mesh of the step.
  """
  total = 0.0
  for weight in _weights(experiment, parameters, mesh):
    part = (weight.shards - 1) / weight.shards * weight.bytes
    total += (weight.gathers + 1) * part
    shard = weight.bytes / weight.shards
    total += 2 * (weight.copies - 1) / weight.copies * shard
  tensor = mesh.shape["tensor"]
  forward, backward = _passes(experiment)
  layers = experiment.model.num_layers
  sums = (forward + backward) * 2 * layers
  if experiment.model.remat != "none":
    sums += backward * layers
  residual = _residual_bytes(experiment, mesh)
  total += sums * 2 * (tensor - 1) / tensor * residual
  model, moe = experiment.model, experiment.moe
  again = 0.0 if model.remat == "none" else backward
  if moe.dispatch == "ring":
    # Rematerialisation sends the tokens round again, but not the sums.
    again /= 2
  ways = forward + backward + again
  keys = model.num_kv_heads * model.head_width / tensor / model.width * residual
  total += ways * layers * 2 * (mesh.shape["sequence"] - 1) * keys
  devices = mesh.shape["expert"]
  copies = {
    "gather": 0.0,
    "ragged_all_to_all": model.num_active_experts / devices,
    "capacity": moe.capacity_factor * model.num_active_experts / devices,
    "ring": 1.0,
  }[moe.dispatch]
  moe_layers = model.num_layers - model.num_dense_layers
  return total + ways * moe_layers * 2 * (devices - 1) * copies * residual


def memory_bytes(
  experiment: Experiment,
  parameters: Any,
  mesh: Mesh,
  argument_bytes: float,
  output_bytes: float,
) -> float:
  """Returns the bytes that a chip must read from and write to its memory.

  The step reads the state and the batch once, and writes the state once. It
  writes and reads every gathered weight and every gradient. It writes a layer's
  input, all that rematerialisation keeps, in the forward pass, and reads it in
  the backward pass. The bound assumes that none of these stays in vector memory
  meanwhile, which holds for models that need a pod.
  """
  total = argument_bytes + output_bytes
  for weight in _weights(experiment, parameters, mesh):
    gathers = weight.gathers if weight.shards > 1 else 0
    total += 2 * (gathers + 1) * weight.bytes
  _, backward = _passes(experiment)
  kept = backward * experiment.model.num_layers
  return total + 2 * kept * _residual_bytes(experiment, mesh)


def split(
  collective: Collective, units: Sequence[Any]
) -> tuple[Collective, Collective | None]:
  """Separates what a collective sends within units from what it sends between.

  Each device sends its own share of the value between units: a gather goes
  first between units and then within, a reduction the other way round. Of a
  permutation that crosses units, everything counts as crossing.

  Args:
    collective: its group has as many devices in each unit that it reaches.
    units: the unit of each device, such as its slice, by place in the mesh.

  Returns:
    What stays within units, and what leaves them, if anything does.
  """
  places = collective.devices
  reached = {units[place] for place in places}
  if len(reached) <= 1:
    return collective, None
  inner = tuple(x for x in places if units[x] == units[places[0]])
  if collective.kind == "collective-permute":
    return collective._replace(group=1, devices=inner), collective
  size, payload = len(inner), collective.payload
  is_exchange = collective.kind.endswith("all-to-all")
  return (
    collective._replace(
      group=size,
      devices=inner,
      payload=payload / len(reached) if is_exchange else payload,
    ),
    collective._replace(
      group=len(reached),
      payload=payload if is_exchange else payload / size,
    ),
  )


def by_network(
  collectives: Sequence[Collective], mesh: Mesh
) -> tuple[list[Collective], list[Collective]]:
  """Returns what travels within slices, and what between them."""
  slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
  parts = [split(collective, slices) for collective in collectives]
  return (
    [within for within, between in parts if not between or within.group > 1],
    [between for _, between in parts if between],
  )


def network_seconds(between: Sequence[Collective], topology: Topology) -> float:
  """Returns the seconds that transfers between slices need at least."""
  sent = sum(collective.wire_bytes for collective in between)
  bandwidth = topology.chip.network_bandwidth
  # `topologies.load` refuses several slices without a known bandwidth.
  return sent / bandwidth if bandwidth else 0.0


def interconnect_seconds(
  collectives: Sequence[Collective], topology: Topology, mesh: Mesh
) -> float:
  """Returns the seconds that collectives within a slice need on the links.

  Devices of one chip combine what they send. A collective uses the links along
  the dimensions in which its group's chips lie apart. For any set of
  dimensions, all collectives that stay within the set share the bandwidth of
  its links, which takes a certain time. The result is the largest of these
  times.
  """
  coordinates = np.array([device.coords for device in mesh.devices.flat])
  links = topology.links()
  bytes_by_span: dict[frozenset[int], float] = {}
  chips = [tuple(place) for place in coordinates.tolist()]
  for collective in collectives:
    _, between = split(collective, chips)
    if between is None:
      continue  # A permutation may leave everything where it is.
    places = coordinates[list(between.devices)]
    span = frozenset(np.flatnonzero(np.ptp(places, axis=0)).tolist())
    bytes_by_span[span] = bytes_by_span.get(span, 0.0) + between.wire_bytes
  seconds = 0.0
  dimensions = range(len(topology.shape))
  for size in range(1, len(dimensions) + 1):
    for chosen in itertools.combinations(dimensions, size):
      inside = sum(
        sent for span, sent in bytes_by_span.items() if span <= set(chosen)
      )
      count = sum(links[dimension] for dimension in chosen)
      if inside:
        seconds = max(seconds, inside / (count * topology.chip.link_bandwidth))
  return seconds
