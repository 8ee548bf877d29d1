"""Near duplicates: what exact similarity finds, reported and deterministic."""

import dataclasses
import json
import random
import sys

import numpy as np
import pytest

from data.near import Near
from data.prepare import Options, prepare
from edl_jax.config import UserError

pytest.importorskip("datasketch")

WORDS = [f"word{n}" for n in range(3000)]


def jaccard(text, other, shingle):
  """Exact similarity of texts whose words are divided by single spaces."""

  def shingles(text):
    words = text.split(" ")
    return {
      tuple(words[start : start + shingle])
      for start in range(max(1, len(words) - shingle + 1))
    }

  own, others = shingles(text), shingles(other)
  return len(own & others) / len(own | others)


def test_signatures_estimate_similarity():
  rng = random.Random(0)
  near = Near(0.5, 3, 512)
  base = rng.choices(WORDS, k=400)
  for changed in (0, 3, 15, 60):
    words = list(base)
    for place in rng.sample(range(len(words)), changed):
      words[place] = rng.choice(WORDS)
    text, other = " ".join(base), " ".join(words)
    estimate = np.mean(near.signature(text) == near.signature(other))
    # Four standard errors.
    assert abs(estimate - jaccard(text, other, 3)) < 4 * 0.5 / 512**0.5


def test_a_chinese_character_is_a_word_and_case_does_not_count():
  near = Near(0.5, 2, 64)
  same = near.signature("漢字 Ab").tolist()
  assert same == near.signature("漢 字, aB!").tolist()
  assert same != near.signature("字漢 ab").tolist()
  assert len(near.signature("")) == 64


def write_corpus(path):
  """Writes 40 texts, each with a copy that differs in a few words."""
  rng = random.Random(1)
  texts = [" ".join(rng.choices(WORDS, k=200)) for _ in range(40)]
  copies = []
  for text in texts[:25]:
    words = text.split(" ")
    words[rng.randrange(200)] = "other"
    copies.append(" ".join(words))
  records = [
    {"text": text, "domain": "ab"[n % 2]}
    for n, text in enumerate(texts + copies)
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return texts, copies


def test_preparation_leaves_out_what_exact_similarity_finds(tmp_path):
  path = tmp_path / "a.jsonl"
  texts, copies = write_corpus(path)
  similar = [max(jaccard(c, t, 5) for t in texts) > 0.7 for c in copies]
  options = Options(
    str(path), str(tmp_path / "out"), "byte", near_duplicates=0.7
  )
  manifest = prepare(options)
  assert manifest["skipped"]["near duplicate"] == sum(similar) == 25
  report = manifest["near_duplicates"]
  assert sum(report["removed"].values()) == 25
  assert len(report["examples"]) == 5 + 5
  for example in report["examples"]:
    removed, like = (
      int(example[key].rpartition(":")[2]) - 1 for key in ("removed", "like")
    )
    assert removed == like + 40
    assert copies[removed - 40].startswith(example["text"])
    exact = jaccard(copies[removed - 40], texts[like], 5)
    assert abs(example["similarity"] - exact) < 0.2
  assert manifest["settings"]["near_permutations"] == 128
  again = dataclasses.replace(
    options, out=str(tmp_path / "again"), workers=2, chunk_characters=9000
  )
  other = prepare(again)
  assert other["near_duplicates"] == report
  assert other["content_hash"] == manifest["content_hash"]


def test_without_the_option_the_manifest_is_as_before(tmp_path):
  path = tmp_path / "a.jsonl"
  write_corpus(path)
  manifest = prepare(Options(str(path), str(tmp_path / "out"), "byte"))
  assert not [key for key in manifest["settings"] if "near" in key]
  assert "near_duplicates" not in manifest
  assert "near duplicate" not in manifest["skipped"]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasketch", None)
  with pytest.raises(UserError, match="needs the package datasketch"):
    prepare(Options("none", str(tmp_path / "out"), "byte", near_duplicates=0.8))
  assert not (tmp_path / "out").exists()
