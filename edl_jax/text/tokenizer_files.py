"""Tokenizers of others: `tokenizer.json` and SentencePiece models.

What is read must keep every text, byte by byte: bits per byte mean something
only if each token stands for a known number of bytes. Two families do:

- byte-level ones (GPT-2 and most since), whose tokens spell bytes;
- pieces with a fallback to bytes (Llama 2, Gemma), whose "▁" is a space. The
  space that they put before a text is left out. A text's own "▁" reads as a
  space, as with SentencePiece itself.

Anything else, such as a vocabulary of words with an unknown token, or a
normalizer that drops accents, is refused by name.
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from edl_jax.config import UserError

DOCUMENT_START = "<|document|>"

# Special tokens that may open a document, the first that there is.
_STARTS = (
  DOCUMENT_START,
  "<|begin_of_text|>",
  "<|startoftext|>",
  "<bos>",
  "<s>",
  "<|endoftext|>",
)
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Each of these finds a way of losing text.
_PROBES = (
  " two  spaces, a\ttab \r\n\n and an end \n",
  "Ünïcode: e\u0301 ﬁ ①, ǅ İ ß ﷺ A\u00a0b\u200dc\u00ad\ufeff",
  "漢字と仮名、中文、한국어 אב 😀👩‍🔬 \U0010fffd \x00\x01",
  "<s></s><unk><pad><0x0A><|endoftext|><|document|>[CLS][UNK]##a</w>Ġ",
  "UPPER lower 0123456789 3.14 !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
)


def byte_characters() -> dict[int, str]:
  """The printable character by which byte-level BPE writes each byte.

  Bytes that are printable in Latin-1 stand for themselves, the others take
  the code points from 256 on, in order: the convention of GPT-2.
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


def document_start(library: tokenizers.Tokenizer) -> int | None:
  """Returns the id of the special token that opens documents, if any."""
  special = {name: i for i, name in special_tokens(library).items()}
  return next((special[name] for name in _STARTS if name in special), None)


def token_bytes(library: tokenizers.Tokenizer) -> list[bytes]:
  """Returns what each id stands for; b"" for special tokens and gaps.

  Raises:
    UserError: the tokenizer is of neither family above.
  """
  settings = json.loads(library.to_str())
  byte_level = _is_byte_level(settings)
  _check_alphabet(settings["model"], byte_level)
  byte_of = {c: byte for byte, c in byte_characters().items()}
  vocabulary = library.get_vocab(with_added_tokens=True)
  added = library.get_added_tokens_decoder()
  found = [b""] * (max(vocabulary.values()) + 1)
  for piece, i in vocabulary.items():
    if i in added:
      found[i] = b"" if added[i].special else piece.encode()
    elif byte_level:
      found[i] = bytes(byte_of.get(c, 0) for c in piece)
    elif spelled := _BYTE.fullmatch(piece):
      found[i] = bytes([int(spelled[1], 16)])
    else:
      found[i] = piece.replace(_SPACE, " ").encode()
  return found


def _nodes(part: Any) -> list[dict[str, Any]]:
  """Flattens a normalizer, pre-tokenizer or decoder into its steps."""
  if part is None:
    return []
  inner = {"Sequence": ("normalizers", "pretokenizers", "decoders")}
  for key in inner.get(part["type"], ()):
    if key in part:
      return [node for step in part[key] for node in _nodes(step)]
  return [part]


def _is_byte_level(settings: dict[str, Any]) -> bool:
  steps = _nodes(settings["pre_tokenizer"])
  return any(step["type"] == "ByteLevel" for step in steps)


