"""Compiles the training step of one contestant of `benchmarks.tpu_peers`.

This program runs in MaxText's environment, whose JAX and TPU compiler serve
both contestants. It takes the request as JSON on the command line, and prints
the answer as JSON on its last line.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# Behind the packages of the environment, so that a peer finds its own.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import contestants
from edl_jax import config, runtime
from edl_jax.aot import bounds, estimates, hlo, hlo_costs, topologies
from edl_jax.aot import compile as aot_compile
from edl_jax.aot.topologies import Topology


class Request(NamedTuple):
  """What to compile."""

  # A key of CONTESTANTS.
  contestant: str
  # The experiment by dotted key, as `edl_jax.config.flatten` gives it.
  experiment: dict[str, Any]
  # Chip and shape of the slice, such as "v5p:4x4x4".
  topology: str
  # Number of domains in our objective.
  num_domains: int


class Program(NamedTuple):
  """A compiled training step."""

  # Optimised HLO text.
  text: str
  # jaxlib's CompiledMemoryStats.
  memory: Any
  mesh: Any
  # Time to lower and compile.
  seconds: float


def ours(request: Request, topology: Topology) -> Program:
  """Compiles the step that `edl_jax.main` would run."""
  experiment = config.unflatten(request.experiment)
  step = aot_compile.compile_step(experiment, topology, request.num_domains)
  return Program(step.text, step.memory, step.mesh, step.seconds)


# The flags that MaxText recommends, but one that its compiler does not know:
# SparseCores gather, scatter and reduce, or on v5e, which has none, the
# TensorCore gathers inside of other fusions.
_SPARSE_CORE_FLAGS = {
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
  "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
  "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
  "xla_tpu_enable_all_gather_offload_tracing": True,
  "xla_tpu_enable_reduce_scatter_offload_tracing": True,
  "xla_tpu_enable_all_reduce_offload_tracing": True,
  "xla_tpu_use_tc_device_shape_on_sc": True,
  "xla_sc_enable_instruction_fusion": False,
  "xla_sc_disable_megacore_partitioning": True,
}
_FUSION_FLAGS = {
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_overlap_compute_collective_tc": True,
  "xla_enable_async_all_gather": True,
}


def maxtext_settings(request: Request, topology: Topology) -> dict[str, Any]:
  """Returns the settings of MaxText, by the names of its configuration.

  These were its best for `experiments/edl.py:15b` on v5p:4x4x4: weights spread
  over all chips along one axis, blocks of 1,024 in attention with the fused
  backward kernel, tokens gathered from where they are instead of copied first,
  and experts' outputs summed in bfloat16.
  """
  flat, chips = request.experiment, len(topology.devices)
  is_v5e = topology.name.startswith("v5e:")
  flags = _FUSION_FLAGS if is_v5e else _SPARSE_CORE_FLAGS
  block = min(1024, flat["train.sequence_length"])
  return contestants.maxtext_model(flat) | {
    "internal_compile": True,
    "internal_compile_num_devices": chips,
    "compile_topology": topology.name,
    "compile_topology_num_slices": 1,
    "compile_xla_flags": " ".join(
      f"--{name}={str(value).lower()}" for name, value in flags.items()
    ),
    "steps": flat["train.num_steps"],
    "per_device_batch_size": flat["train.batch_size"] // chips,
    "ici_fsdp_parallelism": chips,
    "decoder_block": "qwen3_moe",
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "rope_max_timescale": int(flat["model.rope_theta"]),
    "normalization_layer_epsilon": flat["model.norm_epsilon"],
    "attention": "flash",
    "remat_policy": "full",
    "sa_use_fused_bwd_kernel": True,
    **{
      f"sa_block_{name}": block
      for name in (
        *("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"),
        *("q_dq", "kv_dq"),
      )
    },
    "moe_use_direct_token_gather": True,
    "float32_weight_sum": False,
  }


def maxtext(request: Request, topology: Topology) -> Program:
  """Compiles by MaxText's own program for compiling ahead of time."""
  from maxtext.trainers.pre_train import train_compile

  compile_step = train_compile.jit_and_compile
  programs = []

  def noted(step: Any, inputs: Any, keywords: Any, mesh: Any, *rest: Any):
    start = time.monotonic()
    compiled = compile_step(step, inputs, keywords, mesh, *rest)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    programs.append(Program(compiled.as_text(), memory, mesh, seconds))
    return compiled

  train_compile.jit_and_compile = noted
  settings = maxtext_settings(request, topology)
  train_compile.main(contestants.maxtext_arguments(settings))
  (program,) = programs
  return program


