"""Compiles a training step for a slice of TPUs, without a TPU."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.aot.topologies import Topology
from edl_jax.config import Experiment
from edl_jax.optim import make_optimizer
from edl_jax.runtime import compile_program
from edl_jax.step import abstract_state, make_train_step
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy, load_taxonomy

# The paper's finer taxonomy; for experiments that leave domains to the data.
NUM_DOMAINS = 49

# How many arrays the report names where a step does not fit.
_NUM_LARGEST = 5


class Array(NamedTuple):
  """A value that a chip holds."""

  bytes: int
  # Dtype and shape on one chip, such as "bfloat16[64,2048]".
  type: str
  # The argument's name, or the part of the program that makes the value.
  source: str


class DoesNotFit(Exception):
  """The compiler found that the step exceeds a chip's memory.

  Attributes:
    needed, available: bytes.
    largest: arguments and intermediate values, the largest first.
  """

  def __init__(self, needed: float, available: float, largest: list[Array]):
    super().__init__(needed, available)
    self.needed = needed
    self.available = available
    self.largest = largest


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_overflow(message: str) -> tuple[float, float] | None:
  """Reads the bytes that a step needs and that a chip has.

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
  return (
    float(needed) * _UNITS[unit],
    float(available) * _UNITS[available_unit],
  )


def largest_arrays(arguments: Any, jaxpr: Any, count: int) -> list[Array]:
  """Returns the largest arrays on a chip, if the compiler fuses none away.

  The compiler does not name them. This counts arguments, and values inside of
  `shard_map`, whose shapes are a chip's own; one array of each type.

  Args:
    arguments: `ShapeDtypeStruct`s with shardings.
    jaxpr: the traced step.
    count: how many arrays to return.
  """
  found: dict[str, Array] = {}

  def add(shape: tuple[int, ...], dtype: Any, source: str) -> None:
    size = math.prod(shape) * dtype.itemsize
    name = f"{dtype}[{','.join(map(str, shape))}]"
    found.setdefault(name, Array(size, name, source))

  for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
    name = sharding.path_name(path)
    add(leaf.sharding.shard_shape(leaf.shape), leaf.dtype, name)

  def visit(jaxpr: Any, source: str, is_local: bool) -> None:
    for equation in jaxpr.eqns:
      stack = str(equation.source_info.name_stack)
      place = "/".join(filter(None, (source, stack)))
      for value in equation.outvars if is_local else ():
        if hasattr(value.aval, "shape"):
          name = f"{place}/{equation.primitive.name}"
          add(value.aval.shape, value.aval.dtype, name)
      inside = is_local or equation.primitive.name == "shard_map"
      parameters = dict(equation.params)
      if platforms := parameters.get("branches_platforms"):
        # Follow the branch for TPUs, or the default, which names no platform.
        chosen = next(
          i
          for i, names in enumerate(platforms)
          if names is None or "tpu" in names
        )
        parameters["branches"] = parameters["branches"][chosen]
      for parameter in parameters.values():
        several = isinstance(parameter, (tuple, list))
        for item in parameter if several else (parameter,):
          inner = getattr(item, "jaxpr", item)
          if hasattr(inner, "eqns"):
            visit(inner, place, inside)

  visit(jaxpr.jaxpr, "", False)
  return sorted(found.values(), reverse=True)[:count]


class Step(NamedTuple):
  """A compiled training step, as one chip runs it."""

  # The model's parameters, as `ShapeDtypeStruct`s with shardings.
  parameters: Any
  # The mesh that the step is compiled for.
  mesh: Mesh
  # jaxlib's CompiledMemoryStats.
  memory: Any
  # Optimised HLO text.
  text: str
  # Time to lower and compile.
  seconds: float


def make_mesh(experiment: Experiment, topology: Topology) -> Mesh:
  """Lays the slice's chips out on the experiment's mesh.

  Raises:
    UserError: the mesh does not fit the slice, the model or the batch.
  """
  mesh = sharding.make_mesh(experiment.mesh, topology.devices)
  sharding.check_divisible(experiment, mesh)
  return mesh


def make_taxonomy(experiment: Experiment, num_domains: int | None) -> Taxonomy:
  """Returns domains in place of those that the data would name.

  Only their number changes the program.

  Args:
    experiment: names domains in `data.domains` or `data.taxonomy`, or nowhere.
    num_domains: D, instead of the experiment's. None takes the experiment's, or
      49 if it names none.
  """
  data = experiment.data
  if num_domains is None and data.taxonomy:
    return load_taxonomy(data.taxonomy)
  names = data.domains
  if num_domains is not None or not names:
    names = [f"domain{i}" for i in range(num_domains or NUM_DOMAINS)]
  return Taxonomy.from_names(names)


def abstract_batch(experiment: Experiment, mesh: Mesh) -> Batch:
  """Returns a global batch with shapes in place of arrays."""
  train = experiment.train

  def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (train.batch_size, *shape), dtype, sharding=sharding.row_sharding(mesh)
    )

  by_token = train.sequence_length
  return Batch(
    tokens_BT=rows(jnp.int32, by_token),
    targets_BT=rows(jnp.int32, by_token),
    segments_BT=rows(jnp.int32, by_token),
    positions_BT=rows(jnp.int32, by_token),
    weights_BT=rows(jnp.float32, by_token),
    domain_B=rows(jnp.int32),
  )


def compile_step(
  experiment: Experiment, topology: Topology, num_domains: int | None = None
) -> Step:
  """Compiles the step that `edl_jax.main` would run on the slice.

  Args:
    experiment: must have passed `config.validate`.
    topology: from `topologies.load`.
    num_domains: see `make_taxonomy`.

  Raises:
    UserError: the mesh does not fit the slice, the model or the batch.
    DoesNotFit: a chip's memory does not hold the step.
  """
  mesh = make_mesh(experiment, topology)
  train = experiment.train
  optimizer = make_optimizer(experiment.optimizer, train.num_steps)
  taxonomy = make_taxonomy(experiment, num_domains)
  # Build state and step outside of `set_mesh`: both make small arrays, which
  # devices that are only described cannot hold.
  state = abstract_state(experiment, optimizer, mesh)
  step = make_train_step(experiment, optimizer, taxonomy, mesh)
  batch = abstract_batch(experiment, mesh)
  start = time.monotonic()
  with jax.set_mesh(mesh):
    traced = step.trace(state, batch)
    lowered = traced.lower()
    try:
      compiled = compile_program(lowered, topology.devices[0])
    except jax.errors.JaxRuntimeError as error:
      overflow = parse_overflow(str(error))
      if overflow is None:
        raise
      largest = largest_arrays((state, batch), traced.jaxpr, _NUM_LARGEST)
      raise DoesNotFit(*overflow, largest) from error
  return Step(
    state.model,
    mesh,
    compiled.memory_analysis(),
    compiled.as_text() or "",
    time.monotonic() - start,
  )
