"""The costs of a compiled step on one device: products, kernels, transfers.

XLA's own cost analysis counts the body of a loop once, and misses the work in
kernels. Here every instruction counts as often as it runs: once for each turn
of the loops around it. Elementwise work does not count.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edl_jax.aot import hlo, windows
from edl_jax.aot.hlo import Array, Instruction, Module


class Collective(NamedTuple):
  """A transfer between devices, as often as it runs in one step."""

  # XLA's name, such as "all-gather".
  kind: str
  runs: int
  # Number of devices that take part.
  group: int
  # One group of devices, by place in the mesh; all devices for permutations.
  # Of several slices, the first in the mesh has the lowest places.
  devices: tuple[int, ...]
  # Bytes of the whole value that a group holds or makes, for each run.
  payload: float
  # Whether other work is scheduled while it runs, and if so its FLOPs.
  is_async: bool
  enclosed_flops: float
  # The operation of the source program that it comes from.
  source: str

  @property
  def wire_bytes(self) -> float:
    """The least bytes that a device must send, over all runs.

    Each of n devices sends (n - 1) / n of the value in a gather, a
    reduce-scatter or an all-to-all, and twice that in an all-reduce (Thakur et
    al., 2005, for large messages). A ragged all-to-all counts as if its smaller
    buffer were full.
    """
    share = (self.group - 1) / self.group
    if self.kind == "all-reduce":
      share *= 2
    elif self.kind in ("collective-permute", "collective-broadcast"):
      share = float(self.group > 1)
    return self.runs * self.payload * share


class Kernel(NamedTuple):
  """A Pallas kernel, over all runs in one step."""

  name: str
  runs: int
  # None if `kernel_flops` does not know the kernel.
  flops: float | None


class Costs(NamedTuple):
  """Costs of one step on one device."""

  # FLOPs of matrix products and convolutions that XLA compiles.
  product_flops: float
  kernels: list[Kernel]
  collectives: list[Collective]
  # Loops of unknown trip count, which count as one turn.
  unknown_loops: int

  @property
  def flops(self) -> float:
    """FLOPs of all products, including those of known kernels."""
    return self.product_flops + sum(
      kernel.flops or 0 for kernel in self.kernels
    )


def _search(pattern: str, text: str) -> re.Match[str]:
  """Finds a pattern that every instruction of its kind has.

  Raises:
    ValueError: the text does not match; XLA may have changed its syntax.
  """
  found = re.search(pattern, text)
  if found is None:
    raise ValueError(f"no {pattern!r} in the HLO text {text!r}")
  return found


# --- FLOPs -------------------------------------------------------------------


def _dot_flops(instruction: Instruction, lhs: Array) -> float:
  """Counts two for each multiply-add."""
  found = _search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
  contracted = [lhs.shape[int(i)] for i in found[1].split(",") if i]
  return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)


def _window(attributes: str, key: str, dimensions: int, default: int) -> list:
  found = re.search(rf"\b{key}=([\dx_-]+)", attributes)
  if not found:
    return [(default, default)] * dimensions
  return [
    tuple(int(n) for n in part.split("_")) for part in found[1].split("x")
  ]


def _convolution_flops(
  instruction: Instruction, lhs: Array, rhs: Array
) -> float:
  """Counts two for each multiply-add of elements that exist.

  TPUs write all matrix products as convolutions. Batch dimensions become
  spatial ones with padding and dilation, where most of the window meets
  nothing.
  """
  text = instruction.attributes
  window = re.search(r"window=\{([^}]*)\}", text)
  window = window[1] if window else ""
  inputs, kernels, outputs = _search(
    r"dim_labels=(\w+)_(\w+)->(\w+)", text
  ).groups()
  count = sum(label.isdigit() for label in inputs)
  (output,) = instruction.arrays[:1]
  stride = _window(window, "stride", count, 1)
  pad = _window(window, "pad", count, 0)
  lhs_dilate = _window(window, "lhs_dilate", count, 1)
  rhs_dilate = _window(window, "rhs_dilate", count, 1)
  met = 1
  for i in range(count):
    met *= windows.meetings(
      (output.shape[outputs.index(str(i))], stride[i][0]),
      (rhs.shape[kernels.index(str(i))], rhs_dilate[i][0]),
      (lhs.shape[inputs.index(str(i))], lhs_dilate[i][0]),
      pad[i][0],
    )
  batch, features = (output.shape[outputs.index(label)] for label in "bf")
  # The kernel's shape has the input features of one group.
  return 2.0 * batch * features * rhs.shape[kernels.index("i")] * met


def kernel_flops(
  name: str,
  operands: Sequence[Array],
  results: Sequence[Array],
  num_experts: int,
) -> float | None:
  """Returns the FLOPs of one run of a Pallas kernel; None if unknown.

  Args:
    name: the kernel's: megablox's `gmm` and `tgmm`, or splash attention's
      `splash_mha_fwd...`, `..._dq...` and `..._dkv...`.
    operands, results: those of the custom call.
    num_experts: E. A grouped product that holds a share of the experts'
      matrices works on that share of its rows at uniform routing; the kernels
      skip the others.
  """
  matrices = [x for x in operands if len(x.shape) > 1 and "f" in x.dtype]
  if name in ("gmm", "tgmm"):
    # (R, M) x (E, M, F) -> (R, F), or (R, M) x (R, F) -> (E, M, F).
    groups = (matrices[1] if name == "gmm" else results[0]).shape[0]
    rows = matrices[0].shape[0] * groups / num_experts
    return 2.0 * rows * matrices[0].shape[1] * results[0].shape[-1]
  if not (found := re.match(r"splash_m[hq]a_(fwd|dq|dkv)", name)):
    return None
  # The table of blocks has the axes heads (or 1), query blocks, key blocks. The
  # kernel runs the blocks on and below the diagonal.
  table = next(x for x in operands if len(x.shape) == 3)
  query, key = matrices[:2]
  query_block = query.shape[-2] // table.shape[1]
  key_block = key.shape[-2] // table.shape[2]
  # Devices that share a row hold even shares of its queries.
  shards = key.shape[-2] // query.shape[-2]
  blocks = sum(
    -(-(i + 1) * query_block // key_block)
    for i in range(shards * table.shape[1])
  )
  # Products forward: logits and outputs. Backward: logits, their gradient, and
  # one for each of the kernel's results. The fused kernel returns a partial
  # gradient of the queries for each block of keys.
  is_fused = any(len(x.shape) > len(query.shape) for x in results)
  products = {"fwd": 2, "dq": 3, "dkv": 5 if is_fused else 4}[found[1]]
  heads = math.prod(query.shape[:-2])
  pairs = blocks // shards * query_block * key_block
  return 2.0 * products * heads * pairs * query.shape[-1]


def kernel_name(instruction: Instruction) -> str | None:
  """Returns the name of a Pallas kernel, None for any other instruction."""
  if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
    return None
  return re.sub(r"(\.\d+|\.clone)*$", "", instruction.name)


def product_flops(instruction: Instruction, operands: Sequence[Array]) -> float:
  """Returns the FLOPs of a product, 0 for any other instruction."""
  if instruction.opcode == "dot":
    return _dot_flops(instruction, operands[0])
  if instruction.opcode == "convolution":
    return _convolution_flops(instruction, *operands[:2])
  return 0.0


def operand_arrays(
  instruction: Instruction, computation: dict[str, Instruction]
) -> list[Array]:
  """Returns the arrays of all operands, in order."""
  return [
    array for name in instruction.operands for array in computation[name].arrays
  ]


# --- Collectives -------------------------------------------------------------

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

# Other work runs beside the computations that these call; the latter run on
# SparseCores.
_STARTS = ("async-start", "call-start")

# Marks what crosses slices, and names that differ from those of collectives.
_MEGASCALE = "_xla_megascale"
_TRANSFERS = {"ONE_TO_ONE": "collective-permute"}


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
  """Returns the devices of the first group, in any notation of XLA."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*)", attributes):
    return _mesh_group(*found.groups())
  if found := re.search(
    r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\]\S*)", attributes
  ):
    return tuple(_iota(found[2]).ravel()[: int(found[1])].tolist())
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return tuple(int(n) for n in found[1].split(","))
  return tuple(range(num_devices))


