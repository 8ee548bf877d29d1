"""Tokens of documents, and which of them the loss counts."""

import numpy as np
import pytest
import tokenizers

from edl_jax.text.documents import Document, SupervisedExample
from edl_jax.text.encode import encode_corpus
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def make_tokenizer():
  library = tokenizers.Tokenizer.from_str(
    train_tokenizer(["ab abc <|im ab>"] * 9, 300).to_json()
  )
  library.add_special_tokens(["<|im|>", "<|im|>>"])
  return Tokenizer(library)


TOKENIZER = make_tokenizer()
TEXTS = [Document("ab <|im|> abc", "a", "x"), Document("abc", "a", "y")]
EXAMPLES = [
  # "abc" is one token of the text.
  SupervisedExample("ababc ab", "b", "x", (3,)),
  SupervisedExample("<|im|>ab<|im|>>abc<|im|> ab", "b", "y", (15, 24), True),
  SupervisedExample("<|im|>ab", "b", "z", (0,), end="<|im|>"),
  SupervisedExample("abc", "b", "z", (1,)),
]


def corpus_of(*groups):
  taxonomy = Taxonomy.from_names([own[0].domain for own in groups])
  return Corpus(taxonomy, groups, ((),) * len(groups), "hash")


def naive(example):
  """Tokens and mask, a part at a time; special tokens by replacement."""
  tokens, mask = [], []
  ids = TOKENIZER.special_ids
  for text, counted in example.parts():
    pieces = [text]
    for name in ("<|im|>>", "<|im|>") if example.special else ():
      pieces = [
        part
        for piece in pieces
        for part in (
          [piece] if isinstance(piece, int) else spread(piece, name, ids[name])
        )
      ]
    for piece in pieces:
      own = [piece] if isinstance(piece, int) else TOKENIZER.encode(piece)
      tokens += list(own)
      mask += [counted] * len(own)
  if not example.special:
    tokens.append(ids[example.end or "<|document|>"])
    mask.append(True)
  return tokens, mask


def spread(text, name, number):
  """Returns what is between the names, with the number in their places."""
  found = []
  for piece in text.split(name):
    found += [piece, number]
  return found[:-1]


def test_examples_are_encoded_part_by_part():
  texts, examples = encode_corpus(
    corpus_of(tuple(TEXTS), tuple(EXAMPLES)), "train", TOKENIZER
  )
  assert texts.counted is None
  for number, document in enumerate(TEXTS):
    start = texts.start_I[number]
    own = texts.arrays[0][start : start + texts.length_I[number]]
    np.testing.assert_array_equal(own, TOKENIZER.encode(document.text))
  assert len(examples) == len(EXAMPLES)
  for number, example in enumerate(EXAMPLES):
    tokens, counted = examples.read(number)
    assert (tokens.tolist(), counted.tolist()) == naive(example)
  # No token crosses from a prompt to a completion, and text that spells a
  # special token is one only where a template wrote it.
  special = TOKENIZER.special_ids
  first, chat, plain, _ = (examples.read(n)[0].tolist() for n in range(4))
  assert first != TOKENIZER.encode("ababc ab").tolist()
  assert chat[0] == special["<|im|>"] and special["<|im|>>"] in chat
  assert not set(plain[:-1]) & set(special.values())
  assert (first[-1], plain[-1]) == (special["<|document|>"], special["<|im|>"])


def test_masks_are_cached_with_tokens(cache):
  corpus = corpus_of(tuple(EXAMPLES))
  (fresh,) = encode_corpus(corpus, "train", TOKENIZER)
  (path,) = cache.iterdir()
  (kept,) = encode_corpus(corpus, "train", TOKENIZER)
  for number in range(len(EXAMPLES)):
    np.testing.assert_array_equal(kept.read(number), fresh.read(number))
  # The same text with other completions has a file of its own.
  moved = SupervisedExample("ababc ab", "b", "x", (2,))
  (other,) = encode_corpus(
    corpus_of((moved, *EXAMPLES[1:])), "train", TOKENIZER
  )
  assert len(list(cache.iterdir())) == 2
  assert other.read(0)[1].tolist() != fresh.read(0)[1].tolist()
  path.write_bytes(b"damaged")
  (again,) = encode_corpus(corpus, "train", TOKENIZER)
  np.testing.assert_array_equal(again.read(0), fresh.read(0))


def test_special_ids_begin_with_the_document_start():
  assert list(TOKENIZER.special_ids) == ["<|document|>", "<|im|>", "<|im|>>"]
  assert TOKENIZER.special_ids["<|document|>"] == TOKENIZER.document_start_id
