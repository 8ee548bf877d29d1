"""The embedded mixture as a file reads back as the same corpus."""

import json
import os

import pytest

from data.export import export, main
from edl_jax.config import DataConfig, UserError
from edl_jax.text.mixture import load_corpus

CAP = 40_000


def test_export_carries_the_same_corpus(tmp_path, capsys):
  path = str(tmp_path / "corpus.jsonl")
  arguments = [f"--out={path}", f"--max_characters_per_domain={CAP}"]
  assert main(arguments) == 0
  embedded = DataConfig(max_characters_per_domain=CAP)
  copy = DataConfig(files=path, max_characters_per_domain=CAP)
  assert load_corpus(copy) == load_corpus(embedded)
  with open(path, encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  assert capsys.readouterr().out == (
    f"{len(records)} documents written to {path}\n"
  )
  # A second export must not replace a file that may have been edited.
  content = os.stat(path)
  assert main(arguments) == 2
  assert capsys.readouterr().err == (
    f"error: --out={path}: the file exists; choose another\n"
  )
  assert os.stat(path) == content


def test_a_folder_that_is_missing_is_named(tmp_path):
  data = DataConfig(domains=("arithmetic",), max_characters_per_domain=9000)
  path = f"{tmp_path}/none/corpus.jsonl"
  with pytest.raises(UserError, match="No such file or directory"):
    export(data, path)
