"""What counts as growth, on made-up samples."""

import os

from tests.soak.__main__ import Sample, look, problems


def test_growth_is_found_and_swings_are_none():
  flat = [Sample(2**30 + n % 7 * 2**20, 9, 30 + n % 3) for n in range(600)]
  assert problems(flat) == []
  # What a program takes while it starts does not count.
  assert problems([Sample(n * 2**20, n, n) for n in range(90)] + flat) == []
  leaking = [Sample(2**30 + n * 2**17, 9, 30) for n in range(600)]
  assert problems(leaking) == ["resident memory grew by 31 MiB"]
  threads = [Sample(2**30, 9 + n // 100, 30 + n) for n in range(600)]
  assert problems(threads) == [
    "threads grew from 13 to 14",
    "files grew from 462 to 629",
  ]


def test_a_process_is_looked_at():
  before = look(os.getpid())
  assert before.resident_bytes > 2**20 and before.threads >= 1
  with open(os.devnull):
    assert look(os.getpid()).files == before.files + 1
