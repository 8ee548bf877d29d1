"""What the TPU compiler expects a step to take, place by place.

The compiler writes an estimate in cycles at most instructions outside of
kernels. The sum over a step, each instruction as often as it runs, tends to be
too high: products are credible, but it prices plain copies, fills and
reductions at a fraction of the memory's bandwidth. The roofline beside it takes
the longer of an instruction's bytes at the memory's bandwidth and its FLOPs at
the peak. It is too low. Nothing here was measured on a TPU.
"""

import collections
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from edl_jax.aot import hlo, hlo_costs
from edl_jax.aot.hlo import Array, Instruction, Module
from edl_jax.aot.topologies import Chip

# The compiler writes this number of cycles where it has no estimate.
_SENTINEL = 2**63 - 1
# The folder whose source lines name places.
_PACKAGE = "/edl_jax/"

# These take no time, or are counted by what they call.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "while", "conditional", "call"),
  *("iota", "opt-barrier", "add-dependency", "domain", "send", "recv"),
}
# Custom calls that only prepare memory or mark something.
_FREE_TARGETS = re.compile(
  r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound'
  r'|Prepare\w+|AsyncCollective\w+|Sharding)"'
)
# These read no more of their first operand than they return.
_SLICES = ("slice", "dynamic-slice", "gather")


class Place(NamedTuple):
  """The instructions outside of kernels that come from one place."""

  # The operation's path in the traced program.
  operation: str
  # The line in the package, "model/moe.py:12"; "" if unknown.
  line: str
  # Instructions run in one step.
  runs: int
  # Seconds by the compiler, without the instructions that it does not price.
  estimate: float
  # Seconds by the roofline, with all instructions.
  roofline: float
  # Bytes read from and written to high-bandwidth memory.
  bytes: float


class Unpriced(NamedTuple):
  """Instructions of one kind for which the compiler has no estimate."""

  # Such as "sort", or the fusion's name without its number.
  name: str
  runs: int
  roofline: float
  # Whether the compiler wrote its sentinel, or nothing.
  is_sentinel: bool


class Estimates(NamedTuple):
  """All instructions outside of kernels, in one step on one device."""

  # The dearest comes first.
  places: list[Place]
  unpriced: list[Unpriced]

  @property
  def estimate(self) -> float:
    """Seconds by the compiler, of the instructions that it prices."""
    return sum(place.estimate for place in self.places)

  @property
  def roofline(self) -> float:
    """Seconds by the roofline, of all instructions."""
    return sum(place.roofline for place in self.places)

  @property
  def unpriced_roofline(self) -> float:
    """Seconds by the roofline, of the instructions without an estimate."""
    return sum(kind.roofline for kind in self.unpriced)


def estimate(module: Module, chip: Chip) -> Estimates:
  """Adds up the instructions that run on the TensorCore outside of kernels.

  Left out are kernels, collectives, and whatever runs beside other
  instructions: starts, their ends, and what they call.

  Args:
    module: an optimised and scheduled program.
    chip: its clock, peak and bandwidth.
  """
  places: dict[tuple[str, str], list[float]] = collections.defaultdict(
    lambda: [0.0] * 4
  )
  unpriced: dict[tuple[str, bool], list[float]] = collections.defaultdict(
    lambda: [0.0] * 2
  )
  for name, times in _scheduled(module).items():
    for instruction in module.computations[name].values():
      if not _counts(module, instruction):
        continue
      moved = moved_bytes(module, instruction, name)
      seconds = max(
        moved / chip.hbm_bandwidth,
        _flops(module, instruction, name) / chip.flops,
      )
      cycles = _cycles(instruction)
      is_priced = cycles not in (None, _SENTINEL)
      entry = places[_place(module, instruction)]
      entry[0] += times
      entry[1] += times * (cycles or 0) / chip.clock if is_priced else 0.0
      entry[2] += times * seconds
      entry[3] += times * moved
      if not is_priced:
        kind = re.sub(r"(\.\d+|\.clone|\.remat\d*)*$", "", instruction.name)
        entry = unpriced[kind, cycles is not None]
        entry[0] += times
        entry[1] += times * seconds
  return Estimates(
    sorted(
      (
        Place(operation, line, int(runs), *rest)
        for (operation, line), (runs, *rest) in places.items()
      ),
      key=lambda place: -max(place.estimate, place.roofline),
    ),
    sorted(
      (
        Unpriced(name, int(runs), seconds, is_sentinel)
        for (name, is_sentinel), (runs, seconds) in unpriced.items()
      ),
      key=lambda kind: -kind.roofline,
    ),
  )


