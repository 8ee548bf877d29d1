import io
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from edl_jax.config import DataConfig, Experiment, ModelConfig, UserError
from edl_jax.text.documents import Document
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.tokenizer import (
  DOCUMENT_START,
  Tokenizer,
  load_tokenizer,
  open_tokenizer,
)
from edl_jax.text.tokenizer_files import byte_characters

spm = pytest.importorskip("sentencepiece")

TEXTS = [
  f"The cat number {n} sat on a mat, naïvely; 漢字 und Straße {n * n}.\n"
  for n in range(200)
]
PROSE = Path(__file__).read_text(encoding="utf-8").split("\n\n")
# What files of others may say, with letters that the tests' models know.
TEXT = st.text() | st.text(alphabet="<s>/0xA|unkdoc \n\t catéß漢")


def byte_level(special=(), **options):
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
  library.decoder = decoders.ByteLevel()
  library.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=list(special),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return library


def with_nfc():
  """As Qwen's, with a token of its own that is not special."""
  library = byte_level(["<|endoftext|>"], add_prefix_space=False)
  library.normalizer = normalizers.NFC()
  library.add_tokens(["<tool>"])
  library.enable_truncation(5)
  library.enable_padding()
  return library


def fallback_pieces():
  return [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]


def unigram(byte_fallback=True):
  words = [("▁", -2.0), ("▁cat", -3.0), ("c", -4.0), ("a", -4.0), ("at", -5.0)]
  vocabulary = [("<unk>", 0.0), *fallback_pieces(), *words]
  vocabulary = [
    (piece, -90.0 if piece[0] == "<" else score) for piece, score in vocabulary
  ]
  library = tokenizers.Tokenizer(
    models.Unigram(vocabulary, 0, byte_fallback=byte_fallback)
  )
  library.pre_tokenizer = pre_tokenizers.Metaspace()
  library.add_special_tokens(["<unk>"])
  return library


def llama():
  """As Llama 2's: a space put before the text, spaces written as "▁"."""
  pieces = ["<unk>", "<s>", "</s>", *(piece for piece, _ in fallback_pieces())]
  pieces += ["▁", "c", "a", "t", "at", "cat", "▁cat"]
  library = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[("a", "t"), ("c", "at"), ("▁", "cat")],
      unk_token="<unk>",
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  library.add_special_tokens(["<unk>", "<s>", "</s>"])
  library.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return library


def opened(library, folder):
  path = folder / "tokenizer.json"
  path.write_text(library.to_str())
  return open_tokenizer(str(path))


@pytest.fixture(
  scope="module", params=["gpt2", "prefix", "nfc", "unigram", "llama"]
)
def tokenizer(request, tmp_path_factory):
  library = {
    "gpt2": lambda: byte_level(["<|endoftext|>"], add_prefix_space=False),
    "prefix": lambda: byte_level(add_prefix_space=True),
    "nfc": with_nfc,
    "unigram": unigram,
    "llama": llama,
  }[request.param]()
  return opened(library, tmp_path_factory.mktemp("files"))


@settings(deadline=None, database=None, max_examples=50)
@given(text=TEXT)
def test_every_string_survives(tokenizer, text):
  text = text.replace("▁", "")
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokenizer.byte_lengths_V[tokens].sum() == len(text.encode())
  assert tokenizer.document_start_id not in tokens


def test_copy_is_the_same(tokenizer):
  copy = Tokenizer.from_json(tokenizer.to_json())
  assert copy.document_start_id == tokenizer.document_start_id
  assert copy.to_json() == tokenizer.to_json()
  np.testing.assert_array_equal(copy.byte_lengths_V, tokenizer.byte_lengths_V)


def test_document_start(tmp_path):
  own = byte_level(["<pad>", "<|endoftext|>", DOCUMENT_START])
  assert opened(own, tmp_path).document_start_id == 2
  gpt = opened(byte_level(["<pad>", "<|endoftext|>"]), tmp_path)
  assert gpt.document_start_id == 1 and gpt.vocabulary_size == 400
  assert gpt.token_text(0) == "<pad>" and gpt.decode([0, 1]) == ""
  # None: one more token.
  none = opened(byte_level(["<pad>"]), tmp_path)
  assert none.document_start_id == 400 and none.vocabulary_size == 401
  assert none.token_text(400) == DOCUMENT_START


