"""Lossless tokenizers: byte-level BPE, plain bytes, or one from a file."""

import functools
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from edl_jax.cache import cache_key, read_cache, write_cache
from edl_jax.config import Experiment, UserError
from edl_jax.progress import elapsed
from edl_jax.text.flat_encoder import FlatEncoder, flat_encoder
from edl_jax.text.mixture import Corpus
from edl_jax.text.tokenizer_files import (
  DOCUMENT_START,
  byte_characters,
  document_start,
  read_tokenizer,
  special_tokens,
  token_bytes,
)

# BPE learns its merges from the larger of two amounts of text: this many
# characters, enough for some thousands of tokens and read in a few seconds, or
# this many for each token.
_TRAINING_CHARACTERS = 6_000_000
_TRAINING_CHARACTERS_PER_TOKEN = 1_000
# A longer run of letters, signs or blanks, such as a genome, is cut before the
# trainer sees it: it takes a time that grows with the square of a run.
_LONG_RUN = re.compile(r"[^\W\d_]{1000}|(?:[^\w\s]|_){1000}|\s{1000}")
# How the JSON begins of a tokenizer whose documents open with another token.
_START_KEY = '{"document_start": '
# Characters encoded in one call, which bounds the library's memory.
_ENCODING_CHARACTERS = 4_000_000


class Tokenizer:
  """A lossless tokenizer: decoding an encoded string returns the string.

  It wraps the `tokenizers` library. A special token opens each document,
  "<|document|>" in the tokenizers made here. The pipeline inserts it by id;
  text that spells it is encoded as any other text.
  """

  def __init__(self, library: tokenizers.Tokenizer, start: str | None = None):
    """Wraps a tokenizer of the library.

    Args:
      library: the tokenizer.
      start: the special token that opens documents; by default the first of
        the usual ones.

    Raises:
      UserError: it has no such token.
    """
    # This makes the library encode text that spells a special token as text.
    library.encode_special_tokens = True
    self._library = library
    self._special = special_tokens(library)
    usual = document_start(library)
    ids = {name: i for i, name in self._special.items()}
    chosen = start or usual
    if chosen not in ids:
      raise UserError("the tokenizer has no token that opens a document")
    self._document_start_id = ids[chosen]
    # Only a start that needs to be told is kept.
    self._start = start if start != usual else None

  @functools.cached_property
  def vocabulary_size(self) -> int:
    """Number of ids in use, [0, vocabulary_size)."""
    return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def _bytes(self) -> list[bytes]:
    # Encoding does without.
    return token_bytes(self._library)

  @property
  def document_start_id(self) -> int:
    """Id of the first token of every document."""
    return self._document_start_id

  @property
  def special_ids(self) -> dict[str, int]:
    """Ids of the special tokens by name, that of the document start first."""
    start = self._document_start_id
    order = sorted(self._special, key=lambda i: (i != start, i))
    return {self._special[i]: i for i in order}

  @property
  def byte_lengths_V(self) -> np.ndarray:
    """UTF-8 bytes of each token, int32 (V,); 0 for special tokens."""
    return np.array([len(token) for token in self._bytes], np.int32)

  def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes many texts at once, without special tokens.

    Returns:
      The tokens of all texts end to end, int32, and how many of them each text
      has, int64 (texts,).
    """
    parts = [
      self._encoder(chunk) for chunk in _chunks(texts, _ENCODING_CHARACTERS)
    ]
    return (
      np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in parts)]),
      np.concatenate([np.zeros(0, np.int64), *(sizes for _, sizes in parts)]),
    )

  @functools.cached_property
  def _encoder(self) -> FlatEncoder:
    return flat_encoder(self._library)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the tokens of each text, int32, without special tokens."""
    tokens, length_N = self.encode_flat(texts)
    return np.split(tokens, np.cumsum(length_N)[:-1]) if texts else []

  def encode(self, text: str) -> np.ndarray:
    """Returns the tokens of one text, int32, without special tokens."""
    return self.encode_batch([text])[0]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of tokens; special tokens add none.

    Bytes that are not UTF-8, such as part of a character, become U+FFFD.
    """
    return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

  def token_text(self, token: int) -> str:
    """Returns one token as printable text, with escapes like "\\n", "\\xe2"."""
    if token in self._special:
      return self._special[token]
    text = self._bytes[token].decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

  def tokenizers_json(self) -> str:
    """Returns the tokenizer in the library's own JSON format."""
    return self._library.to_str()

  def to_json(self) -> str:
    """Returns all of the tokenizer as JSON.

    It is the library's own format unless documents open with an unusual token.
    """
    text = self.tokenizers_json()
    if self._start is None:
      return text
    return f'{_START_KEY}{json.dumps(self._start)}, "tokenizer": {text}}}'

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    """Inverse of `to_json`."""
    if not text.startswith(_START_KEY):
      return cls(tokenizers.Tokenizer.from_str(text))
    content = json.loads(text)
    library = json.dumps(content["tokenizer"], ensure_ascii=False)
    return cls(
      tokenizers.Tokenizer.from_str(library), content["document_start"]
    )


