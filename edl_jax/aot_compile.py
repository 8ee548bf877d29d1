"""Compiles a training step for a slice of TPUs, without a TPU."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from edl_jax import sharding
from edl_jax.batch import Batch
from edl_jax.config import Experiment
from edl_jax.optim import make_optimizer
from edl_jax.runtime import compiler_options
from edl_jax.taxonomy import Taxonomy, load_taxonomy
from edl_jax.topologies import Topology
from edl_jax.train import abstract_state, make_train_step

# Of the paper's finer taxonomy; for experiments that leave domains to the data.
NUM_DOMAINS = 49


class Buffer(NamedTuple):
  """Memory that the compiler meant to take."""

  bytes: float
  # As XLA writes it, such as "bf16[64,2048]".
  shape: str
  # What of the source program it comes from.
  source: str


class DoesNotFit(Exception):
  """A chip's memory does not hold the step, as the compiler found.

  Attributes:
    needed, available: bytes.
    buffers: the largest first; empty if the compiler named none.
  """

  def __init__(self, needed: float, available: float, buffers: list[Buffer]):
    super().__init__(needed, available)
    self.needed = needed
    self.available = available
    self.buffers = buffers


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _bytes(number: str, unit: str) -> float:
  return float(number) * _UNITS[unit]


def parse_overflow(message: str) -> DoesNotFit | None:
  """Reads the compiler's error; None if it is not about a chip's memory.

  Args:
    message: of a JaxRuntimeError. The compiler says either what temporaries
      alone need, or what all needs and then lists the largest buffers.
  """
  found = re.search(
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message
  ) or re.search(rf"memory space hbm\. Used {_SIZE} of {_SIZE} hbm", message)
  if not found:
    return None
  number, unit, other, other_unit = found.groups()
  buffers = []
  for entry in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:]:
    size = re.match(rf"Size: {_SIZE}", entry)
    shape = re.search(r"Shape: (\S+?\])", entry)
    source = re.search(r'op_name="([^"]*)"', entry)
    buffers.append(
      Buffer(
        _bytes(*size.groups()),
        shape[1] if shape else "",
        source[1] if source else "",
      )
    )
  return DoesNotFit(_bytes(number, unit), _bytes(other, other_unit), buffers)


class Step(NamedTuple):
  """What the compiler made of a training step; of one chip."""

  # The model's, as `ShapeDtypeStruct`s with shardings.
  parameters: Any
  # The mesh that it is compiled for.
  mesh: Mesh
  # jaxlib's CompiledMemoryStats.
  memory: Any
  # Optimised HLO text.
  text: str
  # Of lowering and compiling.
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
  """Returns the domains, which the data would tell: only their number counts.

  Args:
    experiment: its `data.domains` or `data.taxonomy` hold.
    num_domains: D where it has neither; None: 49.
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
    DoesNotFit: a chip's memory does not hold the step.
  """
  mesh = make_mesh(experiment, topology)
  train = experiment.train
  optimizer = make_optimizer(experiment.optimizer, train.num_steps)
  taxonomy = make_taxonomy(experiment, num_domains)
  # These make small arrays, which an abstract mesh could not hold.
  state = abstract_state(experiment, optimizer, mesh)
  step = make_train_step(experiment, optimizer, taxonomy, mesh)

  def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (train.batch_size, *shape), dtype, sharding=sharding.row_sharding(mesh)
    )

  by_token = train.sequence_length
  batch = Batch(
    tokens_BT=rows(jnp.int32, by_token),
    targets_BT=rows(jnp.int32, by_token),
    segments_BT=rows(jnp.int32, by_token),
    positions_BT=rows(jnp.int32, by_token),
    weights_BT=rows(jnp.float32, by_token),
    domain_B=rows(jnp.int32),
  )
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = step.lower(state, batch)
    try:
      compiled = lowered.compile(compiler_options(topology.devices[0]))
    except jax.errors.JaxRuntimeError as error:
      overflow = parse_overflow(str(error))
      if overflow is None:
        raise
      raise overflow from error
  return Step(
    state.model,
    mesh,
    compiled.memory_analysis(),
    compiled.as_text(),
    time.monotonic() - start,
  )
