"""Chunks: cut in order, worked on by several processes, and read back."""

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data import chunks
from edl_jax.config import UserError
from edl_jax.text.mixture import origin_digest
from edl_jax.text.prepared import TOKENIZER, tokens_name
from edl_jax.text.tokenizer import byte_tokenizer


def write(path, records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines), encoding="utf-8")
  return str(path)


@pytest.mark.parametrize("characters", [1, 700, 10**9])
def test_chunks_are_all_records_in_order(tmp_path, characters):
  texts = ["a" * (37 * n % 300) for n in range(40)]
  paths = [
    write(tmp_path / "a.jsonl", [{"text": text} for text in texts[:25]]),
    write(tmp_path / "b.jsonl", [{"text": text} for text in texts[25:]]),
  ]
  made = list(chunks.read_chunks(str(tmp_path), paths, characters))
  assert [chunk.number for chunk in made] == list(range(len(made)))
  found = [record["text"] for chunk in made for record in chunk.records()]
  assert found == texts
  stored = sum(chunk.stored for chunk in made)
  sizes = sum(os.path.getsize(path) for path in paths)
  assert 0.9 * sizes < stored <= sizes
  # Every chunk but the last is as long as asked for, and none longer by more
  # than its last record. A record counts 100 characters more than it has.
  for chunk in made[:-1]:
    *most, last = [100 + len(record["text"]) for record in chunk.records()]
    assert sum(most) < characters <= sum(most) + last


def start_nothing():
  pass


def kill_one(number):
  if number == 5:
    os.kill(os.getpid(), signal.SIGKILL)
  return number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_jobs_are_read_a_few_ahead(count):
  read = []

  def jobs():
    for number in range(30):
      read.append(number)
      yield number

  with chunks.Workers(count, start_nothing) as workers:
    for index, root in enumerate(workers.in_order(math.sqrt, jobs())):
      assert root == math.sqrt(index)
      assert len(read) <= index + 2 + 2 * count
  assert len(read) == 30


def test_a_killed_process_is_a_user_error():
  with (
    chunks.Workers(2, start_nothing) as workers,
    pytest.raises(UserError, match="a worker process was killed"),
  ):
    list(workers.in_order(kill_one, range(30)))


def test_scan_measures_every_record(tmp_path):
  records = [
    {"text": "one é", "domain": "x", "origin": "book"},
    {"text": "漢字", "domain": "y", "id": 7},
    "{",
    {"text": " \n", "domain": "x"},
    {"text": "none"},
  ]
  path = write(tmp_path / "a.jsonl", records)
  (chunk,) = chunks.read_chunks(str(tmp_path), [path], 10**9)
  (tmp_path / "work").mkdir()
  chunks.start_worker(str(tmp_path), "", True)
  good = [record for record in records if record != "{"]
  texts = [record["text"] for record in good]
  assert chunks.scan(chunk) == sum(len(text.encode()) for text in texts)
  scan = chunks.read_arrays(chunks.scan_path(tmp_path, 0))
  labels = json.loads(str(scan["labels"]))
  assert [labels[index][0] for index in scan["label"]] == ["x", "y", "x", None]
  assert labels[1] == ["y", f"{path}:2"]
  assert scan["characters"].tolist() == [len(text) for text in texts]
  assert scan["bytes"].tolist() == [len(text.encode()) for text in texts]
  assert scan["blank"].tolist() == [False, False, True, False]
  assert [row.tobytes() for row in scan["text"]] == [
    hashlib.sha256(text.encode()).digest() for text in texts
  ]
  assert [row.tobytes() for row in scan["origin"]] == [
    origin_digest(origin) for origin in ["book", *texts[1:]]
  ]
  assert json.loads(str(scan["ids"])) == [[1, "7", f"{path}:2"]]
  bad = json.loads(str(scan["bad"]))
  assert bad["counts"] == {str(path): {"not JSON": 1}}
  (message,) = bad["messages"]
  assert message.startswith(f"{path}:3: not JSON")
  assert json.loads(str(scan["files"])) == [[str(path), len(good)]]
  chunks.start_worker(str(tmp_path), "", False)
  with pytest.raises(UserError, match=r"a\.jsonl:3: not JSON"):
    chunks.scan(chunk)


def test_encode_writes_tokens_that_decode_to_the_texts(tmp_path):
  tokenizer = byte_tokenizer()
  (tmp_path / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
  (tmp_path / "work").mkdir()
  chunks.start_worker(str(tmp_path), "", False)
  texts = ["one é", "", "漢字" * 9]
  job = chunks.Job(3, texts, np.array([4, 0, 2]), np.array([True, False, True]))
  assert chunks.encode(job) == sum(len(text.encode()) for text in texts)
  tokens = np.fromfile(tmp_path / tokens_name(3), "<u2")
  arrays = chunks.read_arrays(chunks.encoded_path(tmp_path, 3))
  documents = arrays["documents"]
  assert [
    bytes(tokens[start : start + length].astype(np.uint8)).decode()
    for start, length in zip(documents["start"], documents["tokens"])
  ] == texts
  assert documents["characters"].tolist() == [len(text) for text in texts]
  assert documents["bytes"].tolist() == [len(text.encode()) for text in texts]
  assert documents["source"].tolist() == [4, 0, 2]
  assert documents["held_out"].tolist() == [True, False, True]
  assert set(documents["file"]) == {3}
  content = (tmp_path / tokens_name(3)).read_bytes()
  assert str(arrays["sha256"]) == hashlib.sha256(content).hexdigest()


def test_a_damaged_file_is_named_and_removed(tmp_path):
  path = Path(tmp_path, "x.npz")
  chunks.write_arrays(path, a=np.arange(3), b="text")
  arrays = chunks.read_arrays(path)
  assert arrays["a"].tolist() == [0, 1, 2] and str(arrays["b"]) == "text"
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r"x\.npz: damaged"):
    chunks.read_arrays(path)
  assert not path.exists()
