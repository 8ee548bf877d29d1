"""Prepared folders: what is read equals the text; what is wrong is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.prepare import Options, prepare
from edl_jax.config import DataConfig, Experiment, ModelConfig, UserError
from edl_jax.text import prepared as prepared_lib
from edl_jax.text.mixture import load_corpus
from edl_jax.text.prepared import load_prepared

# By label: two coarse groups, and a domain that is its own.
LABELS = ("g/odd", "g/low", "high")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  path = tmp_path_factory.mktemp("texts") / "a.jsonl"
  records = [
    {"text": f"text {n} " + "é" * (n % 5), "domain": LABELS[n % 3]}
    for n in range(120)
  ]
  path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
  return str(path)


@pytest.fixture
def folder(files, tmp_path):
  out = str(tmp_path / "out")
  prepare(
    Options(files=files, out=out, tokenizer="byte", chunk_characters=1000)
  )
  return out


def experiment(vocabulary_size=257, **data):
  return Experiment(
    model=ModelConfig(vocabulary_size=vocabulary_size),
    data=DataConfig(tokenizer="byte", **data),
  )


def test_documents_are_those_of_the_files(files, folder):
  corpus = load_corpus(DataConfig(files=files))
  made = load_prepared(experiment(prepared=folder))
  assert made.taxonomy == corpus.taxonomy
  assert made.content_hash == corpus.content_hash
  assert made.sizes() == corpus.sizes()
  assert made.train_bytes() == corpus.train_bytes()
  # Several token files, whose documents are told apart.
  assert len(list(Path(folder).glob("tokens-*.bin"))) > 2
  for split in ("train", "held_out"):
    groups = getattr(corpus, split)
    for documents, group in zip(made.documents(split), groups, strict=True):
      read = [
        bytes(documents.arrays[array][start : start + length].astype(np.uint8))
        for array, start, length in zip(
          documents.array_I, documents.start_I, documents.length_I
        )
      ]
      assert read == [document.text.encode() for document in group]


def test_domains_are_chosen_without_preparing_anew(folder, tmp_path):
  whole = load_prepared(experiment(prepared=folder))
  assert whole.taxonomy.names == ("g/low", "g/odd", "high")
  path = tmp_path / "other.yaml"
  path.write_text(
    "domains: [{fine: high, coarse: up}, {fine: odd, weight: 3}]\n"
    "unlabelled: true\n"
  )
  part = load_prepared(experiment(prepared=folder, taxonomy=str(path)))
  assert part.taxonomy.names == ("up/high", "odd")
  # The folder has no text without a domain.
  assert part.taxonomy.weights == (1, 3) and not part.taxonomy.unlabelled
  assert part.sizes() == [whole.sizes()[2], whole.sizes()[1]]
  named = experiment(prepared=folder, domains=("low", "x/odd"))
  assert load_prepared(named).taxonomy.names == ("g/low", "x/odd")
  none = experiment(prepared=folder, domains=("low", "none"))
  with pytest.raises(UserError, match="no domain 'none'; it has low, odd"):
    load_prepared(none)


def test_what_does_not_fit_is_refused(files, folder, tmp_path):
  for refused, message in (
    (experiment(prepared=f"{tmp_path}/none"), "none: no such folder"),
    (experiment(prepared=str(tmp_path)), r"not finished \(no manifest\.json"),
    (
      experiment(prepared=folder, held_out_fraction=0.5),
      r"held_out_fraction=0\.05, not data\.held_out_fraction=0\.5",
    ),
    (
      experiment(prepared=folder, vocabulary_size=256),
      "257 token ids.*vocabulary_size=256",
    ),
  ):
    with pytest.raises(UserError, match=message) as caught:
      load_prepared(refused)
    assert "\n" not in str(caught.value)
  Path(folder, "manifest.json").write_text("{")
  with pytest.raises(UserError, match=r"manifest\.json: damaged"):
    load_prepared(experiment(prepared=folder))


def test_damaged_files_are_named(folder):
  manifest = prepared_lib.read_manifest(folder)
  prepared_lib.check_files(folder, manifest, content=True)
  path = Path(folder, "tokens-00000.bin")
  content = bytearray(path.read_bytes())
  content[0] ^= 1
  path.write_bytes(content)
  # Sizes alone do not tell.
  prepared_lib.check_files(folder, manifest, content=False)
  with pytest.raises(UserError, match=r"tokens-00000\.bin: damaged"):
    prepared_lib.check_files(folder, manifest, content=True)
  path.write_bytes(content[:-2])
  with pytest.raises(UserError, match=r"tokens-00000\.bin: damaged"):
    load_prepared(experiment(prepared=folder))
  path.unlink()
  with pytest.raises(UserError, match=r"tokens-00000\.bin: No such file"):
    load_prepared(experiment(prepared=folder))


def test_folder_can_be_moved(folder, tmp_path):
  before = load_prepared(experiment(prepared=folder))
  moved = shutil.move(folder, tmp_path / "elsewhere")
  after = load_prepared(experiment(prepared=str(moved)))
  assert after.content_hash == before.content_hash
  assert after.sizes() == before.sizes()


@pytest.mark.parametrize("name", ["tokenizer.json", "documents.npy"])
def test_any_flipped_bit_of_what_gives_tokens_meaning_is_found(folder, name):
  path = Path(folder, name)
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), max(1, len(whole) // 5)):
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    with pytest.raises(UserError, match=f"{name}: damaged") as error:
      load_prepared(experiment(prepared=folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', "3"])
def test_a_manifest_of_something_else_is_damaged(folder, content):
  Path(folder, "manifest.json").write_text(content)
  with pytest.raises(UserError, match=r"manifest\.json: damaged"):
    load_prepared(experiment(prepared=folder))
