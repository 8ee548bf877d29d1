"""What the TPU compiler estimates for a decode step; needs no TPU.

  python -m benchmarks.decode_tpu

compiles a step of generation, one token of each row, for a slice, and adds up
the cycles that the compiler estimates for each operation, times how often it
runs. Kernels, and copies and transfers in the background, have no estimate. Of
the tiles of experts' rows, whose number the routing decides, a layer takes one
for each expert of a chip.

Beside the estimate stands the least time that a chip's memory needs to read its
share of what the step reads: all parameters but idle experts, and the cache.

It needs requirements-tpu.txt, installed apart and on PYTHONPATH.
"""

import functools
import math
import re
import sys
import time

from edl_jax.aot import hlo, topologies
from edl_jax.command import Command

COMMAND = Command(__doc__)
_MODEL = COMMAND.flag(
  "model", "experiments/edl.py:3b", "Experiment whose model runs."
)
_TOPOLOGY = COMMAND.flag("topology", "v6e:2x4", "Slice to compile for.")
COMMAND.mesh(otherwise="expert=8")
_ROWS = COMMAND.flag("rows", 8, "Texts that grow at a time.", minimum=1)
_SLOTS = COMMAND.flag("slots", 2048, "Positions of the cache.", minimum=1)

# Hz. Google publishes none for v6e; this is v5p's.
_CLOCK = 1.75e9
# The compiler writes larger numbers where it has no estimate.
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,12})"')


def estimated_cycles(text: str, tiles: int) -> int:
  """Adds up the estimates of a program, from its optimised HLO.

  Args:
    tiles: turns of the loops over tiles of an expert's rows.
  """
  module = hlo.parse(text)
  times = hlo.executions(module, tiles)
  # Fusions have an estimate as a whole; what is inside has none.
  return sum(
    times[name] * int(found[1])
    for name, instructions in module.computations.items()
    for instruction in instructions.values()
    if (found := _CYCLES.search(instruction.attributes))
  )


@COMMAND.main
def main() -> None:
  """Compiles the step and prints its figures."""
  topologies.prepare_environment()
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from edl_jax import config_files, sharding
  from edl_jax.config import MeshConfig
  from edl_jax.model.cached import (
    CACHE_SPEC,
    advance,
    empty_cache,
    in_compute_dtype,
  )
  from edl_jax.model.transformer import abstract_model

  config = config_files.load(_MODEL.value).model
  topology = topologies.load(_TOPOLOGY.value)
  mesh_config = COMMAND.mesh_config or MeshConfig(data=1, expert=8)
  mesh = sharding.make_mesh(mesh_config, topology.devices)

  def placed(tree, spec):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
      ),
      tree,
    )

  model = abstract_model(config)
  shardings = sharding.parameter_shardings(model, mesh)
  model = jax.tree.map(
    lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
    jax.eval_shape(in_compute_dtype, model),
    shardings,
  )
  rows = _ROWS.value
  cache = placed(
    jax.eval_shape(functools.partial(empty_cache, config, rows, _SLOTS.value)),
    CACHE_SPEC,
  )
  by_row = PartitionSpec(sharding.ROW_AXES)
  one_BT = placed(jax.ShapeDtypeStruct((rows, 1), jnp.int32), by_row)
  last_B = placed(jax.ShapeDtypeStruct((rows,), jnp.int32), by_row)
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = jax.jit(advance, donate_argnums=4).lower(
      model, one_BT, one_BT, last_B, cache
    )
    compiled = lowered.compile()
  seconds = time.monotonic() - start
  tiles = config.num_experts // mesh.shape["expert"]
  cycles = estimated_cycles(compiled.as_text() or "", tiles)
  memory = compiled.memory_analysis()
  assert memory is not None
  share = _read_bytes(config, model, cache, rows)
  bandwidth = topology.chip.hbm_bandwidth
  print(
    f"{_MODEL.value} on {_TOPOLOGY.value},"
    f" {', '.join(f'{k}={v}' for k, v in mesh.shape.items() if v > 1)}:"
    f" {rows} rows, {_SLOTS.value} slots; compiled in {seconds:.0f} s\n"
    f"compiler's estimate  {cycles:,} cycles, {1e3 * cycles / _CLOCK:.2f} ms at"
    f" {_CLOCK / 1e9} GHz: {rows * _CLOCK / cycles:,.0f} tokens/s\n"
    f"memory's bound       {1e3 * share / bandwidth:.2f} ms for"
    f" {share / 2**30:.2f} GiB of a chip\n"
    f"arguments            {memory.argument_size_in_bytes / 2**30:.2f} GiB,"
    f" temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB of a chip"
  )


def _read_bytes(config, model, cache, rows) -> float:
  """Returns the bytes that a chip must read in a step."""
  import jax

  from edl_jax import sharding

  total = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    name = sharding.last_name(path)
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(shape) * leaf.dtype.itemsize
    if name in ("gate_up_EM2F", "down_EFM"):
      # Each chip holds all layers' share of the experts; at most this many of
      # them are active.
      active = min(rows * config.num_active_experts, config.num_experts)
      size *= active / config.num_experts
    elif name == "embedding_VM":
      size = 0
    total += size
  for leaf in jax.tree.leaves(cache):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


if __name__ == "__main__":
  sys.exit(main())
