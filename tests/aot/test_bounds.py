"""Lower bounds of a step, against counts by hand."""

import pathlib
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from edl_jax import config_files
from edl_jax.aot import bounds, topologies
from edl_jax.aot.hlo_costs import Collective
from edl_jax.sharding import MESH_AXES

TINY = str(pathlib.Path(__file__).parents[2] / "experiments" / "tiny.py")


def collective(payload, devices, kind="all-gather"):
  return Collective(kind, 1, len(devices), devices, payload, False, 0.0, "")


def test_interconnect_takes_the_busiest_set_of_links():
  chip, shape = topologies.parse("v5p:4x4x4")
  devices = [
    types.SimpleNamespace(coords=list(at)) for at in np.ndindex(*shape)
  ]
  topology = topologies.Topology("v5p:4x4x4", chip, shape, devices)
  mesh = types.SimpleNamespace(devices=np.array(devices).reshape(1, 16, 4, 1))
  line, plane = (0, 1, 2, 3), tuple(range(0, 64, 4))
  found = bounds.interconnect_seconds(
    [
      collective(4e9, line),
      collective(16e9, plane),
      # Leaves everything where it is.
      Collective("collective-permute", 1, 1, (), 1e12, False, 0.0, ""),
    ],
    topology,
    mesh,
  )
  # The plane's 15 GB on four links take longer than 18 GB on all six.
  assert found == pytest.approx(15e9 / (4 * 100e9))
  found = bounds.interconnect_seconds(
    [collective(12e9, line), collective(8e9, plane)], topology, mesh
  )
  assert found == pytest.approx(9e9 / (2 * 100e9))


def test_two_devices_of_a_chip_share_its_links():
  chip, shape = topologies.parse("tpu7x:2x2x1")
  devices = [
    types.SimpleNamespace(coords=list(at))
    for at in np.ndindex(*shape)
    for _ in range(2)
  ]
  topology = topologies.Topology("tpu7x:2x2x1", chip, shape, devices)
  mesh = types.SimpleNamespace(devices=np.array(devices).reshape(4, 2))

  def seconds(*devices):
    gather = collective(8e9, devices)
    return bounds.interconnect_seconds([gather], topology, mesh)

  # A chip has two links of 100 GB/s in such a square.
  links = 2 * 100e9
  assert seconds(0, 1) == 0
  # Together the devices of a chip receive the 6 GB of three other chips ...
  assert seconds(*range(8)) == pytest.approx(6e9 / links)
  # ... and each for itself twice as much.
  assert seconds(0, 2, 4, 6) == pytest.approx(2 * 6e9 / links)


@pytest.mark.parametrize(
  ("kind", "within", "between"),
  [
    # Eight devices in two slices, a value of 8 bytes. Each device sends 3 / 4
    # of it within, and of its own 2 bytes the half that the other slice lacks.
    ("all-gather", 6, 1),
    ("reduce-scatter", 6, 1),
    ("all-reduce", 12, 2),
    # Half of the value goes to the other slice, 3 / 4 of the rest stays near.
    ("all-to-all", 3, 4),
    ("collective-permute", 0, 8),
  ],
)
def test_collectives_over_slices_send_each_share_once(kind, within, between):
  # Slices alternate along the group.
  slices = [0, 1] * 4
  found = bounds.split(
    collective(8.0, tuple(range(8)), kind)._replace(
      group=2 if kind == "collective-permute" else 8
    ),
    slices,
  )
  assert [part.wire_bytes for part in found] == [within, between]
  assert found[0].devices == (0, 2, 4, 6)