def figures(
  found: Estimates,
  costs: hlo_costs.Costs,
  synchronous: float,
  least: float,
  chip: Chip,
  model_flops: float,
) -> dict[str, Any]:
  """Returns the range of the step, and what it consists of, for JSON.

  The low end adds rooflines, and the high end the compiler's estimates, with
  rooflines where it has none. Both add kernels at the chip's peak, and
  collectives that nothing runs beside; neither is below the step's bound.

  Args:
    found: from `estimate`.
    costs: of the same program.
    synchronous: seconds of collectives that nothing runs beside.
    least: seconds that no schedule can beat.
    chip: its peak.
    model_flops: of a step on one chip.
  """
  kernels = sum(kernel.flops or 0.0 for kernel in costs.kernels) / chip.flops
  fixed = kernels + synchronous
  low = max(least, found.roofline + fixed)
  high = max(least, found.estimate + found.unpriced_roofline + fixed)
  return {
    "outside_kernels": {
      "estimate": found.estimate,
      "roofline": found.roofline,
      "unpriced_roofline": found.unpriced_roofline,
    },
    "kernels": kernels,
    "synchronous_collectives": synchronous,
    "step": {"low": low, "high": high},
    "mfu": {
      "low": model_flops / (high * chip.flops),
      "high": model_flops / (low * chip.flops),
    },
    "unpriced": [kind._asdict() for kind in found.unpriced],
    "places": [place._asdict() for place in found.places],
  }


def _scheduled(module: Module) -> dict[str, int]:
  """Returns how often each computation runs whose instructions are scheduled.

  These are not the computations of fusions, nor of asynchronous calls.
  """
  times: dict[str, int] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for instruction in module.computations[name].values():
      if instruction.opcode in ("while", "call", "conditional"):
        for callee, trips in hlo.calls(module, instruction):
          visit(callee, count * trips)

  visit(module.entry, 1)
  return times


def _counts(module: Module, instruction: Instruction) -> bool:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-start", "-done", "-update")):
    return False
  if opcode in hlo_costs.COLLECTIVES:
    return False
  if _FREE_TARGETS.search(instruction.attributes):
    return False
  return not any(
    hlo_costs.kernel_name(inner)
    or (inner.opcode in hlo_costs.COLLECTIVES and opcode != "fusion")
    for inner in _within(module, instruction)
  ) and not instruction.name.startswith(
    ("async-collective-start", "async-collective-done", "all-reduce-scatter")
  )


def _within(module: Module, instruction: Instruction) -> Iterator[Instruction]:
  """Yields an instruction, and those in the computation of a fusion."""
  yield instruction
  if instruction.opcode == "fusion":
    for callee, _ in hlo.calls(module, instruction):
      yield from module.computations[callee].values()


def _flops(module: Module, instruction: Instruction, within: str) -> float:
  total = hlo_costs.product_flops(
    instruction,
    hlo_costs.operand_arrays(instruction, module.computations[within]),
  )
  if instruction.opcode == "fusion":
    for callee, _ in hlo.calls(module, instruction):
      for inner in module.computations[callee].values():
        total += _flops(module, inner, callee)
  return total


def _cycles(instruction: Instruction) -> int | None:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(found[1]) if found else None


# --- Bytes -------------------------------------------------------------------


def _size(arrays: tuple[Array, ...]) -> float:
  return sum(array.bytes for array in arrays if array.memory == 0)


def moved_bytes(module: Module, instruction: Instruction, within: str) -> float:
  """Returns the bytes of high-bandwidth memory that an instruction moves.

  Of an array that is sliced or updated in place, only the part counts.

  Args:
    module: the program.
    instruction: one of its instructions.
    within: the computation that the instruction is in.
  """
  computation = module.computations[within]
  operands = [computation[name] for name in instruction.operands]
  if instruction.opcode != "fusion":
    return _moved(instruction, operands)
  read = sum(
    min(_size(operand.arrays), _read(module, instruction, i, operand))
    for i, operand in enumerate(operands)
  )
  written = sum(
    min(_size((array,)), part)
    for array, part in zip(instruction.arrays, _written(module, instruction))
  )
  return read + written


