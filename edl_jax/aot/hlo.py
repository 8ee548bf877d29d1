"""Reads optimised HLO text: computations, instructions, their run counts."""

import collections
import contextlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class HLOError(ValueError):
  """HLO text is not of the form that this module reads; one line."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
  """Makes an `HLOError` of whatever text of another form raises in a block."""
  try:
    yield
  except HLOError:
    raise
  except (
    *(LookupError, ValueError, TypeError, ArithmeticError),
    *(StopIteration, RecursionError),
  ) as error:
    reason = " ".join(str(error).split())[:200]
    raise HLOError(
      f"HLO text of an unknown form: {type(error).__name__} {reason}"
    ) from error


class Array(NamedTuple):
  """The dtype and shape of a value."""

  dtype: str
  shape: tuple[int, ...]
  # XLA's number of the memory; 0 is the high-bandwidth memory.
  memory: int = 0

  @property
  def bytes(self) -> float:
    """Size without padding; bytes."""
    bits = re.match(r"[a-z]+(\d+)", self.dtype)
    size = int(bits[1]) / 8 if bits else float(self.dtype == "pred")
    return size * math.prod(self.shape)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  # The result, or all elements of a result that is a tuple, at any depth.
  arrays: tuple[Array, ...]
  opcode: str
  # Names of the operands.
  operands: tuple[str, ...]
  # The text between the parentheses; of a constant, its value.
  arguments: str
  # The text behind the parentheses.
  attributes: str

  def called(self, attribute: str) -> list[str]:
    """Returns the computations that an attribute names."""
    found = re.search(
      rf"\b{attribute}=(%[\w.-]+|\{{[^}}]*\}})", self.attributes
    )
    return re.findall(r"%([\w.-]+)", found[1]) if found else []


class Module(NamedTuple):
  """A program; instructions are in the order in which they run."""

  computations: dict[str, dict[str, Instruction]]
  entry: str
  # Devices that the program runs on.
  num_devices: int
  # The innermost place in each stack frame, "file.py:12", and the frame that
  # called it, by the frame's number.
  frames: dict[int, tuple[str, int]]

  def source_line(self, instruction: Instruction, folder: str) -> str:
    """Returns the innermost line inside a folder, such as "model/moe.py:12".

    Returns:
      "" if the instruction has no such line.
    """
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    frame, seen = int(found[1]) if found else 0, set[int]()
    # The outermost frame is its own parent.
    while frame in self.frames and frame not in seen:
      seen.add(frame)
      line, frame = self.frames[frame]
      _, inside, rest = line.rpartition(folder)
      if inside:
        return rest
    return ""


# --- Parsing -----------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")


@reading()
def parse(text: str) -> Module:
  """Parses what `compiled.as_text()` returns.

  Raises:
    HLOError: the text has no entry computation, or an instruction of an unknown
      form.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  # Join the lines of kernels' metadata, which spans several.
  for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():
    if current is not None and (found := _INSTRUCTION.match(line)):
      instruction = _parse_instruction(found[1], found[2])
      current[instruction.name] = instruction
    elif found := _HEADER.match(line):
      current = computations[found[2]] = {}
      entry = found[2] if found[1] else entry
    elif line.startswith("}"):
      current = None
  if entry is None:
    raise HLOError("no HLO: the text has no entry computation")
  devices = 1
  for key in ("num_partitions", "replica_count"):
    if found := re.search(rf"^HloModule.*\b{key}=(\d+)", text):
      devices *= int(found[1])
  return Module(computations, entry, devices, _frames(text))


def _frames(text: str) -> dict[int, tuple[str, int]]:
  """Reads the tables at the top of the text; see `Module.frames`."""
  _, _, names = text.partition("\nFileNames\n")
  names, _, _ = names.partition("\n\n")
  files = dict(re.findall(r'^(\d+) "(.*)"$', names, re.MULTILINE))
  lines = {
    number: f"{files[file]}:{line}"
    for number, file, line in re.findall(
      r"^(\d+) \{file_name_id=(\d+) .*\bline=(\d+)", text, re.MULTILINE
    )
  }
  return {
    int(number): (lines[location], int(parent or 0))
    for number, location, parent in re.findall(
      r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}",
      text,
      re.MULTILINE,
    )
  }


def _parse_instruction(name: str, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  start = text.index("(", end)
  close = _closing(text, start)
  arguments = text[start + 1 : close]
  return Instruction(
    name,
    tuple(_arrays(text[:end])),
    text[end:start].strip(),
    tuple(re.findall(r"%([\w.-]+)", arguments)),
    arguments,
    text[close + 1 :],
  )


def _closing(text: str, start: int) -> int:
  """Returns the place of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  raise HLOError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(text: str) -> Iterator[Array]:
  for dtype, sizes, layout in re.findall(
    r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text
  ):
    memory = re.search(r"S\((\d+)\)", layout)
    yield Array(
      dtype,
      tuple(int(n) for n in sizes.split(",") if n),
      int(memory[1]) if memory else 0,
    )


# --- How often things run ----------------------------------------------------


@reading()
def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns the turns of a while loop; None if unknown.

  Reads XLA's annotation, or else the constant that the condition compares with:
  loops of `jax.lax.scan` and `fori_loop` count from 0 by 1.

  Raises:
    HLOError: the loop has no condition of a known form.
  """
  if found := re.search(r'known_?trip_count"?:\{"n":"(\d+)"', loop.attributes):
    return int(found[1])
  (name,) = loop.called("condition")
  condition = module.computations[name]
  *_, root = condition.values()
  if root.opcode != "compare" or "direction=LT" not in root.attributes:
    return None
  bound = condition[root.operands[1]]
  return int(bound.arguments) if bound.opcode == "constant" else None


def calls(
  module: Module, instruction: Instruction, unknown_trips: int = 1
) -> Iterator[tuple[str, int]]:
  """Yields the computations that an instruction runs, and how often.

  All branches of a conditional count. A while loop whose turns are unknown
  makes `unknown_trips`.
  """
  if instruction.opcode == "while":
    trips = trip_count(module, instruction)
    for name in instruction.called("body"):
      yield name, unknown_trips if trips is None else trips
  elif instruction.opcode in ("fusion", "call", "call-start", "async-start"):
    for attribute in ("calls", "to_apply"):
      for name in instruction.called(attribute):
        yield name, 1
  elif instruction.opcode == "conditional":
    for kind in ("branch", "true", "false"):
      attribute = (
        "branch_computations" if kind == "branch" else (f"{kind}_computation")
      )
      for name in instruction.called(attribute):
        yield name, 1


@reading()
def executions(module: Module, unknown_trips: int = 1) -> dict[str, int]:
  """Returns how often each computation runs in one step.

  Args:
    module: the program.
    unknown_trips: turns of while loops whose number the program computes.

  Raises:
    HLOError: a computation is missing, or calls itself.
  """
  times: dict[str, int] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for instruction in module.computations[name].values():
      for callee, trips in calls(module, instruction, unknown_trips):
        visit(callee, count * trips)

  visit(module.entry, 1)
  return times