def test_seconds_between_slices_are_at_the_published_rate():
  devices = [types.SimpleNamespace(slice_index=i // 4) for i in range(8)]
  mesh = types.SimpleNamespace(devices=np.array(devices).reshape(2, 4))
  pair = collective(1e9, (0, 4), "all-reduce")
  near = collective(1e9, (0, 1), "all-reduce")
  within, between = bounds.by_network([pair, near], mesh)
  assert within == [near] and between == [pair]
  topology = topologies.Topology(
    "v5p:2x2x1", *topologies.parse("v5p:2x2x1"), devices, 2
  )
  # 50 Gbit/s a chip.
  found = bounds.network_seconds(between, topology)
  assert found == pytest.approx(1e9 * 8 / 50e9)


def parameters(mesh):
  """Weights of every kind, with the bytes that one chip gathers."""

  def leaf(shape, *spec):
    return jax.ShapeDtypeStruct(
      shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )

  return {
    "blocks": {
      "gate_up_M2F": leaf((2, 8, 2, 8), None, ("fsdp", "expert")),
    },
    "final_norm": {"scale": leaf((8,))},
    "head_MV": leaf((8, 16), "fsdp"),
  }


@pytest.mark.parametrize(
  ("steps", "accumulation", "layers", "once"),
  [(1, "exact", 2, 1), (2, "exact", 6, 4), (2, "per_micro_batch", 4, 2)],
)
def test_least_bytes_of_gathered_weights(steps, accumulation, layers, once):
  experiment = config_files.load(
    TINY,
    {
      "model.dtype": "bfloat16",
      "model.remat": "full",
      "train.accumulation_steps": steps,
      "train.accumulation": accumulation,
    },
  )
  mesh = AbstractMesh((2, 2, 2, 1, 1), MESH_AXES)
  # Four chips share the layers' 512 bytes, two the head's 256; gathers, then
  # the gradient's reduce-scatter, then the sum of its shard over copies.
  expected = 512 * 3 / 4 * (layers + 1) + 128 * 2 * 1 / 2
  expected += 256 * 1 / 2 * (once + 1) + 128 * 2 * 3 / 4
  expected += 32 * 2 * 7 / 8
  found = bounds.collective_bytes(experiment, parameters(mesh), mesh)
  assert found == expected


def test_one_chip_sends_nothing():
  mesh = AbstractMesh((1, 1, 1, 1, 1), MESH_AXES)
  experiment = config_files.load(TINY)
  assert bounds.collective_bytes(experiment, parameters(mesh), mesh) == 0


def test_tensor_parallel_layers_add_partial_outputs():
  experiment = config_files.load(TINY, {"model.remat": "full"})
  mesh = AbstractMesh((1, 1, 1, 2, 1), MESH_AXES)
  found = bounds.collective_bytes(experiment, {}, mesh)
  stream = 8 * 64 * 32 * 4
  # Two layers: twice forward, twice backward, once again.
  assert found == 2 * 5 * 2 * stream / 2


@pytest.mark.parametrize(("remat", "ways"), [("none", 2), ("full", 3)])
def test_spread_sequences_gather_keys_and_values(remat, ways):
  experiment = config_files.load(TINY, {"model.remat": remat})
  mesh = AbstractMesh((2, 1, 1, 1, 4), MESH_AXES)
  found = bounds.collective_bytes(experiment, parameters(mesh), mesh)
  # Two layers, keys and values of one head of 16 numbers, 4 rows, the 48
  # positions of 64 that are elsewhere.
  expected = ways * 2 * 2 * 16 * 4 * 48 * 4
  # No weight is spread; eight chips agree on each gradient.
  expected += (2 * 8 * 16 + 8 + 8 * 16) * 4 * 2 * 7 / 8
  assert found == expected


@pytest.mark.parametrize(
  ("dispatch", "sent"),
  # Rows of 32 float32 numbers, of 8 x 64 tokens over 4 devices of one row each
  # way: to the 3 / 4 of 2 active experts that are elsewhere, or past 3 others.
  [
    ("gather", 0),
    ("ragged_all_to_all", 2 * 3 / 4),
    ("capacity", 1.5 * 2 * 3 / 4),
    ("ring", 3),
  ],
)
def test_ways_of_dispatch_send_tokens_or_experts(dispatch, sent):
  experiment = config_files.load(
    TINY, {"moe.dispatch": dispatch, "moe.capacity_factor": 1.5}
  )
  assert experiment.model.num_active_experts == 2
  mesh = AbstractMesh((1, 1, 4, 1, 1), MESH_AXES)
  sharded = NamedSharding(mesh, PartitionSpec(None, "expert"))
  experts = {
    "blocks": {
      "down_EFM": jax.ShapeDtypeStruct(
        (2, 8, 4, 4), "float32", sharding=sharded
      )
    }
  }
  found = bounds.collective_bytes(experiment, experts, mesh)
  if dispatch == "gather":
    # Once forward, and the gradient back.
    assert found == 2 * 3 / 4 * 2 * 8 * 4 * 4 * 4
  else:
    # Two layers; there and back, forward and backward.
    assert found == 2 * 4 * sent * (8 * 64 // 4) * 32 * 4


def test_memory_moves_state_and_gathered_weights():
  mesh = AbstractMesh((1, 2, 1, 1, 1), MESH_AXES)
  experiment = config_files.load(TINY, {"model.remat": "full"})
  found = bounds.memory_bytes(experiment, parameters(mesh), mesh, 1000, 500)
  layers = 2 * (2 + 1) * 2 * 8 * 16 * 4
  head, norm = 2 * (1 + 1) * 8 * 16 * 4, 2 * 8 * 4
  inputs = 2 * 2 * 4 * 64 * 32 * 4
  assert found == 1000 + 500 + layers + head + norm + inputs
