"""The settings of a process, in processes of their own."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from edl_jax import runtime

ROOT = Path(__file__).parent.parent

COMPILE = """
import jax, sys
from edl_jax import runtime
runtime.configure()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.monitoring.register_event_listener(
  lambda name, **_: print(name) if "compilation_cache/cache_" in name else None
)
jax.jit(lambda x: x * 2 + 1)(3.0)
"""

# Temporaries as XLA allocates them, on another thread than the main one.
ALLOCATE = """
import ctypes, resource, sys, threading
from edl_jax import runtime
if sys.argv[1] == "configured":
  runtime.configure()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def touch():
  for _ in range(10):
    memory = libc.malloc(ctypes.c_size_t(2**28))
    ctypes.memset(memory, 1, 2**28)
    libc.free(ctypes.c_void_p(memory))

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=touch)
  thread.start()
  thread.join()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def run(program, *arguments, **environment):
  inherited = {
    key: value
    for key, value in os.environ.items()
    if key != "JAX_COMPILATION_CACHE_DIR"
  }
  ended = subprocess.run(
    [sys.executable, "-c", program, *arguments],
    cwd=ROOT,
    env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.split()


def test_second_start_finds_compiled_programs(tmp_path):
  first = run(COMPILE, EDL_JAX_CACHE=str(tmp_path))
  second = run(COMPILE, EDL_JAX_CACHE=str(tmp_path))
  assert "/jax/compilation_cache/cache_misses" in first
  assert "/jax/compilation_cache/cache_hits" in second
  assert "/jax/compilation_cache/cache_misses" not in second
  [processor] = (tmp_path / "compiled").iterdir()
  assert any(processor.iterdir())


def test_the_users_own_choice_of_cache_is_left_alone(tmp_path):
  ours, theirs = tmp_path / "ours", tmp_path / "theirs"
  run(COMPILE, EDL_JAX_CACHE=str(ours), JAX_COMPILATION_CACHE_DIR=str(theirs))
  assert any(theirs.iterdir())
  assert not ours.exists()


@pytest.mark.skipif(
  not sys.platform.startswith("linux")
  or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
  reason="mallopt belongs to glibc",
)
def test_freed_memory_is_not_faulted_in_again():
  [by_default] = map(int, run(ALLOCATE, "default"))
  [configured] = map(int, run(ALLOCATE, "configured"))
  pages = 10 * 2**28 // os.sysconf("SC_PAGE_SIZE")
  # Huge pages would make both small: then there is nothing to save.
  if by_default < pages // 2:
    pytest.skip("pages are not faulted in one by one here")
  assert configured < pages // 100


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("cpu", None),
  ],
)
def test_peaks_of_devices(kind, peak):
  device = types.SimpleNamespace(device_kind=kind)
  assert runtime.peak_flops(device) == peak


TEMPORARIES = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for"
  " HLO temporaries (30.86G) exceeds available HBM (15.75G)."
)
TOTAL = (
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in"
  " memory space hbm. Used 20.50G of 512.00M hbm. Exceeded hbm capacity by ..."
)


def test_overflow_is_read_from_the_compilers_messages():
  for message, needed, available in (
    (TEMPORARIES, 30.86 * 2**30, 15.75 * 2**30),
    (TOTAL, 20.5 * 2**30, 2**29),
  ):
    found = runtime.parse_overflow(message)
    assert found and (found.needed, found.available) == (needed, available)
  other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 1M"
  assert runtime.parse_overflow(other) is None


def test_options_that_xla_does_not_know_are_left_out(monkeypatch, capsys):
  # Of options for TPUs, a CPU's compiler knows none.
  known = {"xla_backend_optimization_level": 0}
  monkeypatch.setattr(
    runtime, "compiler_options", lambda _: {**runtime._TPU_OPTIONS, **known}
  )
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  assert runtime.compile_program(lowered, jax.devices()[0])(1.0) == 2
  told = capsys.readouterr().err
  for name in runtime._TPU_OPTIONS:
    assert f"left out {name}, which this XLA does not know\n" in told
  assert "optimization_level" not in told


def test_other_errors_of_the_compiler_stay(monkeypatch):
  options = {"xla_backend_optimization_level": "high"}
  monkeypatch.setattr(runtime, "compiler_options", lambda _: options)
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  with pytest.raises(jax.errors.JaxRuntimeError, match="optimization_level"):
    runtime.compile_program(lowered, jax.devices()[0])


def device(kind):
  return types.SimpleNamespace(platform="tpu", device_kind=kind)


# Together they may corrupt what other chips than v5e compute, says libtpu.
UNSAFE = (
  "xla_tpu_enable_async_collective_fusion",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)


@pytest.mark.parametrize(
  "kind", ["TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x", "TPU v9"]
)
def test_unsafe_options_are_set_on_v5e_alone(kind):
  options = runtime.compiler_options(device(kind))
  assert not any(options.get(name) for name in UNSAFE)
  v5e = runtime.compiler_options(device("TPU v5 lite"))
  assert all(v5e[name] for name in UNSAFE)
  assert not any("sparse_core" in name for name in v5e)


def test_other_platforms_have_no_options():
  cpu = types.SimpleNamespace(platform="cpu", device_kind="cpu")
  assert runtime.compiler_options(cpu) == {}


# Compiles a loop that gathers weights and scatters a sum, as training does.
COMPILE_FOR_TPUS = """
from edl_jax.aot import topologies
topologies.prepare_environment()
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from edl_jax.runtime import compiler_options

def local(x, stack):
  def layer(x, w):
    return jnp.tanh(x @ jax.lax.all_gather(w, "x", tiled=True)), None
  x, _ = jax.lax.scan(layer, x, stack)
  return jax.lax.psum_scatter(x, "x", tiled=True)

for name in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:2x2", "tpu7x:2x2x1"):
  devices = topologies.load(name).devices
  mesh = Mesh(devices, "x")
  whole, rows, stack = (
    NamedSharding(mesh, PartitionSpec(*axes))
    for axes in ((), ("x",), (None, "x"))
  )
  function = jax.shard_map(
    local, mesh=mesh, in_specs=(whole.spec, stack.spec), out_specs=rows.spec,
    check_vma=False,
  )
  jax.jit(function).lower(
    jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=whole),
    jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16, sharding=stack),
  ).compile(compiler_options(devices[0]))
  print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "python",
  [sys.executable, *os.environ.get("EDL_JAX_TPU_PYTHONS", "").split()],
)
def test_compilers_take_the_options(python):
  """Further interpreters with their own jax and libtpu: see the Makefile."""
  if python == sys.executable:
    pytest.importorskip("libtpu", reason="needs the compiler of TPUs: libtpu")
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  if python != sys.executable:
    # This holds the compiler of this interpreter's jax.
    environment.pop("PYTHONPATH", None)
  ended = subprocess.run(
    [python, "-c", COMPILE_FOR_TPUS],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr[-2000:]
  assert ended.stdout.split() == [
    *("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:2x2", "tpu7x:2x2x1")
  ]
