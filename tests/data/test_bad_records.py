"""Bad records by file and reason, over parts that are merged."""

import json

import pytest

from data.bad_records import BadRecords, lines
from edl_jax.config import UserError
from edl_jax.text.readers import read_records


def added(*pairs):
  bad = BadRecords()
  for where, reason in pairs:
    bad.add(where, UserError(f"{where}: {reason}"))
  return bad


@pytest.mark.parametrize(
  ("where", "reason", "file", "expected"),
  [
    ("a.jsonl:7", "not JSON (Expecting value)", "a.jsonl", "not JSON"),
    ("a: b.jsonl:7", "not an object, but int", None, None),
    ("p.parquet:row 3", "x cannot be read (why)", "p.parquet", None),
    ("d/t.txt", "not UTF-8 (bad start at byte 1)", "d/t.txt", "not UTF-8"),
    ("a:1", "key 'domain' is missing; it must", "a", "key 'domain' is missing"),
    ("a:1", 'unknown domain "it\'s"; there are', "a", "unknown domain"),
    ("a:1", "id 'b (1)' occurs twice", "a", "id occurs twice"),
  ],
)
def test_reasons_are_without_what_differs(where, reason, file, expected):
  bad = added((where, reason))
  file = file or where.rpartition(":")[0]
  (found,) = bad.by_file()[file]
  assert found == (expected or reason.partition(" (")[0])
  assert bad.messages == [f"{where}: {reason}"]


def test_parts_add_up_in_order():
  every = [(f"{n % 13:02}.jsonl:{n}", f"reason {n % 3}") for n in range(100)]
  whole, merged = added(*every), BadRecords()
  for begin in range(0, 100, 9):
    part = added(*every[begin : begin + 9])
    merged.merge(json.loads(json.dumps(part.to_json())))
  assert merged.to_json() == whole.to_json() and merged.total == 100
  assert merged.messages == [f"{w}: {r}" for w, r in every[:10]]
  assert merged.by_file()["00.jsonl"] == {
    f"reason {k}": sum(n % 13 == 0 and n % 3 == k for n in range(100))
    for k in range(3)
  }
  told = lines(merged.by_file())
  assert told[1] == "01.jsonl: 2 reason 0, 3 reason 1, 3 reason 2"
  assert told[10:] == ["3 more files: see manifest.json"]


def test_reasons_of_the_readers(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{\n[]\n{}\n{"text": 1}\n[1\n')
  bad = BadRecords()
  for where, error in read_records(str(path)):
    assert isinstance(error, UserError)
    bad.add(where, error)
  assert bad.by_file() == {
    str(path): {
      "not JSON": 2,
      "not an object, but list": 1,
      "key 'text' is missing": 1,
      "text must be a string, not int": 1,
    }
  }
