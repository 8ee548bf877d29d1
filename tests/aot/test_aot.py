"""Compiling for TPU slices, with the compiler where it is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from edl_jax import config_files
from edl_jax.aot import __main__ as aot
from edl_jax.aot import bounds, topologies
from edl_jax.aot import compile as aot_compile
from edl_jax.aot import report as aot_report
from edl_jax.aot.hlo_costs import Collective
from edl_jax.sharding import MESH_AXES

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = str(ROOT / "experiments" / "tiny.py")

# Two layers of shapes that TPUs take as they are.
SMALL = {
  "model.num_layers": 2,
  "model.width": 256,
  "model.num_heads": 4,
  "model.num_kv_heads": 2,
  "model.head_width": 128,
  "model.num_experts": 8,
  "model.expert_width": 256,
  "model.vocabulary_size": 2048,
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "train.batch_size": 8,
  "train.sequence_length": 256,
  "mesh.data": 1,
  "mesh.fsdp": 2,
  "mesh.expert": -1,
}

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is not installed; make test-tpu installs it",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """The command sets variables, which other tests should not see."""
  monkeypatch.setattr(os, "environ", dict(os.environ))


def refused(capsys, *arguments):
  assert aot.main(arguments) == 2
  captured = capsys.readouterr()
  (line,) = captured.err.splitlines()
  assert line.startswith("error: ") and not captured.out
  return line


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ([], "--experiment is missing"),
    (["--experiment=none.py"], "none.py: no such file"),
    ([f"--experiment={TINY}"], "--topology is missing"),
    ([f"--experiment={TINY}", "--topology=v9:2x2"], "v5e: 2x2, 2x4"),
    ([f"--experiment={TINY}", "--topology=v5p"], "v5p: 2x2x1"),
    ([f"--experiment={TINY}", "--topology=v5p:2x4"], "3 dimensions"),
    ([f"--experiment={TINY}", "--topology=v5e:3x4"], "first two of them even"),
    (
      [f"--experiment={TINY}", "--compare=losses.divergenceweight=0"],
      "did you mean losses.divergence_weight?",
    ),
    ([f"--experiment={TINY}", "--compare=seed"], "needs a value"),
    ([f"--experiment={TINY}", "--compare=seed=-1"], "seed=-1"),
    ([f"--experiment={TINY}", "--num_domains=0"], "num_domains"),
    ([f"--experiment={TINY}", "--toplogy=v5e:2x4"], "toplogy"),
    ([f"--experiment={TINY}", "v5e:2x4"], "unexpected argument 'v5e:2x4'"),
  ],
)
def test_wrong_command_line_is_one_line(capsys, arguments, named):
  assert named in refused(capsys, *arguments)


def test_missing_compiler_names_the_command_that_installs_it(
  capsys, monkeypatch
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  line = refused(capsys, f"--experiment={TINY}", "--topology=v5p:2x2x1")
  assert "python -m pip install libtpu==" in line
  pinned = (ROOT / "requirements-tpu.txt").read_text().split()
  assert topologies.LIBTPU in pinned


def test_links_of_a_corner_chip():
  def links(name):
    chip, shape = topologies.parse(name)
    return topologies.Topology(name, chip, shape, []).links()

  assert links("v5p:4x4x8") == (2, 2, 2)
  assert links("v5p:2x2x1") == (1, 1, 0)
  assert links("v5e:8x16") == (1, 2)
  for kind, chip in topologies.CHIPS.items():
    for shape in chip.slices:
      assert topologies.parse(f"{kind}:{shape}")[0] is chip


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
  ("form", "sent"),
  # Rows of 32 float32 numbers, of 8 x 64 tokens over 4 devices of one row each
  # way: to the 3 / 4 of 2 active experts that are elsewhere, or past 3 others.
  [
    ("gather", 0),
    ("ragged_all_to_all", 2 * 3 / 4),
    ("capacity", 1.5 * 2 * 3 / 4),
    ("ring", 3),
  ],
)
def test_forms_of_dispatch_send_tokens_or_experts(form, sent):
  experiment = config_files.load(
    TINY, {"moe.dispatch": form, "moe.capacity_factor": 1.5}
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
  if form == "gather":
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


TEMPORARIES = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for"
  " HLO temporaries (30.86G) exceeds available HBM (15.75G)."
)
TOTAL = (
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in"
  " memory space hbm. Used 20.50G of 512.00M hbm. Exceeded hbm capacity by ..."
)


def test_overflow_is_read_from_the_compilers_messages():
  parse = aot_compile.parse_overflow
  assert parse(TEMPORARIES) == (30.86 * 2**30, 15.75 * 2**30)
  assert parse(TOTAL) == (20.5 * 2**30, 2**29)
  other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 1M"
  assert parse(other) is None


def test_largest_arrays_are_those_of_a_chip():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  spec = PartitionSpec("a", "b")

  @jax.named_scope("widen")
  def local(x):
    return jax.lax.scan(lambda x, _: (x, x), x, length=32)[1].sum(0)

  def step(state):
    whole = jax.numpy.tile(state["x"], (100, 100))
    part = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    return part(state["x"]) + whole.sum()

  x = jax.ShapeDtypeStruct(
    (64, 64), np.float32, sharding=NamedSharding(mesh, spec)
  )
  jaxpr = jax.jit(step).trace({"x": x}).jaxpr
  (stacked,) = aot_compile.largest_arrays({"x": x}, jaxpr, 1)
  size = 32 * 16 * 4
  assert stacked[:2] == (32 * size, "float32[32,32,16]")
  assert "widen" in stacked.source and stacked.source.endswith("scan")
  assert (size, "float32[32,16]", "x") in aot_compile.largest_arrays(
    {"x": x}, jaxpr, 99
  )


def test_overflow_names_shortfall_and_arrays():
  topology = topologies.Topology("v5e:2x4", *topologies.parse("v5e:2x4"), [])
  largest = [aot_compile.Array(3 * 2**30, "float32[3]", "head/dot_general")]
  first, _, array = aot_report.describe_overflow(
    config_files.load(TINY),
    topology,
    aot_compile.DoesNotFit(20 * 2**30, 15.75 * 2**30, largest),
  )
  assert "needs 20.00 GiB and has 15.75 GiB, 4.25 GiB too little" in first
  assert array.split() == ["head/dot_general", "float32[3]", "3.00", "GiB"]


def test_parameter_table_has_every_byte_of_a_chip():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2, 1, 1), MESH_AXES)
  *_, last = aot_report.describe_parameters(parameters(mesh))
  assert last.split()[-1] == f"{4 * (256 / 4 + 8 + 128 / 2):.0f}"


def compile_small(topology, path, *arguments, **overrides):
  """Runs the command in a process of its own; JAX here is the CPU's."""
  keys = SMALL | overrides
  return subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.aot", f"--experiment={TINY}"),
      *(f"--experiment.{key}={value}" for key, value in keys.items()),
      *(f"--topology={topology}", f"--json={path}", *arguments),
    ],
    cwd=ROOT,
    # Flags of the CPU's compiler are not for the TPU's.
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    capture_output=True,
    text=True,
  )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x4"])
