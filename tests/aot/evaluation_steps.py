"""Compiles a whole and a carved evaluation step, and a notebook's calls.

Prints FLOPs and memory of the former, and the kernels of the latter, as JSON:

  python -m tests.aot.evaluation_steps EXPERIMENT TOPOLOGY [KEY=VALUE ...]

A program of its own, as the TPU's compiler needs settings before JAX starts.
"""

import json
import sys

from edl_jax.aot import topologies

topologies.prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from edl_jax import config_files  # noqa: E402
from edl_jax.analysis.carve.curve import make_loss_step  # noqa: E402
from edl_jax.aot import compile as aot_compile  # noqa: E402
from edl_jax.aot import hlo, hlo_costs  # noqa: E402
from edl_jax.model.transformer import Model  # noqa: E402
from edl_jax.optim import make_optimizer  # noqa: E402
from edl_jax.runtime import compiler_options  # noqa: E402
from edl_jax.step import abstract_state  # noqa: E402
from edl_jax.tracing import abstract_batch  # noqa: E402


def main(path: str, name: str, *settings: str) -> None:
  overrides = dict(setting.split("=", 1) for setting in settings)
  experiment = config_files.load(path, overrides)
  model = experiment.model
  topology = topologies.load(name)
  mesh = aot_compile.make_mesh(experiment, topology)
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  state = abstract_state(experiment, optimizer, mesh)
  batch = abstract_batch(experiment, mesh)
  layers = model.num_layers - model.num_dense_layers
  kept_LE = jax.ShapeDtypeStruct(
    (layers, model.num_experts),
    bool,
    sharding=NamedSharding(mesh, PartitionSpec()),
  )
  found = {}
  for label, kept in (("whole", None), ("carved", kept_LE)):
    with jax.set_mesh(mesh):
      compiled = (
        make_loss_step()
        .trace(state.model, batch, kept)
        .lower()
        .compile(compiler_options(topology.devices[0]))
      )
    module = hlo.parse(compiled.as_text())
    costs = hlo_costs.costs(module, model.num_experts)
    analysis = compiled.cost_analysis()
    found[label] = {
      # Products and kernels, as often as they run.
      "flops": costs.flops,
      # Elementwise work too, but the body of the loop over layers once.
      "flops_of_bodies": analysis["flops"],
      "bytes_of_bodies": analysis["bytes accessed"],
      "peak": compiled.memory_analysis().peak_memory_in_bytes,
    }
  # A notebook's calls, with three rows for four chips.
  tokens_BT = jax.ShapeDtypeStruct(
    (3, experiment.train.sequence_length),
    jnp.int32,
    sharding=NamedSharding(mesh, PartitionSpec()),
  )
  for label, call in (
    ("logits", Model.__call__),
    ("token_routing", Model.token_routing),
  ):
    with jax.set_mesh(mesh):
      compiled = jax.jit(call).lower(state.model, tokens_BT).compile()
    module = hlo.parse(compiled.as_text())
    kernels = hlo_costs.costs(module, model.num_experts).kernels
    found[label] = sorted({kernel.name for kernel in kernels})
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
