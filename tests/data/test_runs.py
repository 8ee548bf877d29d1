"""Runs: they hold the chunks that reading from the beginning makes."""

import json
import random

import pytest

from data.runs import Text, divide


@pytest.mark.parametrize("characters", [1, 300, 1000, 5000, 10**9])
def test_runs_hold_the_chunks_of_reading_in_order(tmp_path, characters):
  rng = random.Random(0)
  paths = []
  for number, count in enumerate((0, 1, 200, 3, 0, 0, 40, 1, 1)):
    path = tmp_path / f"{number}.jsonl"
    lines = [
      json.dumps({"text": "é" * rng.randrange(400)})
      if rng.random() < 0.9
      else "{"
      for _ in range(count)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    paths.append(str(path))
  text = Text(str(tmp_path), tuple(paths), (), characters)
  runs = divide(map(text.costs, range(len(paths))), characters)
  found = [chunk for run in runs for chunk in text.read_run(run)]
  expected = list(text.all_chunks())
  assert [chunk.number for chunk in found] == list(range(len(expected)))
  for chunk, other in zip(found, expected, strict=True):
    assert [(where, str(found)) for where, found in chunk.found] == [
      (where, str(found)) for where, found in other.found
    ]
  # Several runs of the long file, and none that begins in an empty one.
  assert max(sum(run.file == file for run in runs) for file in range(9)) <= 4
  assert not {run.file for run in runs} & {0, 4, 5}


def test_nothing_to_divide():
  assert divide([], 100) == []
