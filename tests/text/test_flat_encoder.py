"""The fast library gives the ids that the reference library gives."""

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from edl_jax.text import flat_encoder
from edl_jax.text.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer

pytest.importorskip("fastokens")

# What divides words, spells special tokens, or is written in several ways.
PIECES = (
  *("a", "the", " the", "b1", "_", "-", "!", "'s", "'ll", "'LL", "\u2019s"),
  *(" ", "  ", "    ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\ufeff"),
  *("\u00a0", "\u2003", "\u3000", "\u200b", "1", "\u00b2", "\u2167", "\u4e00"),
  *("\u6f22", "\u5b57", "\u00e9", "e\u0301", "\u0130", "\u00df"),
  *("\U0001f600", "\U0001f469\u200d\U0001f52c", "<|document|>", "<s>", "</s>"),
)
# The words of Llama 3, as its tokenizer.json divides text.
LLAMA = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts_of(seed, count=3000):
  rng = random.Random(seed)
  return [
    "".join(rng.choices(PIECES, k=rng.randrange(60))) for _ in range(count)
  ]


def ours():
  return train_tokenizer(texts_of(1), 600)


def llama():
  library = tokenizers.Tokenizer.from_str(ours().to_json())
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(LLAMA), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return Tokenizer(library)


def library_of(tokenizer):
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  library.encode_special_tokens = True
  return library


def assert_equal(library, texts):
  fast = flat_encoder._by_fastokens(library)
  assert fast is not None
  ids, length_N = fast(texts)
  own = library.encode_batch_fast(texts, add_special_tokens=False)
  expected = [encoding.ids for encoding in own]
  assert ids.dtype == np.int32 and length_N.dtype == np.int64
  assert length_N.tolist() == [len(each) for each in expected]
  assert ids.tolist() == [token for each in expected for token in each]


@pytest.mark.parametrize("make", [ours, byte_tokenizer, llama])
def test_ids_of_difficult_texts(make):
  library = library_of(make())
  assert_equal(library, ["", " ", *texts_of(2), *PIECES])
  # Long runs, which some implementations take quadratic time for.
  assert_equal(library, [piece * 5000 for piece in ("a", " ", "\n", "ACGT")])


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, llama])
def test_ids_of_every_character(make):
  characters = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
  library = library_of(make())
  for before, after in (("a", "b"), (" ", " "), ("1", "!")):
    texts = [
      "".join(f"{before}{c}{after}" for c in characters[start : start + 512])
      for start in range(0, len(characters), 512)
    ]
    assert_equal(library, texts)


def test_special_tokens_are_text():
  tokenizer = byte_tokenizer()
  ids, _ = flat_encoder.flat_encoder(library_of(tokenizer))(["<|document|>"])
  assert bytes(ids.tolist()) == b"<|document|>"


def test_kinds_that_only_the_reference_encodes():
  unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0))
  unigram.encode_special_tokens = True
  added = library_of(byte_tokenizer())
  added.add_tokens([tokenizers.AddedToken("x y", rstrip=True)])
  for library in (unigram, added):
    assert flat_encoder._by_fastokens(library) is None
    ids, _ = flat_encoder.flat_encoder(library)(["a"])
    assert ids.tolist() == library.encode("a").ids


def test_a_library_that_differs_is_not_used(monkeypatch):
  def wrong(texts):
    return np.zeros(len(texts), np.int32), np.ones(len(texts), np.int64)

  monkeypatch.setattr(flat_encoder, "_by_fastokens", lambda library: wrong)
  ids, length_N = flat_encoder.flat_encoder(library_of(byte_tokenizer()))(
    ["ab", "", "c"]
  )
  assert ids.tolist() == [*b"abc"] and length_N.tolist() == [2, 0, 1]