def test_tokens_are_those_of_the_file(tmp_path):
  library = byte_level(["<|endoftext|>"], add_prefix_space=False)
  text = "".join(TEXTS[:20])
  expected = library.encode(text).ids
  assert opened(library, tmp_path).encode(text).tolist() == expected


def test_added_tokens_that_are_not_special_are_text(tmp_path):
  tokens = opened(with_nfc(), tmp_path)
  ids = tokens.encode("a<tool>b")
  assert len(ids) == 3 and tokens.decode(ids) == "a<tool>b"


def word_piece():
  vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "cat", "##s"])}
  library = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary))
  library.normalizer = normalizers.BertNormalizer()
  return library


def lower():
  library = byte_level()
  library.normalizer = normalizers.Lowercase()
  return library


def no_alphabet():
  library = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
  library.pre_tokenizer = pre_tokenizers.ByteLevel()
  return library


def plain_bpe():
  return tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))


def splitting():
  library = byte_level()
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), library.pre_tokenizer]
  )
  return library


@pytest.mark.parametrize(
  ("make", "reason"),
  [
    (word_piece, "normalizer BertNormalizer changes the text"),
    (lower, "normalizer Lowercase changes the text"),
    (no_alphabet, "no token for 242 of the 243 bytes"),
    (plain_bpe, "BPE model that neither works on bytes nor falls back"),
    (lambda: unigram(byte_fallback=False), "unknown characters"),
    (splitting, "does not keep the text"),
  ],
)
def test_lossy_tokenizers_are_refused(tmp_path, make, reason):
  with pytest.raises(UserError, match=reason) as error:
    opened(make(), tmp_path)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "content", [b"", b"\xff", b"[]", b"{}", b'{"model": {"type": "BPE"}}']
)
@pytest.mark.parametrize("name", ["tokenizer.json", "own.model"])
def test_what_is_no_tokenizer(tmp_path, content, name):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"not a (tokenizer|SentencePiece)"):
    open_tokenizer(str(path))


def test_missing_file(tmp_path):
  with pytest.raises(UserError, match="No such file"):
    open_tokenizer(str(tmp_path / "none.json"))


# --- SentencePiece -----------------------------------------------------------


def sentencepiece_model(**options):
  model = io.BytesIO()
  settings = {
    "vocab_size": 500,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "minloglevel": 2,
    **options,
  }
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter([*TEXTS, *PROSE]), model_writer=model, **settings
  )
  return model.getvalue()


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def sentencepiece(request, tmp_path_factory):
  """A model as read here, and as the library itself reads it."""
  path = tmp_path_factory.mktemp("files") / "own.model"
  content = sentencepiece_model(
    model_type=request.param,
    add_dummy_prefix=False,
    user_defined_symbols=["<tool>"],
    split_digits=True,
  )
  path.write_bytes(content)
  return open_tokenizer(str(path)), spm.SentencePieceProcessor(
    model_proto=content
  )


@settings(deadline=None, database=None, max_examples=50)
@given(text=TEXT | st.sampled_from(["".join(TEXTS), "a<tool>b", "\0"]))
def test_sentencepiece(sentencepiece, text):
  tokenizer, _ = sentencepiece
  text = text.replace("▁", "")
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokenizer.byte_lengths_V[tokens].sum() == len(text.encode())


def test_sentencepiece_gives_the_tokens_of_the_library(sentencepiece):
  tokenizer, peer = sentencepiece
  assert tokenizer.vocabulary_size == peer.vocab_size()
  assert tokenizer.document_start_id == peer.bos_id()
  # Text that spells a special token is cut before it.
  prose = [text for text in PROSE if "<" not in text]
  for text in (*TEXTS, *prose, "catcat 12 ü\n\n 😀 mats", "x<tool>y", "  "):
    assert tokenizer.encode(text).tolist() == peer.encode(text)


