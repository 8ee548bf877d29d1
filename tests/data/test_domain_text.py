"""The TFDS data set: its examples are the records of the files."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import grain
import pytest
import tensorflow_datasets as tfds

from data.domain_text.__main__ import main
from edl_jax.config import DataConfig
from edl_jax.text.sources import read_documents

RECORDS = [
  {"text": "one é 漢", "domain": "prose/news", "origin": "a", "source": "s"},
  {"text": "two\n\n\tlines\n", "domain": "prose/news"},
  {"text": "three", "domain": "plain"},
  {"text": "x" * 100_000, "domain": "prose/books", "origin": "b"},
]


def lines(records):
  return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A folder of files, and the data set made of them."""
  folder = tmp_path_factory.mktemp("text")
  (folder / "a.jsonl").write_bytes(lines(RECORDS[:3]))
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS[3:])))
  (folder / "code/go").mkdir(parents=True)
  (folder / "code/go/main.go").write_text("package main\n")
  data = tmp_path_factory.mktemp("tfds")
  main([f"--manual_dir={folder}", f"--data_dir={data}"])
  return folder, data


EXPECTED = [
  ("one é 漢", "news", "prose", "s", "a"),
  ("two\n\n\tlines\n", "news", "prose", "a.jsonl", "two\n\n\tlines\n"),
  ("three", "plain", "", "a.jsonl", "three"),
  ("x" * 100_000, "books", "prose", "b.jsonl.gz", "b"),
  ("package main\n", "go", "code", "code/go/main.go", "package main\n"),
]
KEYS = ("text", "fine", "coarse", "source", "origin")


def test_examples_are_the_records_in_order(built):
  _, data = built
  builder = tfds.builder_from_directory(data / "domain_text/1.0.0")
  examples = builder.as_data_source(split="train")
  assert set(examples[0]) == set(KEYS)
  found = [tuple(e[key].decode() for key in KEYS) for e in examples]
  assert found == EXPECTED
  assert "tensorflow" not in sys.modules


def test_grain_reads_it(built):
  _, data = built
  builder = tfds.builder_from_directory(data / "domain_text/1.0.0")
  source = builder.as_data_source(split="train")
  dataset = grain.MapDataset.source(source).shuffle(seed=1)
  texts = {example["text"].decode() for example in dataset}
  assert texts == {row[0] for row in EXPECTED} and len(dataset) == 5


def test_an_experiment_reads_the_same_documents(built):
  folder, data = built
  original = read_documents(DataConfig(files=f"{folder}/**"))
  copy = read_documents(
    DataConfig(files=f"{data}/domain_text/**/*.array_record*")
  )
  assert copy == original and len(copy[1]) == len(EXPECTED)


def test_it_is_built_once(built, capsys):
  folder, data = built
  files = list((data / "domain_text/1.0.0").iterdir())
  times = [path.stat().st_mtime_ns for path in files]
  main([f"--manual_dir={folder}", f"--data_dir={data}"])
  assert [path.stat().st_mtime_ns for path in files] == times
  assert capsys.readouterr().out.startswith("5 documents in ")


@pytest.mark.parametrize(
  ("record", "reason"),
  [
    (b"{", r"a.jsonl:5: not JSON"),
    (b'{"text": 1}', r"a.jsonl:5: text must be a string"),
    (b'{"text": "a", "domain": "a/b/c"}', r"a.jsonl:5: domain 'a/b/c'"),
  ],
)
def test_bad_record_leaves_nothing(tmp_path, capsys, record, reason):
  folder, data = tmp_path / "text", tmp_path / "tfds"
  folder.mkdir()
  (folder / "a.jsonl").write_bytes(lines(RECORDS) + record + b"\n")
  assert main([f"--manual_dir={folder}", f"--data_dir={data}"]) == 2
  assert re.search(reason, capsys.readouterr().err)
  assert not [path for path in data.rglob("*") if path.is_file()]


def test_command_line(tmp_path):
  finished = subprocess.run(
    [
      *(sys.executable, "-m", "data.domain_text"),
      *("--manual_dir=none", f"--data_dir={tmp_path}"),
    ],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 2
  assert finished.stderr == "error: --manual_dir=none: no such folder\n"
