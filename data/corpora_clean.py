"""Cleans extracted text, cuts it into documents, and scrubs held-out text.

`clean` removes control characters and repetitions, and joins or cuts texts to a
sensible size. `Scrub` removes from training documents the lines that share 13
words in a row with a held-out document or a benchmark.
"""

import collections
import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

# (origin, text) of a document; the train/held-out split hashes the origin.
Text = tuple[str, str]

# Short texts of a file are joined until they have this many characters.
_JOINED = 2_000
# A longer text is cut at blank lines into pieces of about _PIECE characters.
_LONGEST, _PIECE = 100_000, 20_000
# A document with fewer characters is a stub.
_SHORTEST = 100
# A line (or paragraph) of at least this many bytes that occurred before in its
# source is boilerplate.
_REPEATED = 40
# Chinese text keeps the lines with at least this share of Chinese characters.
_CHINESE_SHARE = 0.2
# Training and held-out documents must not share this many words in a row.
_SHARED_WORDS = 13

_CHINESE = re.compile(
  "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# A Chinese character counts as a word.
_WORD = re.compile(rf"{_CHINESE.pattern}|[^\W_{_CHINESE.pattern[1:-1]}]+")
_CONTROL = {
  code: None
  for code in range(0x110000)
  if unicodedata.category(chr(code)) in ("Cc", "Cs", "Co")
  and chr(code) not in "\t\n"
} | {0xAD: None, 0xFEFF: None, 0x200B: None}


def clean(
  files: Iterable[tuple[str, Iterable[str]]],
  *,
  is_chinese: bool,
  repeats: str,
  max_bytes: int,
) -> tuple[list[Text], dict[str, int]]:
  """Makes the documents of one source.

  Args:
    files: unique name of each file, and its texts.
    is_chinese: whether to drop lines with less than 20% Chinese characters.
    repeats: which long parts to drop where they occur again: "lines";
      "paragraphs", for text whose lines were wrapped; or "none", for code.
    max_bytes: limit on the UTF-8 bytes of all documents, which are chosen by
      hash.

  Returns:
    (origin, text) of each document, and counts and bytes of what was removed.
    Documents are ordered by a hash that is independent of the split's, so that
    a reader that stops early takes a fair sample.
  """
  removed = collections.Counter[str]()
  seen: set[int] = set()
  found: dict[bytes, Text] = {}
  for name, texts in files:
    tidied = (_tidy(text, is_chinese, removed) for text in texts)
    if repeats != "none":
      separator = {"lines": "\n", "paragraphs": "\n\n"}[repeats]
      tidied = (_unseen(text, separator, seen, removed) for text in tidied)
    pieces = _sized(text for text in tidied if text)
    for number, text in enumerate(pieces):
      origin = f"{name}#{number}" if number else name
      digest = hashlib.sha256(text.encode()).digest()
      if len(text) < _SHORTEST:
        removed["short_documents"] += 1
      elif digest in found:
        removed["duplicate_documents"] += 1
      else:
        found[digest] = (origin, text)
  ordered = sorted(found.values(), key=lambda text: _order(text[0]))
  documents, room = [], max_bytes
  for origin, text in ordered:
    room -= len(text.encode())
    if room < 0:
      break
    documents.append((origin, text))
  removed["documents_over_the_cap"] = len(ordered) - len(documents)
  return documents, dict(removed)


def _order(origin: str) -> bytes:
  return hashlib.sha256(f"order {origin}".encode()).digest()


def _tidy(
  text: str, is_chinese: bool, removed: collections.Counter[str]
) -> str:
  """Drops control characters, trailing spaces, and lines not in Chinese."""
  text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
  lines = [line.rstrip() for line in text.split("\n")]
  if is_chinese:
    kept = [line for line in lines if not line or _mostly_chinese(line)]
    size = len("\n".join(lines).encode())
    removed["bytes_not_chinese"] += size - len("\n".join(kept).encode())
    lines = kept
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _unseen(
  text: str, separator: str, seen: set[int], removed: collections.Counter[str]
) -> str:
  """Drops the parts that are in `seen`, and adds the others to it."""
  kept = []
  for part in text.split(separator):
    words = " ".join(part.split())
    if (size := len(words.encode())) >= _REPEATED:
      if (key := hash(words)) in seen:
        removed["bytes_repeated"] += size
        continue
      seen.add(key)
    kept.append(part)
  return re.sub(r"\n{3,}", "\n\n", separator.join(kept)).strip("\n")


def _mostly_chinese(line: str) -> bool:
  characters = sum(map(len, line.split()))
  return len(_CHINESE.findall(line)) >= _CHINESE_SHARE * characters


def _sized(texts: Iterable[str]) -> Iterable[str]:
  """Joins the short texts of a file, and cuts the long ones."""
  joined: list[str] = []
  for text in texts:
    parts = _cut(text) if len(text) > _LONGEST else [text]
    for part in parts:
      joined.append(part)
      if sum(map(len, joined)) >= _JOINED:
        yield "\n\n".join(joined) + "\n"
        joined = []
  if joined:
    yield "\n\n".join(joined) + "\n"


def _cut(text: str) -> list[str]:
  """Cuts at blank lines, or at any line where these are too far apart."""
  separator = "\n\n"
  if max(map(len, text.split(separator))) > _LONGEST:
    separator = "\n"
  pieces, piece, size = [], [], 0
  for part in text.split(separator):
    piece.append(part)
    size += len(part)
    if size >= _PIECE:
      pieces.append(separator.join(piece))
      piece, size = [], 0
  return [*pieces, separator.join(piece)] if piece else pieces


# --- Scrub -------------------------------------------------------------------


class Scrub:
  """Removes the lines of a text that share 13 words in a row with others."""

  def __init__(self, held_out: Iterable[str]):
    """Takes the texts whose words must not remain."""
    grams = [_grams(_words(text)[0]) for text in held_out]
    self._held_out = np.unique(np.concatenate([*grams, _NO_GRAMS]))

  def __call__(self, text: str) -> str:
    """Returns the text without those lines, or "" if only a stub is left."""
    # Lines around a gap may share 13 words once they are neighbours.
    while (kept := self._once(text)) != text:
      text = kept
    return text

  def _once(self, text: str) -> str:
    words, lines = _words(text)
    grams = _grams(words)
    if not len(grams) or not len(self._held_out):
      return text
    at = np.searchsorted(self._held_out, grams)
    at[at == len(self._held_out)] = 0
    shared = np.flatnonzero(self._held_out[at] == grams)
    if not len(shared):
      return text
    positions = shared[:, None] + np.arange(_SHARED_WORDS)
    dropped = set(lines[np.unique(positions)].tolist())
    kept = [
      line
      for number, line in enumerate(text.split("\n"))
      if number not in dropped
    ]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept))
    return text if len(text) >= _SHORTEST else ""


_NO_GRAMS = np.zeros(0, np.uint64)


def _words(text: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the uint64 hash and the line number of each word."""
  found = [_WORD.findall(line) for line in text.lower().split("\n")]
  lines = np.repeat(np.arange(len(found)), [len(words) for words in found])
  hashes = [hash(word) for words in found for word in words]
  return np.array(hashes, np.int64).view(np.uint64), lines


def _grams(words: np.ndarray) -> np.ndarray:
  """Returns uint64 hashes of all runs of 13 words: polynomials mod 2**64."""
  count = len(words) - _SHARED_WORDS + 1
  if count <= 0:
    return _NO_GRAMS
  grams = np.zeros(count, np.uint64)
  for offset in range(_SHARED_WORDS):
    grams = grams * _BASE + words[offset : offset + count]
  return grams


_BASE = np.uint64(0x9E3779B97F4A7C15)
