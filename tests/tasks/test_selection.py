"""Which task files are chosen, and what is refused."""

import gzip
import hashlib
import json

import pytest

from edl_jax.config import UserError
from edl_jax.tasks.selection import select_tasks


def write(folder, name, count=3, **common):
  """Writes a task file of `count` documents; returns its content."""
  lines = [
    json.dumps(
      {"context": f"{i} =", "continuations": [" 0", " 1"], "gold": i % 2}
      | common
    )
    for i in range(count)
  ]
  content = "\n".join(lines).encode() + b"\n"
  if name.endswith(".gz"):
    content = gzip.compress(content)
  (folder / name).write_bytes(content)
  return content


@pytest.fixture
def folder(tmp_path):
  write(tmp_path, "piqa.rc.jsonl", group="commonsense")
  write(tmp_path, "piqa.mc.jsonl.gz", group="commonsense", form="mc")
  write(tmp_path, "copa.rc.jsonl", 10, group="superglue")
  write(tmp_path, "mine.jsonl")
  return tmp_path


def test_names_are_those_of_tasks_groups_or_files(folder):
  def names(*chosen):
    return list(select_tasks(str(folder), chosen))

  every = ["copa.rc", "mine", "piqa.mc", "piqa.rc"]
  assert names() == every
  assert names("piqa") == names("commonsense") == ["piqa.mc", "piqa.rc"]
  assert names("piqa.rc", "mine") == ["mine", "piqa.rc"]
  assert names("piqa", "piqa.mc", "superglue", "mine") == every


def test_documents_are_taken_evenly(folder):
  (chosen,) = select_tasks(str(folder), ["copa"], 3).values()
  assert [each.id for each in chosen.task.documents] == ["1", "4", "7"]
  assert chosen.num_documents == 10
  content = (folder / "copa.rc.jsonl").read_bytes()
  assert chosen.sha256 == hashlib.sha256(content).hexdigest()
  (chosen,) = select_tasks(str(folder), ["copa"], 11).values()
  assert len(chosen.task.documents) == 10


def test_unknown_names_are_told_the_nearest(folder):
  with pytest.raises(UserError, match=r"'piqua' in .*; did you mean piqa\?"):
    select_tasks(str(folder), ["piqua"])
  with pytest.raises(UserError, match="groups: commonsense, mine, superglue"):
    select_tasks(str(folder), ["xyz"])
  with pytest.raises(UserError, match=r"no task files.*data\.benchmarks"):
    select_tasks(str(folder / "none"))


def test_damage_is_named_by_its_line(folder):
  with open(folder / "mine.jsonl", "a") as file:
    file.write('{"context": "x", "continuations": [" y"], "gold": 1}\n')
  with pytest.raises(UserError, match=r"mine\.jsonl:4: gold=1"):
    select_tasks(str(folder), ["mine"])
  # Other files remain usable.
  select_tasks(str(folder), ["piqa"])
  path = folder / "piqa.mc.jsonl.gz"
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(UserError, match=r"piqa\.mc\.jsonl\.gz:"):
    select_tasks(str(folder), ["piqa"])


def test_files_are_those_that_the_manifest_describes(folder):
  content = (folder / "copa.rc.jsonl").read_bytes()
  row = {
    "file": "copa.rc.jsonl",
    "sha256": hashlib.sha256(content).hexdigest(),
  }
  manifest = folder / "manifest.json"
  manifest.write_text(json.dumps({"tasks": {"copa.rc": row}}))
  assert list(select_tasks(str(folder), ["copa", "mine"]))
  write(folder, "copa.rc.jsonl", 9, group="superglue")
  with pytest.raises(UserError, match=r"copa\.rc\.jsonl: not the file that"):
    select_tasks(str(folder), ["copa"])
