"""The largest arrays of steps that do not fit, and domains without data."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax.aot import compile as aot_compile
from edl_jax.config import DataConfig, Experiment


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
