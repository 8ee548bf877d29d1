"""Documents, and the domains that their labels mean."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sized

from edl_jax.config import DataConfig, UserError
from edl_jax.text.taxonomy import (
  UNLABELLED,
  join_label,
  load_taxonomy,
  split_label,
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, with its fine domain label and the origin that the split hashes.

  Documents made from one file share an origin, so that training and held-out
  text never hold the same words in two guises.
  """

  text: str
  domain: str
  origin: str


class DomainNames:
  """Decides which domain a label means.

  `data.domains` or the domains of `data.taxonomy` select, order and may
  regroup domains; they are matched by fine label. A name in `data.domains`
  without a coarse part takes the one that the source gives. Without either,
  every label that is met is a domain.
  """

  def __init__(self, data: DataConfig):
    """Reads the taxonomy file, if there is one.

    Raises:
      UserError: the file or a name in `data.domains` is wrong.
    """
    # What a message names as the place to mend.
    self.setting = "data.taxonomy" if data.taxonomy else "data.domains"
    self._names, self._unlabelled = data.domains, False
    if data.taxonomy:
      taxonomy = load_taxonomy(data.taxonomy)
      self._names, self._unlabelled = taxonomy.names, taxonomy.unlabelled
    pairs = [split_label(name, "data.domains") for name in self._names]
    # Coarse names ("" for none) by fine label.
    self.declared = {fine: coarse for coarse, fine in pairs}
    self._final = bool(data.taxonomy)
    self._coarse: dict[str, str] = {}

  def add(self, label: str | None, where: str) -> str:
    """Returns the fine domain of a label that was met at `where`.

    Without a label (None, "" or "unlabelled") it is `UNLABELLED`, if the
    taxonomy has such rows.

    Raises:
      UserError: a label that is malformed, unknown or contradicts another.
    """
    if self._unlabelled and label in (None, "", UNLABELLED):
      return UNLABELLED
    if label is None:
      raise UserError(
        f"{where}: key 'domain' is missing; domain must be a string, unless a"
        " data.taxonomy has 'unlabelled: true'"
      )
    coarse, fine = split_label(label, where)
    if self.declared and fine not in self.declared:
      raise UserError(
        f"{where}: unknown domain {label!r}; {self.setting} has"
        f" {', '.join(self._names)}"
      )
    if fine == UNLABELLED:
      raise UserError(
        f"{where}: domain {label!r}: such rows need a data.taxonomy with"
        " 'unlabelled: true'"
      )
    known = self._coarse.setdefault(fine, coarse)
    decided = self._final or self.declared.get(fine)
    if coarse and known and coarse != known and not decided:
      raise UserError(
        f"{where}: domain {fine!r} belongs to {coarse!r} here and to"
        f" {known!r} before; name it {label!r} in data.domains to decide"
      )
    self._coarse[fine] = known or coarse
    return fine

  def names(self, found: Mapping[str, Sized], source: str) -> tuple[str, ...]:
    """Returns the declared domains, else those found, in the final order.

    Args:
      found: the documents by fine domain.
      source: where they were looked for.

    Raises:
      UserError: there is none, or none of a declared domain.
    """
    if self._final:
      names = self._names
    elif self.declared:
      names = tuple(
        join_label(coarse or self._coarse.get(fine, ""), fine)
        for fine, coarse in self.declared.items()
      )
    else:
      names = tuple(
        sorted(join_label(self._coarse[fine], fine) for fine in found)
      )
    if not names:
      raise UserError(f"data.files={source}: no text in any of the files")
    for name in names:
      fine = name.rsplit("/", 1)[-1]
      if not found.get(fine):
        raise UserError(
          f"empty domain {fine!r}: no text in {source}; add some, or leave it"
          f" out of {self.setting}"
        )
    return names


class Gatherer:
  """Documents by fine label: no empty text, no duplicate, a cap on each."""

  def __init__(self, max_characters: int):
    self.documents = collections.defaultdict[str, list[Document]](list)
    self._room = collections.defaultdict[str, int](lambda: max_characters)
    self._seen: set[bytes] = set()

  def has_room(self, domain: str) -> bool:
    return self._room[domain] > 0

  def add(self, text: str, domain: str, origin: str) -> None:
    if not self.has_room(domain) or not text or text.isspace():
      return
    digest = hashlib.sha256(text.encode()).digest()
    if digest in self._seen:
      return
    self._seen.add(digest)
    text = text[: self._room[domain]]
    self._room[domain] -= len(text)
    self.documents[domain].append(Document(text, domain, origin))
