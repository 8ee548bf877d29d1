"""What the compiler says of steps that do not fit, and the arrays in them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax.aot import compile as aot_compile
from edl_jax.config import DataConfig, Experiment

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


def test_number_of_domains_comes_from_flag_then_experiment():
  named = Experiment(data=DataConfig(domains=("code/python", "news")))
  assert aot_compile.make_taxonomy(named, None).fine == ("python", "news")
  assert len(aot_compile.make_taxonomy(named, 7).fine) == 7
  assert len(aot_compile.make_taxonomy(Experiment(), None).fine) == 49
