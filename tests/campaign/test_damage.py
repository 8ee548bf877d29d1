"""What the campaign does to files, and which faults it chooses."""

import itertools
import random

from tests.campaign.__main__ import COMMAND, Tally, _chosen, _in_random_order
from tests.campaign.damage import damage
from tests.campaign.faults import FAULTS


def content(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_damage_changes_what_it_says(tmp_path):
  ways = set()
  for seed in range(80):
    folder = tmp_path / str(seed)
    for name in ("a/x", "a/y", "b/z"):
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(name.encode() * 40)
    before = content(folder)
    told = damage(folder, random.Random(seed))
    after = content(folder)
    changed = [str(name) for name in before if after.get(name) != before[name]]
    ways.add(told.split()[0])
    # A file may be swapped with itself.
    assert changed or told.startswith("swapped")
    for name in changed:
      assert name in told or f"{name[0]}/" in told
  assert ways == {
    *("flip", "cut", "empty", "zero", "grow"),
    "removed",
    "swapped",
  }


def test_a_seed_decides_the_faults():
  first, again, other = (
    list(itertools.islice(_in_random_order(seed), 60)) for seed in (1, 1, 2)
  )
  assert first == again != other
  assert {name.rpartition("-")[0] for name in first} == set(FAULTS)
  assert len(set(first)) == 60


def test_the_table_counts_what_held():
  tally = Tally()
  tally.add("kill-1", "held", "after 1 s", 3)
  tally.add("kill-2", "DID NOT HOLD", "a traceback", 1)
  tally.add("slow_disk-1", "skipped", "no control group", 0)
  assert tally.table()[2:] == [
    "| kill | 2 | 4 | 1 |",
    "skipped slow_disk: no control group",
  ]
  # Without --count and --only: whatever is not skipped.
  COMMAND.parse([])
  names = itertools.islice(_chosen(0, tally), 100)
  assert not any(name.startswith("slow_disk") for name in names)
