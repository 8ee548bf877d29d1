"""The plan: which records are kept, how much of them, which are held out."""

import hashlib
import json

import numpy as np
import pytest

from data.bad_records import BadRecords
from data.plan import make_plan
from edl_jax.config import DataConfig, UserError
from edl_jax.text.mixture import held_out_origins, origin_digest


def scan_of(*records, bad=None, missing=()):
  """Returns what `chunks.scan` writes for (label, text, origin, id)."""
  names = list(dict.fromkeys(label for label, *_ in records))
  texts = [text for _, text, *_ in records]
  return {
    "label": np.array([names.index(label) for label, *_ in records]),
    "confidence": np.linspace(0.5, 1, len(records), dtype=np.float32),
    "characters": np.array([len(text) for text in texts]),
    "bytes": np.array([len(text.encode()) for text in texts]),
    "blank": np.array([not text.strip() for text in texts]),
    "text": digests(hashlib.sha256(text.encode()).digest() for text in texts),
    "origin": digests(origin_digest(origin) for _, _, origin, _ in records),
    "labels": np.array(json.dumps([(name, f"at {name}") for name in names])),
    "ids": np.array(
      json.dumps(
        [
          (index, each, f"at:{index}")
          for index, (_, _, _, each) in enumerate(records)
          if each
        ]
      )
    ),
    "bad": np.array(json.dumps((bad or BadRecords()).to_json())),
    "files": np.array(json.dumps([["f", 2], ["g", len(records) - 2]])),
    "missing": np.array(json.dumps(missing)),
  }


def digests(values):
  return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 32)


RECORDS = [
  ("g/a", "aaaaaa", "1", ""),
  ("b", "bbbb", "2", "x"),
  ("g/a", "  ", "3", ""),
  ("g/a", "bbbb", "4", ""),  # the same text as record 1
  ("b", "ccccé", "5", "y"),
  ("g/a", "dddddd", "6", ""),
  ("b", "eeeeeeee", "7", ""),  # 3 characters are left
  ("b", "ffff", "8", ""),  # none are left
  ("g/a", "gg", "9", ""),
]


def plan_of(*scans, skip_bad=False, rules="", **data):
  settings = {
    "max_characters_per_domain": 12,
    "held_out_fraction": 0.5,
    "files": "x",
  }
  return make_plan(
    scans, DataConfig(**settings | data), skip_bad=skip_bad, rules=rules
  )


def test_what_is_kept():
  plan = plan_of(scan_of(*RECORDS[:4]), scan_of(*RECORDS[4:]))
  assert plan.taxonomy.names == ("b", "g/a")
  assert plan.source_N.tolist() == [1, 0, -1, -1, 0, 1, 0, -1, -1]
  assert plan.characters_N.tolist() == [6, 4, 0, 0, 5, 6, 3, 0, 0]
  assert plan.begin.tolist() == [0, 4, 9]
  assert plan.num_bytes == 6 + 4 + 6 + 6 + 8
  counts = {key: n for key, n in plan.skipped.items() if key != "messages"}
  assert counts == {
    "bad": 0,
    "duplicate": 1,
    "empty": 1,
    "over the limit": 2,
  }


def test_what_is_held_out_is_what_reading_holds_out():
  plan = plan_of(scan_of(*RECORDS))
  groups = [
    [origin_digest(RECORDS[number][2]) for number in numbers]
    for numbers in ([1, 4, 6], [0, 5])
  ]
  expected = held_out_origins(("b", "a"), groups, 0.5)
  held_out = {
    origin_digest(RECORDS[number][2])
    for number in np.flatnonzero(plan.held_out_N)
  }
  assert held_out == expected and len(held_out) >= 2
  assert not plan.held_out_N[plan.source_N < 0].any()


def test_report_sums_by_source():
  plan = plan_of(scan_of(*RECORDS))
  documents = np.zeros(
    5, [(name, np.int64) for name in ("source", "held_out", "bytes", "tokens")]
  )
  documents["source"] = plan.source_N[plan.source_N >= 0]
  documents["bytes"] = [6, 4, 6, 6, 3]
  documents["tokens"] = [1, 2, 3, 4, 5]
  documents["held_out"] = [1, 0, 1, 1, 0]
  b, a = plan.report(documents)
  assert b["confidence"] == pytest.approx(
    np.linspace(0.5, 1, 9)[[1, 4, 6]].mean()
  )
  assert a["confidence"] == pytest.approx(np.linspace(0.5, 1, 9)[[0, 5]].mean())
  del a["confidence"], b["confidence"]
  assert b == {
    "label": "b",
    "documents": 3,
    "held_out": 1,
    "bytes": 13,
    "tokens": 10,
  }
  assert a == {
    "label": "a",
    "documents": 2,
    "held_out": 2,
    "bytes": 12,
    "tokens": 5,
  }


def test_digests_are_grouped_by_source():
  plan = plan_of(scan_of(*RECORDS))
  source_K = plan.source_N[plan.source_N >= 0]
  text_K = digests(bytes([number] * 32) for number in range(5))
  found = [list(pairs) for pairs in plan.digests(source_K, list(text_K))]
  kept = [0, 1, 4, 5, 6]
  assert found == [
    [
      (origin_digest(RECORDS[kept[k]][2]), bytes([k] * 32))
      for k in range(5)
      if source_K[k] == source
    ]
    for source in (0, 1)
  ]


@pytest.mark.parametrize(
  ("record", "message", "reason"),
  [
    (
      ("a/b/c", "text", "0", ""),
      "a/b/c",
      "domain must be fine or coarse/fine",
    ),
    (("b", "text", "0", "x"), "id 'x' occurs", "id occurs a second time"),
  ],
)
def test_bad_records_stop_or_are_dropped(record, message, reason):
  with pytest.raises(UserError, match=message):
    plan_of(scan_of(*RECORDS, record))
  read = BadRecords()
  read.add("a:1", UserError("a:1: not JSON (at character 2)"))
  plan = plan_of(scan_of(*RECORDS, record, bad=read), skip_bad=True)
  assert plan.source_N[-1] == -1
  assert plan.skipped["bad"] == 2
  first, second = plan.skipped["messages"]
  assert first == "a:1: not JSON (at character 2)" and message in second
  # The place in the message is that of the first record with the label.
  assert plan.bad == {"a": {"not JSON": 1}, "g": {reason: 1}}


def test_a_column_of_the_rules_that_no_record_has():
  first, second = (
    scan_of(*RECORDS[:4], missing=["meta.set", "url"]),
    scan_of(*RECORDS[4:], missing=["url"]),
  )
  with pytest.raises(
    UserError, match=r"r\.yaml: no record has the column url;"
  ):
    plan_of(first, second, rules="r.yaml")
  second["missing"] = np.array("[]")
  plan_of(first, second, rules="r.yaml")
