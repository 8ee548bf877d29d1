"""Does the product harm on purpose, and checks what is left of it.

  python -m tests.campaign --minutes=10 --seed=7

After each fault the figures equal those of an undisturbed run, or there is one
line and the right exit code. The seed decides what happens; moments are in
seconds or follow a line of the metrics, so that a slower machine is struck
elsewhere. One fault alone, and a hundred of a kind:

  python -m tests.campaign --seed=7 --only=kill-3
  python -m tests.campaign --seed=7 --only=kill --count=100 --minutes=600

Exit code 1 if something did not hold.
"""

import collections
import functools
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from edl_jax import storage
from edl_jax.command import Command
from tests.campaign.bench import Bench, FaultError, SkippedError
from tests.campaign.child import Child
from tests.campaign.faults import FAULTS

COMMAND = Command(__doc__)
_MINUTES = COMMAND.flag(
  "minutes", 10.0, "No fault begins after this time.", minimum=0
)
_SEED = COMMAND.flag("seed", 0, "Decides the faults.")
_ONLY = COMMAND.flag(
  "only", (), "Faults to do, such as kill or kill-3. Default: all."
)
_COUNT = COMMAND.flag(
  "count",
  0,
  "Harms to do of each kind, one kind after another. 0: all kinds in random"
  " order, until the time is over.",
  minimum=0,
)
_JOBS = COMMAND.flag("jobs", 1, "Faults at once.", minimum=1)
_FOLDER = COMMAND.flag(
  "folder",
  "",
  "Folder for the undisturbed run, kept for the next campaign of the same"
  " code. Default: a temporary one.",
)
_JSON = COMMAND.flag("json", "", "File to write the table and the lines to.")


class Tally:
  """What was done so far, by kind of fault."""

  def __init__(self) -> None:
    self.runs = collections.Counter[str]()
    self.harms = collections.Counter[str]()
    self.failed = collections.Counter[str]()
    self.skipped: dict[str, str] = {}
    self.lines: list[str] = []

  def say(self, line: str) -> None:
    """Prints a line, and keeps it."""
    print(line, flush=True)
    self.lines.append(line)

  def add(self, name: str, verdict: str, text: str, harms: int) -> None:
    """Adds what came of one fault, and prints it."""
    kind = name.rpartition("-")[0]
    if verdict == "skipped":
      self.skipped[kind] = text
    else:
      self.runs[kind] += 1
      self.harms[kind] += harms
      self.failed[kind] += verdict != "held"
    self.say(f"{name}: {verdict}, {text}")

  def rows(self) -> list[tuple[str, int, int, int]]:
    """Returns kind, faults, harms, and faults that held."""
    return [
      (kind, number, self.harms[kind], number - self.failed[kind])
      for kind in FAULTS
      if (number := self.runs[kind])
    ]

  def table(self) -> list[str]:
    """Returns the rows as a table in Markdown, and what was skipped."""
    lines = ["| fault | faults | harms | held |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in self.rows()]
    left_out = [f"{kind}: {why}" for kind, why in self.skipped.items()]
    return lines + [f"skipped {each}" for each in left_out]

  def write(self, path: str) -> None:
    """Writes all of it as JSON; does nothing without a path."""
    if path:
      content = {
        "seed": _SEED.value,
        "rows": self.rows(),
        "skipped": self.skipped,
        "lines": self.lines,
      }
      storage.write_json(path, content, indent=1)


def _in_random_order(seed: int) -> Iterator[str]:
  """Yields the names of faults, round after round."""
  done = collections.Counter[str]()
  number = 0
  while True:
    names = [name for name, (_, often) in FAULTS.items() for _ in range(often)]
    random.Random(f"{seed} round {number}").shuffle(names)
    for name in names:
      done[name] += 1
      yield f"{name}-{done[name]}"
    number += 1


def _chosen(seed: int, tally: Tally) -> Iterator[str]:
  """Yields the names of the faults to do; `tally` has those done."""
  only = _ONLY.value
  numbered = [name for name in only if name.rpartition("-")[2].isdigit()]
  if numbered:
    yield from numbered
  elif _COUNT.value:
    for kind in only or FAULTS:
      number = 0
      while tally.harms[kind] < _COUNT.value and kind not in tally.skipped:
        number += 1
        yield f"{kind}-{number}"
  else:
    for name in _in_random_order(seed):
      kind = name.rpartition("-")[0]
      if kind not in tally.skipped and (not only or kind in only):
        yield name
      elif len(tally.skipped) == len(only or FAULTS):
        return


def _do(name: str, bench: Bench) -> list[Any]:
  """Does one fault; returns what `Tally.add` takes, and removes its files."""
  kind = name.rpartition("-")[0]
  draw = random.Random(f"{_SEED.value} {name}")
  try:
    outcome = FAULTS[kind][0](bench, draw, name)
    return ["held", *outcome]
  except SkippedError as error:
    return ["skipped", str(error), 0]
  except FaultError as error:
    return ["DID NOT HOLD", str(error), 1]
  finally:
    for left in bench.folder.glob(f"{name}*"):
      # Another fault's name may begin with this one's.
      if left.name[len(name) :][:1].isdigit():
        continue
      if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
      else:
        left.unlink()


def _do_all(bench: Bench, tally: Tally, end: float) -> None:
  """Does faults, some at once, and begins none after `end`."""
  names = _chosen(_SEED.value, tally)
  at_work: dict[str, tuple[Child, pathlib.Path]] = {}
  more = True
  while more or at_work:
    while more and len(at_work) < _JOBS.value:
      name = next(names, "") if time.monotonic() < end else ""
      more = bool(name)
      if more:
        at_work[name] = bench.begin(functools.partial(_do, name, bench))
    for name, (child, answer) in list(at_work.items()):
      if child.poll() is not None:
        del at_work[name]
        try:
          found = bench.answer(child, answer)
        except FaultError as error:
          found = ["DID NOT HOLD", str(error), 1]
        tally.add(name, *found)
        tally.write(_JSON.value)
    time.sleep(0.05)


@COMMAND.main
def main() -> int:
  """Does faults until the time is over; returns the exit code."""
  begun, tally = time.monotonic(), Tally()
  folder = pathlib.Path(
    os.path.abspath(_FOLDER.value)
    if _FOLDER.value
    else tempfile.mkdtemp(prefix="campaign-")
  )
  folder.mkdir(parents=True, exist_ok=True)
  try:
    bench = Bench(folder)
    tally.say(f"seed {_SEED.value}; a run takes {bench.seconds:.1f} s")
    _do_all(bench, tally, begun + 60 * _MINUTES.value)
  finally:
    if not _FOLDER.value:
      shutil.rmtree(folder, ignore_errors=True)
  print("\n".join(tally.table()))
  return int(tally.failed.total() > 0)


if __name__ == "__main__":
  sys.exit(main())
