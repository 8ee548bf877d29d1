"""Settings of the process that make starts and steps faster.

Programs call `configure` before JAX finds its devices. The library's functions
never call it: their callers decide about their own process.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from edl_jax.cache import cache_directory
from edl_jax.config import UserError

# Options of the TPU compiler that overlap communication with computation. Each
# is in libtpu 0.0.42.1 and 0.0.46.3. docs/tpu.md says what each one does.
_TPU_OPTIONS: dict[str, str | bool] = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_overlap_compute_collective_tc": True,
}
# v5e has no SparseCores. The TensorCore gathers there, in steps inside earlier
# fusions. On other chips these options together can corrupt results silently:
# libtpu 0.0.46.3 refuses them there, and 0.0.42.1 does not.
_FUSION_OPTIONS: dict[str, str | bool] = {
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
}
_FUSION_KINDS = ("TPU v5 lite", "TPU v5e")
# SparseCores gather weights, and reduce and scatter gradients.
_SPARSE_CORE_OPTIONS: dict[str, str | bool] = {
  # On by default in some versions, and unsafe here; see above.
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
  "xla_tpu_enable_all_gather_offload_tracing": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_reduce_scatter_offload_tracing": True,
}
_SPARSE_CORE_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x")

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


# Published peaks of dense bfloat16 products, in FLOP/s of a JAX device, by the
# start of its kind. The first that fits counts.
_PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  # A chip has two devices.
  "TPU7x": 2307e12 / 2,
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
  """Returns a device's published FLOP/s in bfloat16; None if not known here.

  Args:
    device: a `jax.Device`, which jaxlib does not declare as a type.
  """
  kind = device.device_kind
  return next((x for name, x in _PEAKS.items() if kind.startswith(name)), None)


def configure() -> None:
  """Keeps compiled programs for the next start, and freed memory for reuse.

  JAX keeps programs that took a second or more to compile in the cache folder,
  or in JAX_COMPILATION_CACHE_DIR (empty: nowhere). Without an accelerator, XLA
  optimises machine code at level 1, unless XLA_FLAGS sets another level.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = cache_directory() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
  if _computes_on_cpu():
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
      # Higher levels take up to three times as long to compile, for code that
      # is no faster.
      os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1"
    if sys.platform == "linux":
      _keep_freed_memory()


def join_processes(content: Any, what: str) -> None:
  """Joins the program's other processes, and checks that they agree.

  Call this before the process uses a device.

  Args:
    content: what all processes must have in common, as JSON can hold it.
    what: the content in a few words, for messages.

  Raises:
    UserError: the processes cannot meet, or their contents differ.
  """
  # JAX itself reads the address and the variables of a cluster's launcher.
  count, index = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
  try:
    jax.distributed.initialize(
      num_processes=int(count) if count else None,
      process_id=int(index) if index else None,
    )
  except (ValueError, RuntimeError) as error:
    reason = str(error).partition("\n")[0]
    raise UserError(
      f"--distributed: {reason}; outside of TPU pods and Slurm every process"
      " needs JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and, from 0,"
      " JAX_PROCESS_ID"
    ) from error
  digest = hashlib.sha256(json.dumps(content).encode()).digest()
  own = np.frombuffer(digest, np.uint8)
  if (multihost_utils.process_allgather(own) != own).any():
    raise UserError(
      f"--distributed: the processes differ in {what}; give all the same"
      " command and files"
    )


def compiler_options(device: Any) -> dict[str, str | bool]:
  """Returns XLA's options for a training step on `device`.

  Args:
    device: a `jax.Device`, which jaxlib does not declare as a type.
  """
  if device.platform != "tpu":
    return {}
  options = dict(_TPU_OPTIONS)
  if device.device_kind in _FUSION_KINDS:
    options |= _FUSION_OPTIONS
  if device.device_kind in _SPARSE_CORE_KINDS:
    options |= _SPARSE_CORE_OPTIONS
  return options


class DoesNotFit(UserError):
  """A device's memory does not hold a program.

  Attributes:
    needed, available: bytes.
  """

  def __init__(self, needed: float, available: float):
    super().__init__(
      f"the step needs {needed / 2**30:.2f} GiB of a device, which has"
      f" {available / 2**30:.2f}; use more devices along mesh.fsdp, a smaller"
      " train.batch_size or model.logits_elements, or model.remat=auto where it"
      " is not set"
    )
    self.needed = needed
    self.available = available


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_overflow(message: str) -> DoesNotFit | None:
  """Reads what a compiler says of a program that does not fit.

  Args:
    message: from the compiler.

  Returns:
    None if the message is about anything else.
  """
  size = r"([\d.]+)([KMGT]?)"
  found = re.search(
    rf"required for HLO temporaries \({size}\) exceeds available HBM"
    rf" \({size}\)",
    message,
  ) or re.search(rf"memory space hbm\. Used {size} of {size} hbm", message)
  if not found:
    return None
  needed, unit, available, available_unit = found.groups()
  return DoesNotFit(
    float(needed) * _UNITS[unit], float(available) * _UNITS[available_unit]
  )


def memory_limit(device: Any) -> float | None:
  """Returns the bytes that programs may use on a GPU; None elsewhere.

  The TPU's compiler knows its chips' memory itself, and the memory of a CPU is
  shared with all that runs there.
  """
  if device.platform != "gpu":
    return None
  return (device.memory_stats() or {}).get("bytes_limit")


def compile_program(
  lowered: jax.stages.Lowered, device: Any
) -> jax.stages.Compiled:
  """Compiles a training step for `device` with `compiler_options`.

  The device is one of this process, or only described. Options come and go
  between versions of XLA: those that the installed one does not know are left
  out, with a line on stderr.

  Raises:
    DoesNotFit: the memory of a TPU or GPU does not hold the step.
  """
  options = compiler_options(device)
  while True:
    try:
      compiled = lowered.compile(options)
      break
    except jax.errors.JaxRuntimeError as error:
      if overflow := parse_overflow(str(error)):
        raise overflow from error
      found = re.search(r"No such compile option: '(\w+)'", str(error))
      if found is None or found[1] not in options:
        raise
      name = found[1]
    del options[name]
    print(f"left out {name}, which this XLA does not know", file=sys.stderr)
  limit, memory = memory_limit(device), compiled.memory_analysis()
  if limit is not None and memory:
    needed = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )
    if needed > limit:
      raise DoesNotFit(needed, limit)
  return compiled


def _processor() -> str:
  """Returns a short name for this kind of processor.

  Machines with different processors may share a home directory, and a compiled
  CPU program uses the instructions of the machine that compiled it.
  """
  features = [platform.machine(), platform.processor()]
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      # The key is "flags" on x86 and "Features" on ARM.
      features += sorted(
        {line for line in file if line[:4] in ("flag", "Feat")}
      )
  return hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]


def _computes_on_cpu() -> bool:
  """Returns whether JAX will find no accelerator; does not start JAX."""
  if platforms := os.environ.get("JAX_PLATFORMS"):
    return platforms == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return not plugins and importlib.util.find_spec("libtpu") is None


def _keep_freed_memory() -> None:
  """Tells glibc not to return freed memory to the system.

  XLA allocates a step's temporaries when the step starts, and frees them when
  it ends. By default every step then faults in each page again, which took 8%
  to 18% of a step of `experiments/bench.py`.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:  # The C library is not glibc.
    return
  # Only the main arena grows without mmap. The limit on arenas does not affect
  # those that exist, so this must run before threads start.
  mallopt(_ARENA_MAX, 1)
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, -1)