def test_sentencepiece_loses_the_space_before_a_text(tmp_path):
  path = tmp_path / "own.model"
  path.write_bytes(sentencepiece_model(model_type="bpe"))
  tokenizer = open_tokenizer(str(path))
  assert tokenizer.decode(tokenizer.encode("cat")) == "cat"


@pytest.mark.parametrize(
  ("options", "reason"),
  [
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizer changes the text"),
    ({"remove_extra_whitespaces": True}, "normalizer changes the text"),
    ({"byte_fallback": False, "vocab_size": 120}, "no --byte_fallback"),
    ({"model_type": "char"}, "neither a Unigram nor a BPE"),
  ],
)
def test_lossy_sentencepiece_is_refused(tmp_path, options, reason):
  path = tmp_path / "own.model"
  path.write_bytes(sentencepiece_model(**options))
  with pytest.raises(UserError, match=reason):
    open_tokenizer(str(path))


# --- Use ---------------------------------------------------------------------


def experiment(path, size):
  return Experiment(
    model=ModelConfig(vocabulary_size=size),
    data=DataConfig(tokenizer=str(path)),
  )


def test_load_checks_the_vocabulary(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(byte_level(["<s>"]).to_str())
  group = (tuple(Document(text, "a", text) for text in TEXTS),)
  corpus = Corpus(Taxonomy.from_names(["a"]), group, group, "hash")
  # Ids that no token has do no harm.
  for size in (400, 512):
    loaded = load_tokenizer(experiment(path, size), corpus)
    assert loaded.vocabulary_size == 400
  with pytest.raises(UserError) as error:
    load_tokenizer(experiment(path, 399), corpus)
  assert str(error.value) == (
    f"model.vocabulary_size=399 is less than the 400 tokens of"
    f" data.tokenizer={path}"
  )


def test_bytes_of_pieces(tmp_path):
  tokenizer = opened(llama(), tmp_path)
  # "▁cat" and "cat", then a token for each byte of a character it lacks.
  tokens = tokenizer.encode(" catcat漢")
  assert tokenizer.byte_lengths_V[tokens].tolist() == [4, 3, 1, 1, 1]


# --- Tokenizers of others, whose kinds were refused or lost text -------------


def changed(make, change, tmp_path):
  """Opens a tokenizer whose JSON `change` has altered."""
  settings_of = json.loads(make().to_str())
  change(settings_of)
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(settings_of))
  return open_tokenizer(str(path))


@pytest.mark.parametrize(
  "sides", [["lstrip"], ["rstrip"], ["lstrip", "rstrip"]]
)
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_do_not_swallow_blanks(tmp_path, sides, special):
  def change(content):
    for token in content["added_tokens"]:
      if token["content"] == "<tool>":
        token |= {"special": special} | dict.fromkeys(sides, True)

  tokenizer = changed(with_nfc, change, tmp_path)
  for text in ("a <tool>  b", "<tool>\n\n<tool> ", " \t<tool>"):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_utf8_never_has_need_no_token(tmp_path):
  never = {0xC0, 0xC1, *range(0xF5, 0x100)}
  characters = byte_characters()
  # Python's own decoder is the judge.
  for byte in never:
    for tail in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80"):
      with pytest.raises(UnicodeDecodeError):
        (bytes([byte]) + tail).decode()

  def without(bytes_left_out):
    def change(content):
      gone = {characters[byte] for byte in bytes_left_out}
      model = content["model"]
      names = [name for name in model["vocab"] if name not in gone]
      model["vocab"] = {name: place for place, name in enumerate(names)}
      model["merges"] = []
      content["added_tokens"] = []

    return change

  tokenizer = changed(byte_level, without(never), tmp_path)
  text = "a é 漢 \U0010ffff \u07ff"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  with pytest.raises(UserError, match="no token for 1 of the 243 bytes"):
    changed(byte_level, without({*never, 0xF4}), tmp_path)
