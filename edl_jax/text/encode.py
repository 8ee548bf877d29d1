"""From the documents of a corpus to their tokens."""

import dataclasses
import hashlib
import io
import itertools
import re
import zipfile
from collections.abc import Sequence

import numpy as np

from edl_jax.cache import cache_key, read_cache, write_cache
from edl_jax.text.documents import Document, SupervisedExample
from edl_jax.text.mixture import Corpus
from edl_jax.text.prepared import PreparedCorpus
from edl_jax.text.token_stream import EncodedDocuments
from edl_jax.text.tokenizer import Tokenizer


def encode_corpus(
  corpus: Corpus | PreparedCorpus, split: str, tokenizer: Tokenizer
) -> list[EncodedDocuments]:
  """Returns the tokens of each source's documents of a split.

  Encoding takes a second for two or three megabytes, so the cache keeps them.
  """
  if isinstance(corpus, PreparedCorpus):
    return corpus.documents(split)
  groups: tuple[tuple[Document, ...], ...] = getattr(corpus, split)
  documents = [document for group in groups for document in group]
  # The content hash does not determine the split, so the key hashes the texts.
  texts = hashlib.sha256()
  for document in documents:
    texts.update(document.digest())
  key = cache_key(texts.hexdigest(), tokenizer.to_json())
  cached = read_cache(f"tokens-{key}.npz")
  encoded = _unpack(cached) if cached is not None else None
  if encoded is None:
    tokens, length_I, counted = _encode(documents, tokenizer)
    small = tokens.max(initial=0) < 2**16
    encoded = EncodedDocuments.from_array(
      tokens.astype(np.uint16) if small else tokens, length_I, counted
    )
    write_cache(f"tokens-{key}.npz", _pack(encoded))
  ends = np.cumsum([0, *map(len, groups)])
  return [
    encoded[start:end]
    if any(isinstance(each, SupervisedExample) for each in group[:1])
    else dataclasses.replace(encoded[start:end], counted=None)
    for group, (start, end) in zip(groups, itertools.pairwise(ends))
  ]


def _encode(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Encodes documents, the parts of supervised examples each by itself.

  A prompt therefore has the tokens that it has where a model continues it, and
  no token is part of both. Where no chat template ends turns, a special token
  ends the example, as it ends documents.

  Returns:
    The tokens of all documents end to end, how many of them each document has,
    and with supervised examples whether the loss counts each token.
  """
  if not any(isinstance(each, SupervisedExample) for each in documents):
    tokens, length_I = tokenizer.encode_flat([each.text for each in documents])
    return tokens, length_I, None
  special = tokenizer.special_ids
  start = next(iter(special))
  # Longer names first, as one may begin with another.
  names = sorted(special, key=len, reverse=True)
  pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
  pieces: list[str] = []
  # The document of each piece, and whether it counts and is a special token.
  number_P, counted_P, special_P = [], [], []
  for number, document in enumerate(documents):
    example = document if isinstance(document, SupervisedExample) else None
    chat = example is not None and example.special
    for text, counted in document.parts():
      for place, piece in enumerate(pattern.split(text) if chat else [text]):
        pieces.append(piece)
        number_P.append(number)
        counted_P.append(counted)
        special_P.append(bool(place % 2))
    if example is not None and not chat:
      pieces.append(example.end or start)
      number_P.append(number)
      counted_P.append(True)
      special_P.append(True)
  plain = iter(
    tokenizer.encode_batch(
      [piece for piece, is_special in zip(pieces, special_P) if not is_special]
    )
  )
  ids = [
    np.array([special[piece]], np.int32) if is_special else next(plain)
    for piece, is_special in zip(pieces, special_P)
  ]
  size_P = np.array([*map(len, ids)])
  length_I = np.zeros(len(documents), np.int64)
  np.add.at(length_I, np.array(number_P), size_P)
  return np.concatenate(ids), length_I, np.repeat(counted_P, size_P)


def _pack(encoded: EncodedDocuments) -> bytes:
  file = io.BytesIO()
  (tokens,) = encoded.arrays
  if encoded.counted is None:
    np.savez(file, tokens=tokens, lengths=encoded.length_I)
  else:
    (counted,) = encoded.counted
    np.savez(file, tokens=tokens, lengths=encoded.length_I, counted=counted)
  return file.getvalue()


def _unpack(content: bytes) -> EncodedDocuments | None:
  """Inverse of `_pack`; None for a damaged file, by the checksums of zip."""
  try:
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    return EncodedDocuments.from_array(
      arrays["tokens"],
      arrays["lengths"],
      arrays.get("counted"),
    )
  except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
    return None
