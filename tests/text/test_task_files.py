import gzip
import json

import pytest

from edl_jax.config import UserError
from edl_jax.text.task_files import (
  Task,
  TaskDocument,
  read_task,
  task_files,
  task_lines,
  task_texts,
)

SHORTEST = {"context": "2 + 2 =", "continuations": [" 4", " 5"], "gold": 0}


def written(path, *records):
  lines = [
    record if isinstance(record, str) else json.dumps(record)
    for record in records
  ]
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def test_shortest_line_has_defaults(tmp_path):
  path = written(tmp_path / "sums.easy.jsonl", SHORTEST, SHORTEST)
  assert read_task(path) == Task(
    name="sums",
    form="rc",
    group="sums",
    shots=0,
    licence="not stated",
    documents=tuple(
      TaskDocument(number, ("2 + 2 =",) * 2, (" 4", " 5"), 0)
      for number in ("1", "2")
    ),
  )


def test_single_continuation_is_a_gold_answer(tmp_path):
  record = {"context": "", "continuations": ["x"], "gold": 0, "note": "ignored"}
  task = read_task(written(tmp_path / "a.jsonl", record))
  assert task.form == "bpb"
  assert task.documents[0].contexts == ("",)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_task_lines_are_read_back(tmp_path, suffix):
  task = Task(
    name="names",
    form="mc",
    group="blanks",
    shots=3,
    licence="CC BY 4.0",
    documents=(
      TaskDocument("a", ("Anna", "Ben"), (" slept.", " slept."), 1),
      TaskDocument("b", ("问题\n",) * 3, ("A", "B", "C"), 2, "Answer:"),
    ),
  )
  content = b"".join(task_lines(task))
  # A context that the choices share is written once.
  assert content.count("问题".encode()) == 1
  path = tmp_path / f"anything{suffix}"
  path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
  assert read_task(str(path)) == task


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ("{", "not JSON"),
    ("[1]", "not an object, but list"),
    ({"context": None}, "key 'context' is missing"),
    ({"context": 3}, "context must be a string or a list, not int"),
    ({"context": ["a"]}, "1 contexts for 2 continuations"),
    ({"context": "\ud800"}, "context holds half a surrogate pair"),
    ({"continuations": " 4"}, "continuations must be a list, not str"),
    ({"continuations": []}, "continuations must hold texts, none empty"),
    (
      {"continuations": [" 4", ""]},
      "continuations must hold texts, none empty",
    ),
    ({"continuations": [" 4", 5]}, "continuations must hold strings, not int"),
    ({"gold": "0"}, "gold must be an integer, not str"),
    ({"gold": True}, "gold must be an integer, not bool"),
    ({"gold": 2}, "gold=2 is not the index of one of 2 continuations"),
    ({"gold": -1}, "gold=-1 is not the index"),
    ({"unconditioned": 1}, "unconditioned must be a string, not int"),
    ({"id": 0.5}, "id must be a string or an integer, not float"),
    ({"id": "1"}, "id '1' occurs a second time"),
    ({"form": "essay"}, "form 'essay' is none of rc, mc, bpb"),
    ({"form": "bpb"}, "form 'bpb' needs one continuation, not 2"),
    ({"form": "mc"}, "form is 'mc', but 'rc' on the first line"),
    ({"shots": 5}, "shots is 5, but 0 on the first line"),
    ({"task": "other"}, "task is 'other', but 'a' on the first line"),
  ],
)
def test_wrong_line_is_named(tmp_path, changes, reason):
  wrong = changes if isinstance(changes, str) else {**SHORTEST, **changes}
  path = written(tmp_path / "a.jsonl", SHORTEST, wrong, SHORTEST)
  with pytest.raises(UserError) as error:
    read_task(path)
  assert str(error.value).startswith(f"{path}:2: {reason}")
  assert "\n" not in str(error.value)


def test_damaged_and_missing_files(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  content = gzip.compress(json.dumps(SHORTEST).encode() + b"\n")
  path.write_bytes(content[:-9])
  with pytest.raises(UserError, match=r":2: cannot be read further"):
    read_task(str(path))
  path.write_bytes(gzip.compress(b""))
  with pytest.raises(UserError, match="empty file"):
    read_task(str(path))
  with pytest.raises(UserError, match="No such file"):
    read_task(str(tmp_path / "b.jsonl"))


def test_task_files_of_a_folder(tmp_path):
  for name in ("b.mc.jsonl.gz", "a.jsonl", ".a.jsonl.tmp", "manifest.json"):
    (tmp_path / name).touch()
  assert task_files(str(tmp_path)) == {
    "a": str(tmp_path / "a.jsonl"),
    "b.mc": str(tmp_path / "b.mc.jsonl.gz"),
  }
  with pytest.raises(UserError, match="no task files"):
    task_files(str(tmp_path / "nothing"))


def test_task_texts_hold_the_shots_once():
  shots = "Q: 1 + 1\nA: 2\n\nQ: 1 + "
  task = Task(
    name="sums",
    form="rc",
    group="sums",
    shots=1,
    licence="",
    documents=(
      TaskDocument("1", (f"{shots}2\nA:",) * 2, (" 3", " 4"), 0),
      TaskDocument("2", ("unused", f"{shots}5\nA:"), (" 7", " 6"), 1),
    ),
  )
  assert list(task_texts(task)) == [
    "Q: 1 + 1\nA: 2\n\n",
    "Q: 1 + 2\nA: 3",
    "Q: 1 + 5\nA: 6",
  ]