def test_collectives_of_small_slices(topology, tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small(topology, path, "--compare=losses.divergence_weight=0")
  assert ended.returncode == 0, ended.stderr
  run, without = json.loads(path.read_text())["runs"]
  facts = {
    kind: {key: figures[key] for key in ("count", "bytes")}
    for kind, figures in sorted(run["collectives"]["by_kind"].items())
  }
  golden = GOLDEN / f"aot_{topology.replace(':', '_')}.json"
  if "UPDATE_GOLDEN" in os.environ:
    golden.write_text(json.dumps(facts, indent=2) + "\n")
  assert facts == json.loads(golden.read_text())
  flops = run["hlo_flops"]
  # Rows are one block of attention, of which half is computed in vain.
  assert 1 < flops["total"] / run["model_flops"]["total"] < 1.5
  assert not flops["unknown_loops"]
  memory = run["memory"]
  assert memory["arguments"] < memory["peak"] < memory["capacity"]
  # What the divergence loss adds travels with sums that are sent anyway.
  for kind, figures in run["collectives"]["by_kind"].items():
    assert figures["count"] == without["collectives"]["by_kind"][kind]["count"]
  assert flops["total"] == pytest.approx(
    without["hlo_flops"]["total"], rel=1e-4
  )


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_ends_with_code_3(tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small(
    "v5e:2x4", path, **{"model.num_experts": 4096, "model.expert_width": 8192}
  )
  assert ended.returncode == 3, ended.stderr
  assert "does not fit v5e:2x4" in ended.stdout
  assert "GiB too little" in ended.stdout
  assert not path.exists()
