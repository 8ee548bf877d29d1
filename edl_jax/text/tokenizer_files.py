"""Reads tokenizers from files: `tokenizer.json` and SentencePiece models.

A folder of a checkpoint on the hub is read too.

A tokenizer must keep every text, byte by byte: bits per byte are defined only
if each token stands for a known number of bytes. Two families do so:

- byte-level tokenizers (GPT-2 and most later ones), whose tokens spell bytes;
- pieces with a fallback to bytes (Llama 2, Gemma), whose "▁" is a space. They
  put a space before each text, which is switched off here. A "▁" in a text
  becomes a space, as with SentencePiece itself.

Any other tokenizer is refused with the reason, such as a vocabulary of words
with an unknown token, or a normalizer that drops accents.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from edl_jax.config import UserError

DOCUMENT_START = "<|document|>"

# Of a checkpoint's folder, in the order in which they are looked for.
_FILES = ("tokenizer.json", "tokenizer.model")
# Special tokens that may open a document; the first one that exists does.
_STARTS = (
  DOCUMENT_START,
  "<|begin_of_text|>",
  "<|startoftext|>",
  "<bos>",
  "<s>",
  # DeepSeek's, with full-width bars.
  "<\uff5cbegin▁of▁sentence\uff5c>",
  "<|endoftext|>",
)
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# The bytes that UTF-8 can have; the other 13 need no token.
_USED_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
# Each of these texts detects a way of losing text.
PROBES = (
  " two  spaces, a\ttab \r\n\n and an end \n",
  "Ünïcode: e\u0301 ﬁ ①, ǅ İ ß ﷺ A\u00a0b\u200dc\u00ad\ufeff",
  "漢字と仮名、中文、한국어 אב 😀👩‍🔬 \U0010fffd \x00\x01",
  "<s></s><unk><pad><0x0A><|endoftext|><|document|>[CLS][UNK]##a</w>Ġ",
  "UPPER lower 0123456789 3.14 !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
)


def byte_characters() -> dict[int, str]:
  """Returns the printable character by which byte-level BPE writes each byte.

  This is GPT-2's convention: bytes that are printable in Latin-1 stand for
  themselves; the others take the code points from 256 on, in order.
  """
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  return {byte: chr(byte) for byte in shown} | {
    byte: chr(256 + place) for place, byte in enumerate(hidden)
  }


def special_tokens(library: tokenizers.Tokenizer) -> dict[int, str]:
  """Returns the special tokens by id."""
  added = library.get_added_tokens_decoder()
  return {i: token.content for i, token in added.items() if token.special}


def document_start(library: tokenizers.Tokenizer) -> str | None:
  """Returns the usual special token that opens documents, if any."""
  special = special_tokens(library).values()
  return next((name for name in _STARTS if name in special), None)


def tokenizer_file(folder: str) -> str:
  """Returns the path of the tokenizer in the folder of a checkpoint.

  Raises:
    UserError: there is none.
  """
  paths = [os.path.join(folder, name) for name in _FILES]
  found = next(filter(os.path.exists, paths), None)
  if found is None:
    raise UserError(f"{folder} has no {' or '.join(_FILES)}")
  return found


def read_settings(path: str) -> dict[str, Any]:
  """Returns a JSON object; an empty one if there is no such file.

  Raises:
    UserError: the file is damaged.
  """
  if not os.path.exists(path):
    return {}
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    if not isinstance(content, dict):
      raise ValueError("not an object")
    return content
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error})") from error


def token_text(token: Any) -> Any:
  """Returns the text of a special token, which older files keep in a dict."""
  is_token = isinstance(token, dict) and "content" in token
  return token["content"] if is_token else token


def _first_token(folder: str, library: tokenizers.Tokenizer) -> str | None:
  """Returns the special token that begins texts, if a checkpoint names one."""
  settings = read_settings(os.path.join(folder, "tokenizer_config.json"))
  name = token_text(settings.get("bos_token"))
  if name is None:
    i = read_settings(os.path.join(folder, "config.json")).get("bos_token_id")
    name = special_tokens(library).get(i) if isinstance(i, int) else None
  return name if name in special_tokens(library).values() else None


def token_bytes(library: tokenizers.Tokenizer) -> list[bytes]:
  """Returns the bytes of each id; b"" for special tokens and unused ids.

  Raises:
    UserError: the tokenizer belongs to neither family above.
  """
  settings = json.loads(library.to_str())
  byte_level = is_byte_level(settings)
  _check_alphabet(settings["model"], byte_level)
  bytes_of = _Bytes()
  vocabulary = library.get_vocab(with_added_tokens=True)
  added = library.get_added_tokens_decoder()
  found = [b""] * (max(vocabulary.values()) + 1)
  for piece, i in vocabulary.items():
    if i in added:
      found[i] = b"" if added[i].special else piece.encode()
    elif byte_level:
      found[i] = piece.translate(bytes_of).encode("latin-1")
    elif spelled := _BYTE.fullmatch(piece):
      found[i] = bytes([int(spelled[1], 16)])
    else:
      found[i] = piece.replace(_SPACE, " ").encode()
  return found


class _Bytes(dict[int, str]):
  """Maps the characters of byte-level BPE to bytes, as Latin-1; others to 0."""

  def __init__(self):
    super().__init__(
      (ord(c), chr(byte)) for byte, c in byte_characters().items()
    )

  def __missing__(self, character: int) -> str:
    return "\0"


def _nodes(part: Any) -> list[dict[str, Any]]:
  """Returns the steps of a normalizer, pre-tokenizer or decoder as a list."""
  if part is None:
    return []
  inner = {"Sequence": ("normalizers", "pretokenizers", "decoders")}
  for key in inner.get(part["type"], ()):
    if key in part:
      return [node for step in part[key] for node in _nodes(step)]
  return [part]


def is_byte_level(settings: dict[str, Any]) -> bool:
  """Says whether a tokenizer's tokens spell bytes, as in byte-level BPE.

  Args:
    settings: the content of a tokenizer.json.
  """
  steps = _nodes(settings["pre_tokenizer"])
  return any(step["type"] == "ByteLevel" for step in steps)


def _check_alphabet(model: dict[str, Any], byte_level: bool) -> None:
  """Raises UserError unless the tokens can write every byte."""
  if model["type"] not in ("BPE", "Unigram"):
    raise UserError(f"a {model['type']} model does not keep every text")
  if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
    raise UserError("its tokens have a prefix or suffix that marks words")
  pieces = model["vocab"]
  if model["type"] == "Unigram":
    pieces = [piece for piece, _ in pieces]
  characters = byte_characters()
  wanted = [characters[byte] for byte in _USED_BYTES]
  if not byte_level:
    if not model.get("byte_fallback"):
      raise UserError(
        f"a {model['type']} model that neither works on bytes nor falls back"
        " to them has unknown characters"
      )
    wanted = [f"<0x{byte:02X}>" for byte in _USED_BYTES]
  missing = set(wanted) - set(pieces)
  if missing:
    raise UserError(
      f"it has no token for {len(missing)} of the {len(wanted)} bytes that"
      " UTF-8 can have"
    )


def read_tokenizer(path: str) -> tuple[tokenizers.Tokenizer, str | None]:
  """Reads a tokenizer from a file or from the folder of a checkpoint.

  This switches off needless steps that lose text: a space before the text, NFC,
  truncation, padding, dropout, added tokens that swallow the blanks beside
  them. A tokenizer without a token that may open
  documents gets "<|document|>" as its last id.

  Returns:
    The tokenizer, and the special token that opens documents if the folder of a
    checkpoint names one: `bos_token` of tokenizer_config.json, or without it
    `bos_token_id` of config.json.

  Raises:
    UserError: there is no such file, it is no tokenizer, or it loses text.
  """
  path = os.path.expanduser(path)
  folder = path if os.path.isdir(path) else None
  if folder:
    path = tokenizer_file(folder)
  try:
    content = Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error
  try:
    if path.endswith(".model"):
      library = _from_sentencepiece(content)
    else:
      library = _from_json(content)
    start = _first_token(folder, library) if folder else None
    if start is None and document_start(library) is None:
      library.add_special_tokens([DOCUMENT_START])
    library.encode_special_tokens = True
    if isinstance(library.model, models.Unigram):
      _shield(library)
    _probe(library)
  except UserError as error:
    raise UserError(
      f"{path}: {error}; use a byte-level tokenizer, or one with a fallback to"
      " bytes and no normalizer"
    ) from error
  return library, start


def _shield(library: tokenizers.Tokenizer) -> None:
  """Encodes text that spells a special or a byte token as ordinary text.

  Unigram models have these tokens as pieces. BPE needs no such care: no merge
  makes them.
  """
  names = [re.escape(name) for name in special_tokens(library).values()]
  names.append("<0x[0-9A-F]{2}>")
  # Splitting off the first character keeps the name from being one piece.
  pattern = tokenizers.Regex(f"(?={'|'.join(names)}).")
  steps = [pre_tokenizers.Split(pattern, "isolated"), library.pre_tokenizer]
  library.pre_tokenizer = pre_tokenizers.Sequence([*filter(None, steps)])


def _probe(library: tokenizers.Tokenizer) -> None:
  """Raises UserError if a difficult text is not restored by decoding."""
  meaning = token_bytes(library)
  added = library.get_added_tokens_decoder().values()
  texts = [*PROBES, *(f"a {token.content}  b\n" for token in added)]
  for text, found in zip(
    texts, library.encode_batch(texts, add_special_tokens=False), strict=True
  ):
    kept = b"".join(meaning[i] for i in found.ids).decode(errors="replace")
    # A token may be called after the sign that stands for a space.
    if kept.replace(_SPACE, " ") != text.replace(_SPACE, " "):
      raise UserError(f"it does not keep the text {text[:40]!r}")


def _from_json(content: bytes) -> tokenizers.Tokenizer:
  try:
    settings = json.loads(content)
    settings["model"]["type"]  # Other JSON files do not have it.
    steps = _nodes(settings["normalizer"])
    for step in _nodes(settings["pre_tokenizer"]):
      if step["type"] == "ByteLevel":
        step["add_prefix_space"] = False
      if step["type"] == "Metaspace":
        step["prepend_scheme"] = "never"
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(f"not a tokenizer.json ({error})") from error
  lossless = [_is_space(step) for step in steps]
  dropped = [step["type"] in ("Prepend", "NFC") for step in steps]
  for step, keep, drop in zip(steps, lossless, dropped):
    if not keep and not drop:
      raise UserError(f"its normalizer {step['type']} changes the text")
  settings["normalizer"] = next(
    (step for step, keep in zip(steps, lossless) if keep), None
  )
  settings |= {"truncation": None, "padding": None}
  for token in settings.get("added_tokens") or []:
    token |= {"lstrip": False, "rstrip": False}
  if "dropout" in settings["model"]:
    settings["model"]["dropout"] = None
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(settings))
  except Exception as error:  # The library raises plain Exception.
    raise UserError(f"not a tokenizer.json ({error})") from error


def _is_space(step: dict[str, Any]) -> bool:
  """Returns whether a normalizer only writes spaces as "▁"."""
  return (
    step["type"] == "Replace"
    and step["pattern"] == {"String": " "}
    and step["content"] == _SPACE
  )


def _from_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
  """Converts a SentencePiece model; tokens keep their ids."""
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise UserError(
      "reading it needs the package sentencepiece: pip install sentencepiece"
    ) from error
  # Any: protobuf makes the class at import.
  messages: Any = sentencepiece_model_pb2
  proto = messages.ModelProto()
  try:
    proto.ParseFromString(content)
  except Exception as error:  # DecodeError of the protobuf in use.
    raise UserError("not a SentencePiece model") from error
  if not proto.pieces:
    raise UserError("not a SentencePiece model")
  normalizer = proto.normalizer_spec
  if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
    raise UserError(
      "its normalizer changes the text (train with"
      " --normalization_rule_name=identity --remove_extra_whitespaces=false)"
    )
  if not proto.trainer_spec.byte_fallback:
    raise UserError("it has no --byte_fallback")
  kinds = proto.trainer_spec
  if kinds.model_type == kinds.UNIGRAM:
    model = _unigram(proto.pieces)
  elif kinds.model_type == kinds.BPE:
    model = _merges(proto.pieces)
  else:
    raise UserError("it is neither a Unigram nor a BPE model")
  library = tokenizers.Tokenizer(model)
  library.normalizer = normalizers.Replace(" ", _SPACE)
  special, own = [], []
  for piece in proto.pieces:
    if piece.type in (piece.CONTROL, piece.UNKNOWN):
      special.append(piece.piece)
    elif piece.type == piece.USER_DEFINED:
      own.append(tokenizers.AddedToken(piece.piece, normalized=False))
  library.add_special_tokens(special)
  library.add_tokens(own)
  return library


def _unigram(pieces: Any) -> models.Unigram:
  # The library derives the penalty of unknown characters from the lowest score.
  lowest = min(piece.score for piece in pieces if piece.type == piece.NORMAL)
  vocabulary = [
    (p.piece, p.score if p.type == p.NORMAL else lowest) for p in pieces
  ]
  unknown = next(i for i, p in enumerate(pieces) if p.type == p.UNKNOWN)
  return models.Unigram(vocabulary, unknown, byte_fallback=True)


def _merges(pieces: Any) -> models.BPE:
  """Returns the BPE model whose merges are ordered by the pieces' scores.

  SentencePiece joins the neighbours whose union has the highest score.
  """
  normal = {p.piece for p in pieces if p.type == p.NORMAL}
  ranked = sorted(
    (p for p in pieces if p.piece in normal), key=lambda p: -p.score
  )
  merges = [
    (p.piece[:cut], p.piece[cut:])
    for p in ranked
    for cut in range(1, len(p.piece))
    if p.piece[:cut] in normal and p.piece[cut:] in normal
  ]
  return models.BPE(
    vocab={p.piece: i for i, p in enumerate(pieces)},
    merges=merges,
    unk_token=next(p.piece for p in pieces if p.type == p.UNKNOWN),
    byte_fallback=True,
  )
