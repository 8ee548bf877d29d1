"""Encodes batches of text into one array, by the fastest library that can.

fastokens reads the same `tokenizer.json` as tokenizers, gives the same ids, and
takes about a quarter of the time. It is optional, and used for byte-level BPE
alone: tests compare the two over every code point.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers

from edl_jax.text.tokenizer_files import PROBES, is_byte_level

# Maps texts to their tokens end to end, int32, and the number of tokens of
# each, int64.
FlatEncoder = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def flat_encoder(library: tokenizers.Tokenizer) -> FlatEncoder:
  """Returns the encoder of a tokenizer; it adds no special tokens.

  Text that spells a special token is encoded as any other text, if `library`
  does so.
  """
  own = _by_tokenizers(library)
  fast = _by_fastokens(library)
  if fast is None:
    return own
  for array, expected in zip(fast(PROBES), own(PROBES)):
    if not np.array_equal(array, expected):
      return own
  return fast


def has_fastokens() -> bool:
  """Returns whether the faster library is installed."""
  return importlib.util.find_spec("fastokens") is not None


def _by_tokenizers(library: tokenizers.Tokenizer) -> FlatEncoder:
  def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encodings = library.encode_batch_fast(list(texts), add_special_tokens=False)
    pieces = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return (
      np.concatenate([np.zeros(0, np.int32), *pieces]),
      np.array([len(piece) for piece in pieces], np.int64),
    )

  return encode


def _by_fastokens(library: tokenizers.Tokenizer) -> FlatEncoder | None:
  """Returns None where fastokens is missing or does not know the tokenizer."""
  content = library.to_str()
  settings = json.loads(content)
  known = (
    settings["model"]["type"] == "BPE"
    and is_byte_level(settings)
    and all(token["special"] for token in settings["added_tokens"])
    and library.encode_special_tokens
  )
  if not known or not has_fastokens():
    return None
  module: Any = importlib.import_module("fastokens")
  try:
    fast = module.Tokenizer.from_json_str(content)
  except ValueError:  # It has no such pre-tokenizer.
    return None

  def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, ends = fast.encode_batch_flat(list(texts), split_special_tokens=True)
    return (
      np.frombuffer(ids, "<u4").astype(np.int32),
      np.diff(np.frombuffer(ends, "<u8").astype(np.int64)),
    )

  return encode