def _moved(instruction: Instruction, operands: list[Instruction]) -> float:
  """Returns the bytes that a bare operation moves."""
  sizes = [_size(operand.arrays) for operand in operands]
  result = _size(instruction.arrays)
  if instruction.opcode in _SLICES:
    return 2 * result + sum(sizes[1:])
  if instruction.opcode == "dynamic-update-slice":
    return 2 * sizes[1]
  if instruction.opcode == "scatter":
    return sizes[1] + 2 * sum(sizes[2:])
  return result + sum(sizes)


def _inside(
  module: Module, fusion: Instruction
) -> tuple[dict[str, Instruction], dict[int, str]]:
  """Returns a fusion's computation, and its parameters' names by number."""
  ((callee, _),) = hlo.calls(module, fusion)
  computation = module.computations[callee]
  return computation, {
    int(found.arguments): name
    for name, found in computation.items()
    if found.opcode == "parameter"
  }


def _read(
  module: Module, fusion: Instruction, number: int, operand: Instruction
) -> float:
  """Returns the bytes that a fusion reads of one operand, memories apart."""
  computation, parameters = _inside(module, fusion)
  names = {parameters.get(number, "")}
  total = 0.0
  for user in computation.values():
    places = [i for i, name in enumerate(user.operands) if name in names]
    if not places or user.opcode in ("tuple", *hlo_costs.COLLECTIVES):
      continue  # Passed on, or sent by a collective that runs beside.
    if user.opcode == "bitcast":
      names.add(user.name)
    elif user.opcode == "fusion":
      total += sum(_read(module, user, place, operand) for place in places)
    elif user.opcode in _SLICES and places == [0]:
      total += sum(array.bytes for array in user.arrays)
    elif not (
      user.opcode in ("dynamic-update-slice", "scatter") and places == [0]
    ):  # Those update in place.
      total += sum(array.bytes for array in operand.arrays)
  return total


def _written(module: Module, fusion: Instruction) -> Iterator[float]:
  """Yields the bytes that a fusion writes of each result, memories apart."""
  computation, _ = _inside(module, fusion)
  *_, root = computation.values()
  is_tuple = root.opcode == "tuple"
  for name in root.operands if is_tuple else (root.name,):
    result = computation[name]
    while result.opcode == "bitcast":
      result = computation[result.operands[0]]
    if result.opcode == "fusion":
      yield from _written(module, result)
    elif result.opcode in ("parameter", *hlo_costs.COLLECTIVES):
      yield 0.0  # Passed on, or received by a collective that runs beside.
    elif result.opcode in ("dynamic-update-slice", "scatter"):
      # Operands are the array, then the update; indices lie between or behind.
      number = 1 if result.opcode == "dynamic-update-slice" else -1
      updates = computation[result.operands[number]]
      yield sum(array.bytes for array in updates.arrays)
    else:
      yield from (array.bytes for array in result.arrays)


# --- Places ------------------------------------------------------------------

# Parts of a path that say nothing about the place.
_NOISE = re.compile(
  r"^(jit\(train_step\)|shard_map|while|body|cond|closed_call"
  r"|branch_\d+_fun|checkpoint|jvp\(\)|core_call|)$"
)


def _place(module: Module, instruction: Instruction) -> tuple[str, str]:
  """Returns the operation and the source line of an instruction.

  A fusion without its own metadata has that of its last instruction with any.
  """
  named = instruction
  if "op_name=" not in instruction.attributes:
    for inner in _within(module, instruction):
      if "op_name=" in inner.attributes:
        named = inner
  found = re.search(r'op_name="([^"]*)"', named.attributes)
  if not found:
    return f"unnamed {instruction.opcode}", ""
  parts: list[str] = []
  for part in found[1].split("/"):
    if not _NOISE.match(part) and parts[-1:] != [part]:
      parts.append(part)
  return "/".join(parts), module.source_line(named, _PACKAGE)
