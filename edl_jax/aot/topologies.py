"""TPU slices that programs are compiled for: their chips and shapes.

Nothing here needs a TPU: the compiler in the package `libtpu` knows every
slice. Google Cloud publishes the peaks of each chip.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from edl_jax.config import UserError

# The compiler of the jax in requirements.txt, which goes by Python's version.
LIBTPU = (
  "libtpu==0.0.42.1" if sys.version_info < (3, 12) else "libtpu==0.0.50.1"
)

_GIB = 2**30


class Chip(NamedTuple):
  """Published peaks of one device: a chip, or one of the two in a chip."""

  # bfloat16 FLOP/s of matrix products.
  flops: float
  # Cycles per second of the TensorCore, in which the compiler estimates.
  clock: float
  # High-bandwidth memory: bytes, and bytes per second.
  hbm_bytes: float
  hbm_bandwidth: float
  # Bytes per second of a link to a neighbour, each way.
  link_bandwidth: float
  # Bytes per second between slices, over the data-centre network, each way;
  # None where nobody publishes it.
  network_bandwidth: float | None
  # Devices that JAX sees in a chip. They share its links and its host.
  devices: int
  # Chips in a ring: slices wrap around in dimensions that are multiples of it.
  ring: int
  # Common slices.
  slices: tuple[str, ...]
  source: str


_PAGES = "https://docs.cloud.google.com/tpu/docs"
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8",
  "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip

# The published bandwidth of the interconnect is a chip's, in both directions
# and over all its links: four in two dimensions, six in three; for v4 that
# between the halves of a pod of 16x16x16 chips, over 2 x 16 x 16 links. The
# data-centre network of v5e is published for a pod of 256 chips.
#
# A clock is the peak over the FLOPs that the matrix units do in a cycle, each
# 2 x 128 x 128: 4 units on v5e, 8 on v4 and v5p, 16 on v6e and in a device of
# tpu7x.
# With half as many the compiler's estimates of products would be below the
# ideal.
CHIPS = {
  "v4": Chip(
    flops=275e12,
    clock=1.05e9,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1200e9,
    link_bandwidth=24e12 / (2 * 16 * 16),
    network_bandwidth=None,
    devices=1,
    ring=4,
    slices=_CUBES,
    source=f"{_PAGES}/v4",
  ),
  "v5e": Chip(
    flops=197e12,
    clock=1.5e9,
    hbm_bytes=16 * _GIB,
    hbm_bandwidth=819e9,
    link_bandwidth=400e9 / 2 / 4,
    network_bandwidth=6.4e12 / 8 / 256,
    devices=1,
    ring=16,
    slices=_FLAT,
    source=f"{_PAGES}/v5e",
  ),
  "v5p": Chip(
    flops=459e12,
    clock=1.75e9,
    hbm_bytes=95 * _GIB,
    hbm_bandwidth=2765e9,
    link_bandwidth=1200e9 / 2 / 6,
    network_bandwidth=50e9 / 8,
    devices=1,
    ring=4,
    slices=_CUBES,
    source=f"{_PAGES}/v5p",
  ),
  "v6e": Chip(
    flops=918e12,
    clock=1.75e9,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1640e9,
    link_bandwidth=800e9 / 2 / 4,
    network_bandwidth=100e9 / 8,
    devices=1,
    ring=16,
    slices=_FLAT,
    source=f"{_PAGES}/v6e",
  ),
  "tpu7x": Chip(
    flops=2307e12 / 2,
    clock=2.2e9,
    hbm_bytes=192 / 2 * _GIB,
    hbm_bandwidth=7380e9 / 2,
    link_bandwidth=1200e9 / 2 / 6 / 2,
    network_bandwidth=100e9 / 8 / 2,
    devices=2,
    ring=4,
    slices=_CUBES,
    source=f"{_PAGES}/tpu7x",
  ),
}


class Topology(NamedTuple):
  """Slices of chips, as the compiler sees them."""

  # The name of one slice, such as "v5p:4x4x4".
  name: str
  chip: Chip
  # Chips along each dimension of one slice's mesh or torus.
  shape: tuple[int, ...]
  # Abstract devices: programs are compiled for them, but nothing runs.
  devices: Sequence[Any]
  num_slices: int = 1

  @property
  def title(self) -> str:
    """The slice, or how many of them, for messages."""
    if self.num_slices == 1:
      return self.name
    return f"{self.num_slices} slices of {self.name}"

  @property
  def unit(self) -> str:
    """What figures are of, for messages: a chip, or a device in it."""
    return "chip" if self.chip.devices == 1 else "device"

  def links(self) -> tuple[int, ...]:
    """Returns the links of a corner chip along each dimension.

    Dimensions that are whole rings wrap around; in others the first and the
    last chip have one neighbour. Corner chips take part in every collective, so
    they bound its time.
    """
    return tuple(
      0 if size == 1 else 2 if size % self.chip.ring == 0 else 1
      for size in self.shape
    )


def prepare_environment() -> None:
  """Lets this process compile for TPUs; call it before JAX is imported.

  Arrays and eager operations stay on the CPU, the TPU library does not ask a
  metadata server about this machine, and several processes may load it.
  """
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  # JAX cannot read back from its cache what it compiled for another machine.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  # The library logs what this command reports anyway; keep fatal messages only.
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
  """Returns the chip and the shape of a slice such as "v5p:4x4x4".

  Raises:
    UserError: there is no such chip, or its slices have other dimensions.
  """
  kind, _, sizes = name.partition(":")
  if kind not in CHIPS or not sizes:
    known = "; ".join(
      f"{kind}: {', '.join(chip.slices)}" for kind, chip in CHIPS.items()
    )
    raise UserError(
      f"--topology={name}: unknown; write CHIP:SHAPE. Known are {known}"
    )
  chip = CHIPS[kind]
  dimensions = chip.slices[0].count("x") + 1
  found = re.fullmatch("x".join([r"([1-9]\d*)"] * dimensions), sizes)
  # A host has two by two chips.
  if not found or int(found[1]) % 2 or int(found[2]) % 2:
    raise UserError(
      f"--topology={name}: slices of {kind} have {dimensions} dimensions, the"
      f" first two of them even, such as {', '.join(chip.slices)}"
    )
  return chip, tuple(int(size) for size in found.groups())


def load(name: str, num_slices: int = 1) -> Topology:
  """Returns one or several slices called `name`, such as "v5p:4x4x4".

  Raises:
    UserError: the slice is unknown, or the compiler is not installed.
  """
  chip, shape = parse(name)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"the TPU compiler is not installed: python -m pip install {LIBTPU}"
    )
  if num_slices > 1 and chip.network_bandwidth is None:
    raise UserError(
      f"--num_slices={num_slices}: nobody publishes the bandwidth between"
      f" slices of {name}; leave the flag out"
    )
  # Imports JAX, for which a wrong name should not wait.
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
  if chip is CHIPS["v4"]:
    # Both cores are one device, as they are by default on v5p and on TPU VMs.
    options["chip_config_name"] = "megacore"
  try:
    found = topologies.get_topology_desc(name, platform="tpu", **options)
  except RuntimeError as error:
    reason = " ".join(str(error).split())
    raise UserError(f"--topology={name}: {reason}") from error
  assert len(found.devices) == num_slices * math.prod(shape) * chip.devices
  return Topology(name, chip, shape, found.devices, num_slices)
