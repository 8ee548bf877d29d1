import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edl_jax.cache import write_cache
from edl_jax.config import DataConfig, Experiment, ModelConfig
from edl_jax.text import tokenizer as tokenizer_lib
from edl_jax.text.documents import Document
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.tokenizer import (
  DOCUMENT_START,
  Tokenizer,
  _cut_runs,
  byte_tokenizer,
  load_tokenizer,
  train_tokenizer,
)

TEXTS = [
  f"the cat number {n} sat on a mat while seven other animals were watching"
  f" it from behind the old wooden fence;\n  result = {n * n} # comment\n"
  for n in range(60)
]
BPE = train_tokenizer(TEXTS, 330)
BYTE = byte_tokenizer()
both = pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])


@both
@settings(deadline=None, database=None)
@given(text=st.text() | st.text(alphabet="<|document>\n \t 0e\r"))
def test_every_string_survives(tokenizer, text):
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32
  assert tokenizer.decode(tokens) == text
  assert tokenizer.document_start_id not in tokens
  assert tokenizer.byte_lengths_V[tokens].sum() == len(text.encode())


@both
def test_special_token_is_placed_by_id_only(tokenizer):
  text = f"a{DOCUMENT_START}{DOCUMENT_START} b"
  tokens = tokenizer.encode(text)
  assert tokenizer.document_start_id not in tokens
  assert tokenizer.decode(tokens) == text
  assert tokenizer.token_text(tokenizer.document_start_id) == DOCUMENT_START
  assert tokenizer.decode([tokenizer.document_start_id]) == ""


@both
def test_byte_lengths_and_size(tokenizer):
  lengths_V = tokenizer.byte_lengths_V
  assert lengths_V.shape == (tokenizer.vocabulary_size,)
  assert np.flatnonzero(lengths_V == 0) == [tokenizer.document_start_id]


def test_byte_tokenizer_is_utf8():
  text = "naïve 漢字 😀\x00\n"
  assert BYTE.encode(text).tolist() == list(text.encode())
  assert BYTE.document_start_id == 256
  assert BYTE.vocabulary_size == 257


def test_training_learns_words_but_not_numbers():
  assert BPE.vocabulary_size == 330
  pieces = [BPE.token_text(token) for token in BPE.encode("the cat 123")]
  assert "the" in pieces and " cat" in pieces
  assert pieces[-3:] == ["1", "2", "3"]
  # Training text that is too small for the size gives what it can.
  assert train_tokenizer(["ab"], 4096).vocabulary_size < 300


def test_training_is_deterministic():
  assert train_tokenizer(TEXTS, 330).to_json() == BPE.to_json()


def test_training_samples_large_texts(monkeypatch):
  monkeypatch.setattr(tokenizer_lib, "_TRAINING_CHARACTERS", 500)
  monkeypatch.setattr(tokenizer_lib, "_TRAINING_CHARACTERS_PER_TOKEN", 1)
  few = train_tokenizer(TEXTS, 330)
  assert few.to_json() == train_tokenizer(TEXTS, 330).to_json()
  assert few.to_json() != BPE.to_json()


@both
def test_json(tokenizer):
  copy = Tokenizer.from_json(tokenizer.to_json())
  text = f"the cat{DOCUMENT_START} 12 é"
  assert copy.to_json() == tokenizer.to_json()
  assert copy.document_start_id == tokenizer.document_start_id
  assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_batches_are_cut_into_chunks(monkeypatch):
  whole = BPE.encode_batch(TEXTS)
  monkeypatch.setattr(tokenizer_lib, "_ENCODING_CHARACTERS", 100)
  for a, b in zip(whole, BPE.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(a, b)
  assert BPE.encode_batch([]) == []
  assert BPE.encode("").shape == (0,)


def test_token_text_is_printable():
  assert BYTE.token_text(ord("\n")) == "\\n"
  assert BYTE.token_text(0xE2) == "\\xe2"
  assert BYTE.token_text(ord(" ")) == " "
  for token in range(BPE.vocabulary_size):
    assert BPE.token_text(token).isprintable()


def corpus_of(train, held_out):
  def group(texts):
    return (tuple(Document(text, "a", text) for text in texts),)

  return Corpus(
    Taxonomy.from_names(["a"]), group(train), group(held_out), "hash"
  )


def bpe_experiment():
  return Experiment(
    model=ModelConfig(vocabulary_size=330), data=DataConfig(tokenizer="bpe")
  )


def test_load_trains_on_training_text_only(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path))
  corpus = corpus_of(TEXTS, ["zqzqzqzq"] * 100)
  assert load_tokenizer(bpe_experiment(), corpus).to_json() == BPE.to_json()


def test_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))
  corpus, experiment = corpus_of(TEXTS, []), bpe_experiment()
  load_tokenizer(experiment, corpus)
  (path,) = (tmp_path / "cache").iterdir()
  # It is read: another tokenizer in its place is what we get.
  whole = path.read_bytes()
  write_cache(path.name, BYTE.to_json().encode())
  assert load_tokenizer(experiment, corpus).vocabulary_size == 257
  # Damage is mended.
  path.write_text(BYTE.to_json())
  assert load_tokenizer(experiment, corpus).to_json() == BPE.to_json()
  assert path.read_bytes() == whole
  # Another split of the same content has other training text.
  experiment.data.held_out_fraction = 0.5
  load_tokenizer(experiment, corpus)
  assert len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "file" / "cache"))
  tokenizer = load_tokenizer(bpe_experiment(), corpus_of(TEXTS, []))
  assert tokenizer.to_json() == BPE.to_json()


@pytest.mark.parametrize("run", ["a", "ACGT", "-=", " ", "漢字"])
def test_long_runs_do_not_stop_training(run):
  # Uncut, the trainer takes minutes: its time grows with the square.
  text = run * (300_000 // len(run))
  begun = time.process_time()
  tokenizer = train_tokenizer([text, "plain words"], 400)
  assert time.process_time() - begun < 60
  assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]


def test_cutting_leaves_other_text_alone():
  # Runs below the limit, numbers, and a long text of short runs.
  for text in ("a" * 999, "1" * 5000, "word, " * 5000, ""):
    assert list(_cut_runs(text)) == [text]
  parts = list(_cut_runs("x " + "a" * 2500 + " y"))
  assert "".join(parts) == "x " + "a" * 2500 + " y"
  assert list(map(len, parts)) == [1002, 1000, 502]