def _iota(text: str) -> np.ndarray:
  """Reads "[2,4]T(1,0)": the numbers from 0 in this shape, transposed."""
  sizes, order = _search(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  shape = [int(n) for n in sizes.split(",")]
  numbers = np.arange(math.prod(shape)).reshape(shape)
  return numbers.transpose(
    [int(n) for n in order.split(",")] if order else None
  )


def _mesh_group(axes: str, rest: str) -> tuple[int, ...]:
  """Reads the first group of "mesh['a'=2,'b'=4], device_ids=() {'b':(1)2}"."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  order = re.match(r", device_ids=\(([^{]*)\)", rest)
  numbers = _iota(order[1]) if order else np.arange(math.prod(sizes.values()))
  numbers = numbers.reshape(tuple(sizes.values()))
  named = _search(r"\{([^}]*)\}", rest)[1]
  # 'axis':(before)size names a part of an axis, behind a part of size
  # `before`. The first group has place 0 along everything that is not named.
  parts = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(
      r"'([^']+)'(?::\((\d+)\)(\d+))?", named
    )
  }
  for axis, (name, size) in enumerate(sizes.items()):
    before, taken = parts.get(name, (1, 1))
    step = size // (before * taken)
    places = np.arange(taken) * step
    numbers = numbers.take(places, axis=axis)
  return tuple(numbers.ravel().tolist())


def _participants(
  kind: str, attributes: str, num_devices: int
) -> tuple[int, tuple[int, ...]]:
  """Returns the size of a group, and one group or all that take part."""
  if kind != "collective-permute":
    devices = _group(attributes, num_devices)
    return len(devices), devices
  pairs = _search(r"source_target_pairs=\{(.*?\})\}", attributes)
  moved = [
    (int(source), int(target))
    for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1])
    if source != target
  ]
  return 2 if moved else 1, tuple(sorted({n for pair in moved for n in pair}))


def _source(instruction: Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return found[1] if found else ""


@hlo.reading()
def costs(module: Module, num_experts: int) -> Costs:
  """Adds up what one device does in one step.

  Args:
    module: an optimised and scheduled program.
    num_experts: see `kernel_flops`.

  Raises:
    HLOError: an instruction is not of the form that XLA gave it so far.
  """
  return _Counter(module, num_experts).costs()


class _Counter:
  """Adds up the costs of one module."""

  def __init__(self, module: Module, num_experts: int):
    self._module = module
    self._num_experts = num_experts
    self._flops_within: dict[str, float] = {}
    # The caller of each computation that is no loop's: a computation, and the
    # instruction in it.
    self._callers = {
      callee: (name, instruction)
      for name, computation in module.computations.items()
      for instruction in computation.values()
      if instruction.opcode in ("fusion", *_STARTS)
      for callee, _ in hlo.calls(module, instruction)
    }

  def costs(self) -> Costs:
    flops, unknown_loops = 0.0, 0
    kernels: dict[str, Kernel] = {}
    collectives = []
    for name, times in hlo.executions(self._module).items():
      computation = self._module.computations[name]
      for instruction in computation.values():
        operands = operand_arrays(instruction, computation)
        flops += times * product_flops(instruction, operands)
        if kernel := kernel_name(instruction):
          run = self._kernel_flops(kernel, instruction, operands)
          _, runs, total = kernels.get(kernel, Kernel(kernel, 0, 0.0))
          if run is None or total is None:
            total = None
          else:
            total += times * run
          kernels[kernel] = Kernel(kernel, runs + times, total)
        if instruction.opcode == "while":
          unknown_loops += hlo.trip_count(self._module, instruction) is None
        if collective := self._collective(
          instruction, operands, name
        ) or self._transfer(instruction, operands, name):
          collectives.append(collective._replace(runs=times))
    return Costs(
      flops,
      [kernels[name] for name in sorted(kernels)],
      collectives,
      unknown_loops,
    )

  def _kernel_flops(
    self, name: str, instruction: Instruction, operands: Sequence[Array]
  ) -> float | None:
    return kernel_flops(name, operands, instruction.arrays, self._num_experts)

  def _flops(self, instruction: Instruction, within: str) -> float:
    """Returns the FLOPs of one run of an instruction and all that it calls."""
    computation = self._module.computations[within]
    operands = operand_arrays(instruction, computation)
    total = product_flops(instruction, operands)
    if kernel := kernel_name(instruction):
      total += self._kernel_flops(kernel, instruction, operands) or 0.0
    for callee, trips in hlo.calls(self._module, instruction):
      if callee not in self._flops_within:
        self._flops_within[callee] = sum(
          self._flops(inner, callee)
          for inner in self._module.computations[callee].values()
        )
      total += trips * self._flops_within[callee]
    return total

  def _transfer(
    self, instruction: Instruction, operands: Sequence[Array], within: str
  ) -> Collective | None:
    """Returns one run of a transfer between slices, None for anything else.

    The program is that of one slice. Each of its chips exchanges a value with
    the chips in its place in the other slices: it sends to its host, and
    receives what the hosts have made of it, such as the sum.
    """
    if instruction.opcode != "send" or _MEGASCALE not in instruction.attributes:
      return None
    text = instruction.attributes
    kind = _search(rf'{_MEGASCALE}_transfer_type="(\w+)"', text)[1]
    kind = _TRANSFERS.get(kind, kind.lower().replace("_", "-"))
    # Such as "{1,2}x{0:3}": slices from 1, and the devices of each from 0.
    slices = _search(rf'{_MEGASCALE}_target="\{{([\d,:]+)\}}x', text)[1]
    count = sum(
      int(part.rpartition(":")[2]) - int(part.partition(":")[0]) + 1
      for part in slices.split(",")
    )
    payload = sum(array.bytes for array in operands)
    if kind == "all-gather":
      payload *= count
    rendezvous = _search(r'rendezvous="[^"]*"', text)[0]
    received = next(
      other
      for other in self._module.computations[within].values()
      if other.opcode == "recv" and rendezvous in other.attributes
    )
    enclosed = self._enclosed_flops(received, within)
    return Collective(
      kind,
      1,
      count,
      tuple(i * self._module.num_devices for i in range(count)),
      payload,
      enclosed > 0,
      enclosed,
      _source(instruction),
    )

  def _collective(
    self, instruction: Instruction, operands: Sequence[Array], within: str
  ) -> Collective | None:
    """Returns one run of a collective, None for any other instruction."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
      return None
    outside, start = within, instruction
    if within in self._callers:
      outside, caller = self._callers[within]
      # On TPUs a collective may run beside products: one fusion starts it,
      # others multiply meanwhile, and a last one ends it. All of them hold the
      # collective's text; count it where it starts.
      if caller.name.startswith("async-collective-done") or within.startswith(
        "async_collective_fusion"
      ):
        return None
      if caller.opcode in _STARTS or caller.name.startswith(
        "async-collective-start"
      ):
        start = caller
      # TPUs write a reduce-scatter as an all-reduce fused with a slice.
      if within.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    is_async = start is not instruction or start.opcode.endswith("-start")
    group, devices = _participants(
      kind, instruction.attributes, self._module.num_devices
    )
    payload = sum(array.bytes for array in operands)
    if kind == "all-gather":
      payload *= group
    elif kind == "ragged-all-to-all":
      # One buffer is sent and one received. One of them has room for the worst
      # case, so take the smaller one.
      payload = min(array.bytes for array in operands[:2])
    return Collective(
      kind,
      1,
      group,
      devices,
      payload,
      is_async,
      self._enclosed_flops(start, outside) if is_async else 0.0,
      _source(instruction),
    )

  def _enclosed_flops(self, start: Instruction, within: str) -> float:
    """Returns the FLOPs that are scheduled between a start and its end."""
    order = list(self._module.computations[within].values())
    total = 0.0
    for later in order[order.index(start) + 1 :]:
      if start.name in later.operands and later.opcode.endswith("-done"):
        break
      if later.name == start.name.replace("-start", "-done"):
        break
      total += self._flops(later, within)
    return total
