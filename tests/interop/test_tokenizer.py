"""The exported tokenizer, read back by the library `tokenizers` alone."""

import json

import pytest
import tokenizers
from tokenizers import models, normalizers, processors

from edl_jax.config import UserError
from edl_jax.interop.tokenizer import hub_tokenizer, read_hub_tokenizer
from edl_jax.text.tokenizer import (
  Tokenizer,
  byte_tokenizer,
  open_tokenizer,
  train_tokenizer,
)

TEXTS = ["", "a b", " 42\n\tx", "漢字 😀", "a <|document|> b"]


@pytest.mark.parametrize(
  "tokenizer", [byte_tokenizer(), train_tokenizer(["a b ab abab"] * 9, 270)]
)
def test_texts_begin_with_the_document_start(tokenizer):
  content, settings = hub_tokenizer(tokenizer, 64, {})
  library = tokenizers.Tokenizer.from_str(content)
  library.encode_special_tokens = settings["split_special_tokens"]
  for text in TEXTS:
    own = tokenizer.encode(text).tolist()
    assert library.encode(text, add_special_tokens=False).ids == own
    ids = library.encode(text).ids
    assert ids == [tokenizer.document_start_id, *own]
    assert library.decode(own, skip_special_tokens=False) == text


def test_settings_name_the_document_start():
  _, settings = hub_tokenizer(byte_tokenizer(), 64, {})
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
  library = tokenizers.Tokenizer.from_str(hub_tokenizer(tokenizer, 64, {})[0])
  for text in ("", "a b", " ab  cab ", "漢字 😀\n"):
    own = tokenizer.encode(text).tolist()
    assert library.encode(text, add_special_tokens=False).ids == own
    assert library.decode(own, skip_special_tokens=False) == text


def llama_like():
  """A tokenizer that puts a space and <s> before every text."""
  vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
  vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
  vocabulary |= {"\u2581": 259, "a": 260, "\u2581a": 261}
  library = tokenizers.Tokenizer(
    models.BPE(
      vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
  )
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  library.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  library.add_special_tokens(["<unk>", "<s>", "</s>"])
  return library


def test_an_imported_tokenizer_goes_out_as_it_came(tmp_path):
  library = llama_like()
  library.save(str(tmp_path / "tokenizer.json"))
  settings = {
    # Older files keep a token in a dict.
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "</s>",
    "chat_template": "{{ messages }}",
    "legacy": True,
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  tokenizer, source = read_hub_tokenizer(str(tmp_path))
  # In training a text has no space before it.
  assert tokenizer.encode("a").tolist() == [260]
  assert tokenizer.document_start_id == 1
  content, written = hub_tokenizer(tokenizer, 64, source)
  again = tokenizers.Tokenizer.from_str(content)
  for text in [*TEXTS, "a", "a a"]:
    assert again.encode(text).ids == library.encode(text).ids
  assert again.encode("a").ids == [1, 261]
  assert written["bos_token"] == "<s>" and written["eos_token"] == "</s>"
  assert written["chat_template"] == "{{ messages }}"
  assert not written.get("split_special_tokens")


def several_starts():
  """A tokenizer on bytes in which two usual start tokens are special."""
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().tokenizers_json())
  library.add_special_tokens(["<s>", "<|endoftext|>", "<|start|>"])
  return library


@pytest.mark.parametrize(
  ("library", "tokenizer_config", "config", "start"),
  [
    (several_starts, {"bos_token": "<|start|>"}, {"bos_token_id": 1}, 259),
    (several_starts, {"bos_token": None}, {"bos_token_id": 258}, 258),
    # No special token has the name or the id: the usual one.
    (several_starts, {"bos_token": "<other>"}, {}, 256),
    (several_starts, {}, {"bos_token_id": 65}, 256),
    (several_starts, {}, {}, 256),
    (llama_like, {"bos_token": {"content": "</s>"}}, {}, 2),
    (llama_like, {}, {"bos_token_id": 2}, 2),
    (llama_like, {}, {"bos_token_id": [2]}, 1),
  ],
)
def test_documents_begin_as_the_checkpoint_says(
  tmp_path, library, tokenizer_config, config, start
):
  library().save(str(tmp_path / "tokenizer.json"))
  for name, content in (
    ("tokenizer_config", tokenizer_config),
    ("config", config),
  ):
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  tokenizer, _ = read_hub_tokenizer(str(tmp_path))
  assert tokenizer.document_start_id == start
  # Provenance and prepared text keep it.
  copy = Tokenizer.from_json(tokenizer.to_json())
  assert copy.document_start_id == start
  assert copy.to_json() == tokenizer.to_json()
  assert open_tokenizer(str(tmp_path)).to_json() == tokenizer.to_json()
  # Of the file alone, the usual token is the start, and JSON is the library's.
  alone = open_tokenizer(str(tmp_path / "tokenizer.json"))
  assert alone.document_start_id == (1 if library is llama_like else 256)
  assert (
    alone.to_json() == alone.tokenizers_json() == tokenizer.tokenizers_json()
  )
  for text in TEXTS:
    assert tokenizer.encode(text).tolist() == alone.encode(text).tolist()


def test_an_unusual_start_needs_no_other(tmp_path):
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().tokenizers_json())
  content = json.loads(library.to_str())
  content["added_tokens"][0]["content"] = "<|start|>"
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|start|>"}')
  tokenizer = open_tokenizer(str(tmp_path))
  assert tokenizer.vocabulary_size == 257
  assert tokenizer.token_text(tokenizer.document_start_id) == "<|start|>"
  copy = Tokenizer.from_json(tokenizer.to_json())
  assert copy.document_start_id == 256
  # The export names it too.
  _, settings = hub_tokenizer(copy, 64, {})
  assert settings["bos_token"] == "<|start|>"


def test_a_template_in_a_file_of_its_own(tmp_path):
  llama_like().save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "chat_template.jinja").write_text("{{ other }}")
  _, source = read_hub_tokenizer(str(tmp_path))
  assert source["tokenizer_config"] == {"chat_template": "{{ other }}"}


def test_no_tokenizer_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"has no tokenizer\.json or tok"):
    read_hub_tokenizer(str(tmp_path))
  assert read_hub_tokenizer(str(tmp_path), "byte")[1] == {}
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
    read_hub_tokenizer(str(tmp_path))
