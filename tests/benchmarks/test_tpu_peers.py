"""The comparison with MaxText by compile: refusals, and figures of a program.

The compiles themselves take minutes and an environment of their own.
"""

import types

import numpy as np
import pytest

from benchmarks import tpu_contestants, tpu_peers
from edl_jax import config_files
from edl_jax.aot import topologies
from edl_jax.aot.topologies import Topology

# Four chips in a square gather, multiply and run a kernel of four experts.
_STEP = """\
HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[64,32], b: f32[32,16], w: f32[4,32,16]) -> f32[256,16] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[32,16]{1,0} parameter(1)
  %w = f32[4,32,16]{2,1,0} parameter(2)
  %copy.1 = f32[64,32]{1,0} copy(%a), backend_config={"estimated_cycles":"1000"}
  %shard_map.1 = f32[64,16]{1,0} custom-call(%copy.1, %w),\
 custom_call_target="tpu_custom_call"
  %gather.1 = f32[256,32]{1,0} all-gather(%copy.1), channel_id=1,\
 replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %dot.1 = f32[256,16]{1,0} dot(%gather.1, %b), lhs_contracting_dims={1},\
 rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (["--topology=v9:2x2"], "--topology=v9:2x2: unknown"),
    (["--rows=0"], "rows"),
    (["--contestants=theirs"], "theirs"),
    (
      ["--experiment.model.num_shared_experts=1"],
      "model.num_shared_experts=1: only models with num_shared_experts=0",
    ),
  ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(capsys, arguments, named):
  assert tpu_peers.main(arguments) == 2
  captured = capsys.readouterr()
  (line,) = captured.err.splitlines()
  assert line.startswith("error: ") and named in line and not captured.out


def test_every_chip_has_as_many_rows():
  experiment = config_files.load("experiments/edl.py:15b")
  found = tpu_peers.experiment_of_slice(experiment, 8, 2)
  assert found.train.batch_size == 16
  assert experiment.train.batch_size == 1024


def test_figures_of_a_program_by_hand():
  chip = topologies.CHIPS["v5p"]._replace(
    flops=1e6, clock=1e3, hbm_bandwidth=1e4, link_bandwidth=1e3
  )
  devices = np.array(
    [types.SimpleNamespace(coords=(x, y, 0)) for x in (0, 1) for y in (0, 1)]
  )
  topology = Topology("v5p:2x2x1", chip, (2, 2, 1), list(devices))
  memory = types.SimpleNamespace(
    argument_size_in_bytes=2**30,
    temp_size_in_bytes=2**31,
    peak_memory_in_bytes=3 * 2**30,
  )
  program = tpu_contestants.Program(
    _STEP, memory, types.SimpleNamespace(devices=devices), 5.0
  )
  found = tpu_contestants.figures(program, topology, 4, 1e5)
  row = tpu_peers.row("ours", found)
  copy, product = 2 * 4 * 64 * 32, 4 * (256 * 32 + 32 * 16 + 256 * 16)
  sent = 3 * 4 * 64 * 32
  assert row["estimate"] == 1.0
  assert row["roofline"] == pytest.approx((copy + product) / 1e4)
  assert row["kernels"] == pytest.approx(2 * 64 * 32 * 16 / 1e6)
  # A chip at a corner has one neighbour along each of two dimensions.
  assert row["waits"] == pytest.approx(sent / 2e3)
  fixed = row["kernels"] + row["waits"]
  assert row["low"] == pytest.approx(row["roofline"] + fixed)
  assert row["high"] == pytest.approx(1.0 + product / 1e4 + fixed)
  assert row["sent"] == row["in waits"] == pytest.approx(sent / 2**30)
  assert (row["arguments"], row["temporaries"], row["peak"]) == (1, 2, 3)
  assert not found["unknown_kernels"] and not found["unknown_loops"]


def test_seconds_without_some_kernels_are_not_compared():
  def figures(high, low, *unknown):
    step = {"high": high, "low": low}
    return {"unknown_kernels": list(unknown), "estimate": {"step": step}}

  found = {"maxtext": figures(4.0, 2.0), "ours": figures(3.0, 1.0)}
  (line,) = tpu_peers.conclusion(found)
  assert line.startswith("our step is 25% below MaxText's by estimate, 50% by")
  found["maxtext"] = figures(4.0, 2.0, "shard_map")
  (line,) = tpu_peers.conclusion(found)
  assert line.startswith("maxtext: ") and line.endswith("compared: shard_map")
