"""The lines that the command prints."""

import pathlib

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax import config_files
from edl_jax.aot import compile as aot_compile
from edl_jax.aot import report as aot_report
from edl_jax.aot import topologies
from edl_jax.runtime import DoesNotFit
from edl_jax.sharding import MESH_AXES

TINY = str(pathlib.Path(__file__).parents[2] / "experiments" / "tiny.py")


def test_overflow_names_shortfall_and_arrays():
  topology = topologies.Topology("v5e:2x4", *topologies.parse("v5e:2x4"), [])
  largest = [aot_compile.Array(3 * 2**30, "float32[3]", "head/dot_general")]
  first, _, array = aot_report.describe_overflow(
    config_files.load(TINY),
    topology,
    aot_compile.Overflow(DoesNotFit(20 * 2**30, 15.75 * 2**30), largest),
  )
  assert "needs 20.00 GiB and has 15.75 GiB, 4.25 GiB too little" in first
  assert array.split() == ["head/dot_general", "float32[3]", "3.00", "GiB"]


def test_parameter_table_has_every_byte_of_a_chip():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2, 1, 1), MESH_AXES)
  parameters = {
    "head_MV": jax.ShapeDtypeStruct(
      (8, 16), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    ),
    "final_norm": {
      "scale": jax.ShapeDtypeStruct(
        (8,), np.float32, sharding=NamedSharding(mesh, PartitionSpec())
      )
    },
  }
  *_, last = aot_report.describe_parameters(parameters)
  assert last.split()[-1] == str(4 * (8 * 16 // 2 + 8))


def test_transfers_between_slices_have_rows_and_a_line():
  kind = {"count": 3, "bytes": 2e9, "sent_bytes": 1e9, "enclosing": 1}
  lines = aot_report._describe_collectives(
    config_files.load(TINY),
    topologies.Topology("v6e:2x2", *topologies.parse("v6e:2x2"), [], 4),
    {
      "by_kind": {"all-gather": kind},
      "between_slices": {
        "by_kind": {"all-reduce": kind},
        "sent_bytes": 1e9,
        "seconds": 0.08,
      },
      "sent_bytes": 2e9,
      "least_sent_bytes": 0,
    },
  )
  assert lines[3].split() == [
    *("all-reduce", "between", "slices", "3", "2e+09", "1e+09", "1")
  ]
  assert (
    "between slices 1e+09 bytes, at least 0.08 s at the 12.5 GB/s"
    in (lines[-1])
  )


def test_difference_counts_what_only_one_program_has():
  def figures(flops, places, **kinds):
    return {
      "hlo_flops": {"total": flops},
      "memory": {"temporaries": 10, "peak": 20},
      "collectives": {
        "by_kind": {
          kind.replace("_", "-"): {"count": 1, "sent_bytes": sent}
          for kind, sent in kinds.items()
        },
        "between_slices": {
          "by_kind": {"all-reduce": {"count": 2, "sent_bytes": flops}}
        },
        "sent_bytes": sum(kinds.values()),
      },
      "step_bound": {"seconds": 0.5},
      "estimate": {
        "step": {"low": 1.0, "high": 2.0},
        "places": [
          {"operation": name, "estimate": high, "roofline": low}
          for name, high, low in places
        ],
      },
    }

  lines = aot_report.describe_difference(
    "seed=1",
    figures(300, [("dot", 0.5, 0.1), ("sort", 0.0, 0.2)], all_gather=8),
    figures(
      200,
      [("dot", 0.3, 0.1), ("dot", 0.1, 0.0), ("add", 0.4, 0.1)],
      all_reduce=4,
    ),
  )
  start = lines.index("places outside kernels that differ most:")
  cells = {line.split("  ")[1]: line.split() for line in lines[1:start]}
  assert cells["compiled FLOPs"][-4:] == ["300", "200", "+100", "+50.0000%"]
  # No share of nothing.
  assert cells["all-gather sent"][-3:] == ["8", "0", "+8"]
  assert cells["all-reduce sent"][-4:] == ["0", "4", "-4", "-100.0000%"]
  assert cells["all-reduce between slices sent"][-4:-1] == [
    *("300", "200", "+100")
  ]
  # The largest difference comes first; places of one operation are added.
  assert [line.split() for line in lines[start + 2 :]] == [
    ["0.0", "400.0", "-400.0", "add"],
    ["200.0", "0.0", "+200.0", "sort"],
    ["500.0", "400.0", "+100.0", "dot"],
  ]


def test_equal_estimates_have_no_table():
  figures = {
    "estimate": {
      "places": [{"operation": "dot", "estimate": 0.5, "roofline": 0.1}]
    }
  }
  (line,) = aot_report._difference_by_place(figures, figures)
  assert "the same estimate" in line