def _chunks(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
  """Splits `texts` into lists of about `characters` characters."""
  chunk, size = [], 0
  for text in texts:
    chunk.append(text)
    size += len(text)
    if size >= characters:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _library(model: models.Model) -> tokenizers.Tokenizer:
  library = tokenizers.Tokenizer(model)
  # Every digit is a token, so that arithmetic is regular. Then GPT-2's pattern
  # splits into words; it keeps runs of indentation together.
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  library.decoder = decoders.ByteLevel()
  return library


def byte_tokenizer() -> Tokenizer:
  """Returns the tokenizer whose ids are bytes, with document start 256."""
  vocabulary = {c: byte for byte, c in byte_characters().items()}
  library = _library(models.BPE(vocab=vocabulary, merges=[]))
  library.add_special_tokens([DOCUMENT_START])
  return Tokenizer(library)


def training_characters(vocabulary_size: int) -> int:
  """Returns the most characters that `train_tokenizer` learns from."""
  return max(
    _TRAINING_CHARACTERS, _TRAINING_CHARACTERS_PER_TOKEN * vocabulary_size
  )


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer; deterministic.

  It learns from a fixed random sample of the texts if they have more than
  `training_characters`. Id 0 is the document start. Little text may give fewer
  than `vocabulary_size` ids.
  """
  enough = training_characters(vocabulary_size)
  sample, size = [], 0
  for text in random.Random(0).sample(texts, len(texts)):
    if size >= enough:
      break
    sample.append(text[: enough - size])
    size += len(sample[-1])
  library = _library(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary_size,
    special_tokens=[DOCUMENT_START],
    initial_alphabet=list(byte_characters().values()),
    show_progress=False,
  )
  parts = itertools.chain.from_iterable(map(_cut_runs, sample))
  with elapsed("training the tokenizer", after=5):
    library.train_from_iterator(parts, trainer)
  return Tokenizer(library)


def _cut_runs(text: str) -> Iterator[str]:
  """Splits a text inside of its long runs, and nowhere else."""
  start = 0
  for found in _LONG_RUN.finditer(text):
    yield text[start : found.end()]
    start = found.end()
  yield text[start:]


def open_tokenizer(path: str) -> Tokenizer:
  """Returns the tokenizer of a `tokenizer.json` or a SentencePiece `.model`.

  Of a checkpoint's folder too, whose settings may say which token opens
  documents. `tokenizer_files` describes the supported kinds.

  Raises:
    UserError: there is no such file, it is no tokenizer, or it loses text.
  """
  return Tokenizer(*read_tokenizer(path))


def load_tokenizer(experiment: Experiment, corpus: Corpus) -> Tokenizer:
  """Returns the experiment's tokenizer; BPE learns from training text alone.

  The cache keeps a trained tokenizer for the next run.

  Raises:
    UserError: see `open_tokenizer`; or the file's tokenizer has more tokens
      than the model.
  """
  if experiment.data.tokenizer == "byte":
    return byte_tokenizer()
  if experiment.data.tokenizer != "bpe":
    tokenizer = open_tokenizer(experiment.data.tokenizer)
    if tokenizer.vocabulary_size > experiment.model.vocabulary_size:
      raise UserError(
        f"model.vocabulary_size={experiment.model.vocabulary_size} is less than"
        f" the {tokenizer.vocabulary_size} tokens of"
        f" data.tokenizer={experiment.data.tokenizer}"
      )
    return tokenizer
  size = experiment.model.vocabulary_size
  key = cache_key(
    "bpe",
    corpus.content_hash,
    experiment.data.held_out_fraction,
    size,
    tokenizers.__version__,
  )
  cached = read_cache(f"tokenizer-{key}.json")
  if cached is not None:
    return Tokenizer.from_json(cached.decode())
  texts = [document.text for group in corpus.train for document in group]
  tokenizer = train_tokenizer(texts, size)
  write_cache(f"tokenizer-{key}.json", tokenizer.to_json().encode())
  return tokenizer
