"""The command that writes text of Markov sources."""

import gzip
import json

from data import markov
from edl_jax.text.markov import MarkovMixture


def test_text_is_that_of_the_manifest(tmp_path):
  out = tmp_path / "markov"
  assert not markov.main([f"--out={tmp_path / 'edge'}", "--shared=0"])
  arguments = ["--shared=0.25", "--sources=2", "--symbols=6", "--seed=3"]
  assert not markov.main([f"--out={out}", "--characters=5000", *arguments])
  manifest = json.loads((out / "manifest.json").read_text())
  mixture = MarkovMixture(**manifest["mixture"])
  assert mixture == MarkovMixture(0.25, 2, 6, seed=3)
  assert sorted(p.name for p in (out / "text").iterdir()) == [
    "source_0.jsonl.gz",
    "source_1.jsonl.gz",
  ]
  with gzip.open(out / "text" / "source_1.jsonl.gz", "rt") as lines:
    records = [json.loads(line) for line in lines]
  assert [record["text"] for record in records] == mixture.documents(1, 5000)
  assert {record["domain"] for record in records} == {"source_1"}


def test_bad_usage_is_one_line(tmp_path, capsys):
  (tmp_path / "file").touch()
  for flags, word in (
    ([f"--out={tmp_path / 'file'}"], "file"),
    ([f"--out={tmp_path}", "--shared=1.5"], "shared"),
    ([f"--out={tmp_path}", "--symbols=99"], "--symbols=99: at most 52"),
    ([f"--out={tmp_path}", "--symbols=3"], "symbols"),
  ):
    assert markov.main(flags) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
