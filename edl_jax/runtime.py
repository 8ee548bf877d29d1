"""Settings of the process that make starts and steps faster.

`configure` is called by programs before JAX finds its devices, never by the
library's functions, whose callers decide about their own process.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys

import jax

from edl_jax.cache import cache_directory

# What makes the TPU compiler send and compute at once. Gathers of weights are
# cut in steps that run inside the fusions before they are needed, ...
_TPU_OPTIONS = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
  "xla_tpu_overlap_compute_collective_tc": True,
}
# ... and gradients are reduced and scattered by the SparseCores, of chips that
# have these and where the compiler can use them so.
_SPARSE_CORE_OPTIONS = {
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_reduce_scatter_offload_tracing": True,
}
_SPARSE_CORE_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite")

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def configure() -> None:
  """Keeps compiled programs for the next start, and freed memory for reuse.

  Programs that took a second or more to compile are kept in the cache
  directory, or where JAX_COMPILATION_CACHE_DIR says (empty: nowhere). Without
  an accelerator machine code is optimised at level 1, unless XLA_FLAGS says
  otherwise.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = cache_directory() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
  if _computes_on_cpu():
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
      # Higher levels compile up to three times as long, to code as fast.
      os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1"
    if sys.platform == "linux":
      _keep_freed_memory()


def compiler_options(device: jax.Device) -> dict[str, bool]:
  """Returns XLA's options for a training step on devices of this kind."""
  if device.platform != "tpu":
    return {}
  sparse = device.device_kind in _SPARSE_CORE_KINDS
  return _TPU_OPTIONS | (_SPARSE_CORE_OPTIONS if sparse else {})


def _processor() -> str:
  """A short name for this kind of processor.

  CPU programs use the instructions of the machine that compiled them, and home
  directories are shared between machines.
  """
  features = [platform.machine(), platform.processor()]
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      # "flags" on x86, "Features" on ARM; the same for every core.
      features += sorted(
        {line for line in file if line[:4] in ("flag", "Feat")}
      )
  return hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]


def _computes_on_cpu() -> bool:
  """Whether JAX will find no accelerator, without starting it."""
  if platforms := os.environ.get("JAX_PLATFORMS"):
    return platforms == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return not plugins and importlib.util.find_spec("libtpu") is None


def _keep_freed_memory() -> None:
  """Tells glibc not to give freed memory back to the system.

  XLA allocates the temporaries of a step when it starts and frees them at its
  end. By default each step then faults in every page anew, which took 8% to
  18% of the step of `experiments/bench.py`.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:  # Another C library.
    return
  # Only the main arena grows without maps; a limit holds from now on, so call
  # this before threads start.
  mallopt(_ARENA_MAX, 1)
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, -1)
