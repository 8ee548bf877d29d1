"""Does the product harm on purpose, and checks what is left of it.

  python -m tests.campaign --minutes=10 --seed=7

After each fault the figures equal those of an undisturbed run, or there is one
line and the right exit code. The seed decides what happens; moments are in
seconds, so that a slower machine is struck elsewhere. One fault alone:

  python -m tests.campaign --seed=7 --only=kill-3

Exit code 1 if something did not hold.
"""

import collections
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

from edl_jax import tables
from edl_jax.command import Command
from tests.campaign.bench import Bench, FaultError
from tests.campaign.faults import FAULTS

COMMAND = Command(__doc__)
_MINUTES = COMMAND.flag(
  "minutes", 10.0, "No fault begins after this time.", minimum=0
)
_SEED = COMMAND.flag("seed", 0, "Decides the faults.")
_ONLY = COMMAND.flag(
  "only", (), "Faults to do, such as kill or kill-3. Default: all."
)


def _names(seed: int) -> Iterator[str]:
  """Yields the names of faults in random order, round after round."""
  done = collections.Counter[str]()
  number = 0
  while True:
    names = [name for name, (_, often) in FAULTS.items() for _ in range(often)]
    random.Random(f"{seed} round {number}").shuffle(names)
    for name in names:
      done[name] += 1
      yield f"{name}-{done[name]}"
    number += 1


def _chosen(seed: int) -> Iterator[str]:
  only = set(_ONLY.value)
  numbered = {name for name in only if name.rpartition("-")[2].isdigit()}
  if numbered:
    yield from sorted(numbered)
    return
  for name in _names(seed):
    if not only or name.rpartition("-")[0] in only:
      yield name


@COMMAND.main
def main() -> int:
  """Does faults until the time is over; returns the exit code."""
  seed, begun = _SEED.value, time.monotonic()
  held, failed = collections.Counter[str](), collections.Counter[str]()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="campaign-"))
  try:
    bench = Bench(folder)
    print(f"seed {seed}; a run takes {bench.seconds:.1f} s", flush=True)
    for name in _chosen(seed):
      if time.monotonic() - begun > 60 * _MINUTES.value:
        break
      kind = name.rpartition("-")[0]
      draw = random.Random(f"{seed} {name}")
      try:
        told = FAULTS[kind][0](bench, draw, name)
      except FaultError as error:
        failed[kind] += 1
        print(f"{name}: DID NOT HOLD: {error}", flush=True)
      else:
        held[kind] += 1
        print(f"{name}: held, {told}", flush=True)
      for left in folder.glob(f"{name}*"):
        shutil.rmtree(left, ignore_errors=True)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  rows = [("fault", "done", "held")]
  for kind in FAULTS:
    done = held[kind] + failed[kind]
    rows.append((kind, str(done), str(held[kind])))
  print("\n".join(tables.aligned(rows)))
  return int(failed.total() > 0)


if __name__ == "__main__":
  sys.exit(main())