CONTESTANTS: dict[str, Callable[[Request, Topology], Program]] = {
  "ours": ours,
  "maxtext": maxtext,
}


def name_grouped_products(module: hlo.Module) -> None:
  """Gives megablox's kernels their names, which MaxText's programs leave out.

  By shape: (R, M) and (E, M, F) make (R, F), or (R, M) and (R, F) (E, M, F).
  """
  names = {((2, 3), 2): "gmm", ((2, 2), 3): "tgmm"}
  for computation in module.computations.values():
    for key, instruction in computation.items():
      kernel = hlo_costs.kernel_name(instruction)
      if kernel not in ("tpu_custom_call", "shard_map"):
        continue
      ranks = tuple(
        len(array.shape)
        for array in hlo_costs.operand_arrays(instruction, computation)
        if len(array.shape) > 1 and "f" in array.dtype
      )
      name = names.get((ranks, len(instruction.arrays[0].shape)), kernel)
      computation[key] = instruction._replace(name=name)


def figures(
  program: Program, topology: Topology, num_experts: int, model_flops: float
) -> dict[str, Any]:
  """Returns what `edl_jax.aot` says of a program, whoever wrote it.

  Args:
    program: a training step.
    topology: what it was compiled for.
    num_experts: E.
    model_flops: of a step on one chip.
  """
  chip = topology.chip
  module = hlo.parse(program.text)
  name_grouped_products(module)
  costs = hlo_costs.costs(module, num_experts)

  def seconds(collectives: list[hlo_costs.Collective]) -> float:
    return bounds.interconnect_seconds(collectives, topology, program.mesh)

  waited = [one for one in costs.collectives if not one.is_async]
  least = max(costs.flops / chip.flops, seconds(costs.collectives))
  return {
    "memory": {
      "arguments": program.memory.argument_size_in_bytes,
      "temporaries": program.memory.temp_size_in_bytes,
      "peak": program.memory.peak_memory_in_bytes,
    },
    "sent_bytes": sum(one.wire_bytes for one in costs.collectives),
    "synchronous_bytes": sum(one.wire_bytes for one in waited),
    "unknown_kernels": [x.name for x in costs.kernels if x.flops is None],
    "unknown_loops": costs.unknown_loops,
    "compile_seconds": program.seconds,
    "estimate": estimates.figures(
      *(estimates.estimate(module, chip), costs, seconds(waited), least),
      *(chip, model_flops),
    ),
  }


@contextmanager
def overflow_in_a_line() -> Iterator[None]:
  """Ends the process with one line if a chip's memory is too small."""
  import jax

  try:
    yield
  except (runtime.DoesNotFit, jax.errors.JaxRuntimeError) as error:
    overflow = error
    if not isinstance(overflow, runtime.DoesNotFit):
      overflow = runtime.parse_overflow(str(error))
    if overflow is None:
      raise
    needed, available = overflow.needed / 2**30, overflow.available / 2**30
    sys.exit(f"a chip needs {needed:,.1f} GiB and has {available:,.1f}")


def main(text: str) -> None:
  from edl_jax.model.transformer import training_flops

  request = Request(**json.loads(text))
  topology = topologies.load(request.topology)
  experiment = config.unflatten(request.experiment)
  flops = training_flops(
    experiment.model,
    experiment.train.batch_size,
    experiment.train.sequence_length,
  )
  with overflow_in_a_line():
    program = CONTESTANTS[request.contestant](request, topology)
  answer = figures(
    program,
    topology,
    experiment.model.num_experts,
    sum(flops.values()) / len(topology.devices),
  )
  answer["versions"] = {
    name: importlib.metadata.version(name)
    for name in ("jax", "libtpu", "maxtext")
  }
  print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