def _check_alphabet(model: dict[str, Any], byte_level: bool) -> None:
  """Raises UserError unless any byte can be written."""
  if model["type"] not in ("BPE", "Unigram"):
    raise UserError(f"a {model['type']} model does not keep every text")
  if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
    raise UserError("its tokens are marked by a prefix or suffix of words")
  pieces = model["vocab"]
  if model["type"] == "Unigram":
    pieces = [piece for piece, _ in pieces]
  wanted = byte_characters().values()
  if not byte_level:
    if not model.get("byte_fallback"):
      raise UserError(
        f"a {model['type']} model that neither works on bytes nor falls back"
        " to them has unknown characters"
      )
    wanted = [f"<0x{byte:02X}>" for byte in range(256)]
  missing = set(wanted) - set(pieces)
  if missing:
    raise UserError(f"it has no token for {len(missing)} of the 256 bytes")


def read_tokenizer(path: str) -> tokenizers.Tokenizer:
  """Reads a `tokenizer.json` or a SentencePiece `.model`.

  What makes a tokenizer lossy without need is switched off: a space put before
  the text, NFC, truncation, padding, dropout. One without a token that may
  open documents gets "<|document|>" as its last id.

  Raises:
    UserError: no such file, not a tokenizer, or one that loses text.
  """
  try:
    content = Path(path).expanduser().read_bytes()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from error
  try:
    if path.endswith(".model"):
      library = _from_sentencepiece(content)
    else:
      library = _from_json(content)
    if document_start(library) is None:
      library.add_special_tokens([DOCUMENT_START])
    library.encode_special_tokens = True
    if isinstance(library.model, models.Unigram):
      _shield(library)
    _probe(library)
  except UserError as error:
    raise UserError(
      f"{path}: {error}; take a byte-level tokenizer, or pieces with a fallback"
      " to bytes and no normalizer"
    ) from error
  return library


def _shield(library: tokenizers.Tokenizer) -> None:
  """Keeps text that spells a special or a byte token from being read as one.

  Unigram models know these tokens as pieces; BPE has no merges that make them.
  """
  names = [re.escape(name) for name in special_tokens(library).values()]
  names.append("<0x[0-9A-F]{2}>")
  # Alone, the first character cannot be part of the name.
  pattern = tokenizers.Regex(f"(?={'|'.join(names)}).")
  steps = [pre_tokenizers.Split(pattern, "isolated"), library.pre_tokenizer]
  library.pre_tokenizer = pre_tokenizers.Sequence([*filter(None, steps)])


def _probe(library: tokenizers.Tokenizer) -> None:
  """Raises UserError if one of some difficult texts does not survive."""
  meaning = token_bytes(library)
  for text in _PROBES:
    ids = library.encode(text, add_special_tokens=False).ids
    if b"".join(meaning[i] for i in ids) != text.encode():
      raise UserError(f"it does not keep the text {text[:20]!r}")


def _from_json(content: bytes) -> tokenizers.Tokenizer:
  try:
    settings = json.loads(content)
    settings["model"]["type"]  # Not any JSON file.
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
  if "dropout" in settings["model"]:
    settings["model"]["dropout"] = None
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(settings))
  except Exception as error:  # The library raises plain Exception.
    raise UserError(f"not a tokenizer.json ({error})") from error


def _is_space(step: dict[str, Any]) -> bool:
  """Whether a normalizer does no more than write spaces as "▁"."""
  return (
    step["type"] == "Replace"
    and step["pattern"] == {"String": " "}
    and step["content"] == _SPACE
  )


def _from_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
  """Rebuilds a SentencePiece model, whose tokens keep their ids."""
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise UserError(
      "reading it needs a package: pip install sentencepiece"
    ) from error
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(content)
  except Exception as error:  # DecodeError, of whichever protobuf it is.
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
  # The library derives the price of unknown characters from the lowest score.
  lowest = min(piece.score for piece in pieces if piece.type == piece.NORMAL)
  vocabulary = [
    (p.piece, p.score if p.type == p.NORMAL else lowest) for p in pieces
  ]
  unknown = next(i for i, p in enumerate(pieces) if p.type == p.UNKNOWN)
  return models.Unigram(vocabulary, unknown, byte_fallback=True)


def _merges(pieces: Any) -> models.BPE:
  """SentencePiece's BPE joins the neighbours whose union has the best score."""
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
