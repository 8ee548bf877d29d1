"""Compiles a training step for a slice of TPUs, without a TPU."""

import math
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.aot.topologies import Topology
from edl_jax.config import Experiment
from edl_jax.runtime import DoesNotFit, compile_program
from edl_jax.text.taxonomy import Taxonomy, load_taxonomy
from edl_jax.tracing import trace_step

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


class Overflow(DoesNotFit):
  """A step that does not fit, with its largest arrays.

  Attributes:
    largest: arguments and intermediate values, the largest first.
  """

  def __init__(self, error: DoesNotFit, largest: list[Array]):
    super().__init__(error.needed, error.available)
    self.largest = largest


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
    Overflow: a chip's memory does not hold the step.
  """
  mesh = make_mesh(experiment, topology)
  taxonomy = make_taxonomy(experiment, num_domains)
  start = time.monotonic()
  traced, arguments = trace_step(experiment, taxonomy, mesh)
  with jax.set_mesh(mesh):
    lowered = traced.lower()
    try:
      compiled = compile_program(lowered, topology.devices[0])
    except DoesNotFit as error:
      largest = largest_arrays(arguments, traced.jaxpr, _NUM_LARGEST)
      raise Overflow(error, largest) from error
  state, _ = arguments
  return Step(
    state.model,
    mesh,
    compiled.memory_analysis(),
    compiled.as_text() or "",
    time.monotonic() - start,
  )
