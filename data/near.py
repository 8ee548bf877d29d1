"""Finds near duplicates by MinHash and locality-sensitive hashing.

Two texts are near duplicates if the sets of their shingles, runs of consecutive
words, have an estimated Jaccard similarity of at least the threshold. The first
in the order of reading is kept, and texts are compared with kept ones alone.
Signatures and buckets are datasketch's.

Broder, "On the resemblance and containment of documents", 1997.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edl_jax.text.streams import need_package

# A word; a Chinese character counts as one.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
# Shingles hashed in one call, which bounds the memory.
_SHINGLES = 1 << 13
# What the report shows of each domain, and of each text.
_EXAMPLES, _HEAD = 5, 80


class Near(NamedTuple):
  """What counts as a near duplicate."""

  # Least similarity, between 0 and 1.
  threshold: float
  # Words of a shingle.
  shingle: int
  # Length of a signature; the estimate's error is about its root's inverse.
  permutations: int

  def signature(self, text: str) -> np.ndarray:
    """Returns the MinHash of a text, uint32 (permutations,)."""
    datasketch = _datasketch()
    words = _WORD.findall(text.lower())
    count = max(1, len(words) - self.shingle + 1)
    shingles = {
      " ".join(words[start : start + self.shingle]).encode()
      for start in range(count)
    }
    minhash = datasketch.MinHash(self.permutations)
    rest = iter(shingles)
    while part := list(itertools.islice(rest, _SHINGLES)):
      minhash.update_batch(part)
    return minhash.hashvalues.astype(np.uint32)

  def ranges(self) -> list[tuple[int, int]]:
    """Returns the parts of signatures of which candidates share one."""
    return list(self.new_index().hashranges)

  def new_index(self) -> Any:
    """Returns an empty index of datasketch."""
    return _datasketch().MinHashLSH(self.threshold, self.permutations)

  def columns(self, places: list[str], texts: list[str]) -> dict[str, Any]:
    """Returns what a scan adds for the records of a chunk.

    Args:
      places: "file:place" of each record.
      texts: of the records.
    """
    signatures = [self.signature(text) for text in texts]
    return {
      "signature": np.array(signatures, np.uint32).reshape(
        len(texts), self.permutations
      ),
      "places": json.dumps(places),
      "heads": json.dumps([text[:_HEAD] for text in texts]),
    }


def _datasketch() -> Any:
  return need_package("datasketch", "finding near duplicates")


class NearDuplicates:
  """Detects near duplicates of the texts that were kept, in order."""

  def __init__(self, near: Near):
    self._near, self._index = near, near.new_index()
    # Signature and place of kept texts that may have near duplicates.
    self._kept: list[tuple[np.ndarray, str]] = []
    self._removed = Counter[str]()
    self._examples: list[dict[str, Any]] = []

  def seen(self, domain: str, scan: Mapping[str, Any], record: int) -> bool:
    """Returns whether a text is like a kept one; else it is kept.

    Args:
      domain: of the text.
      scan: of its chunk, with the columns of `Near`. It may have "similar":
        whether a record shares a bucket with another.
      record: index of the text in the scan.
    """
    if "similar" in scan and not scan["similar"][record]:
      return False
    signature = scan["signature"][record]
    minhash = _datasketch().LeanMinHash(
      seed=1, hashvalues=signature, scheme="affine32"
    )
    place, head = scan["places"][record], scan["heads"][record]
    for key in sorted(self._index.query(minhash)):
      other, where = self._kept[key]
      similarity = float(np.mean(other == signature))
      if similarity >= self._near.threshold:
        if self._removed[domain] < _EXAMPLES:
          self._examples.append(
            {
              "domain": domain,
              "removed": place,
              "like": where,
              "similarity": similarity,
              "text": head,
            }
          )
        self._removed[domain] += 1
        return True
    self._index.insert(len(self._kept), minhash)
    self._kept.append((signature, place))
    return False

  def report(self) -> dict[str, Any]:
    """Returns what was removed, by domain, with examples, for JSON."""
    return {
      "removed": dict(sorted(self._removed.items())),
      "examples": self._examples,
    }
