"""The exported tokenizer, read back by the library `tokenizers` alone."""

import pytest
import tokenizers

from edl_jax.interop.tokenizer import hub_tokenizer
from edl_jax.text.tokenizer import (
  byte_tokenizer,
  open_tokenizer,
  train_tokenizer,
)

TEXTS = ["", "a b", " 42\n\tx", "漢字 😀", "a <|document|> b"]


@pytest.mark.parametrize(
  "tokenizer", [byte_tokenizer(), train_tokenizer(["a b ab abab"] * 9, 270)]
)
def test_texts_begin_with_the_document_start(tokenizer):
  content, settings = hub_tokenizer(tokenizer, 64)
  library = tokenizers.Tokenizer.from_str(content)
  library.encode_special_tokens = settings["split_special_tokens"]
  for text in TEXTS:
    own = tokenizer.encode(text).tolist()
    assert library.encode(text, add_special_tokens=False).ids == own
    ids = library.encode(text).ids
    assert ids == [tokenizer.document_start_id, *own]
    assert library.decode(own, skip_special_tokens=False) == text


def test_settings_name_the_document_start():
  _, settings = hub_tokenizer(byte_tokenizer(), 64)
  assert settings["model_max_length"] == 64
  assert {settings[f"{kind}_token"] for kind in ("bos", "eos", "pad")} == {
    "<|document|>"
  }


def test_sentencepiece_models_decode(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b ab abab cab"] * 50),
    model_prefix=str(tmp_path / "pieces"),
    vocab_size=270,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = open_tokenizer(str(tmp_path / "pieces.model"))
  library = tokenizers.Tokenizer.from_str(hub_tokenizer(tokenizer, 64)[0])
  for text in ("", "a b", " ab  cab ", "漢字 😀\n"):
    own = tokenizer.encode(text).tolist()
    assert library.encode(text, add_special_tokens=False).ids == own
    assert library.decode(own, skip_special_tokens=False) == text
