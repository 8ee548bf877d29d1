"""Documents, and the mapping from their labels to domains."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Collection

from edl_jax.config import DataConfig, UserError
from edl_jax.text.taxonomy import (
  UNLABELLED,
  Taxonomy,
  apart,
  distinct_names,
  fine_name,
  join_label,
  load_taxonomy,
  split_label,
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, with its fine domain label and its origin.

  The split into training and held-out text hashes the origin. Texts made from
  one file share an origin, so that the same words never land on both sides.
  """

  text: str
  domain: str
  origin: str

  def parts(self) -> list[tuple[str, bool]]:
    """Returns the text in parts, and whether the loss counts each one."""
    return [(self.text, True)]

  def digest(self) -> bytes:
    """Returns a SHA-256 of what becomes of the document in training."""
    return hashlib.sha256(self.text.encode(errors="surrogateescape")).digest()


@dataclasses.dataclass(frozen=True)
class SupervisedExample(Document):
  """A document of which the loss counts completions alone."""

  # Where the parts of `text` after the first one begin: prompt and completion
  # in turn, a prompt first, which may be empty.
  cuts: tuple[int, ...]
  # Whether special tokens that `text` spells are special tokens. A chat
  # template writes them, with those that end a turn.
  special: bool = False
  # Else the special token that ends the completion, "" for the document start.
  end: str = ""

  def parts(self) -> list[tuple[str, bool]]:
    ends = (*self.cuts, len(self.text))
    return [
      (self.text[start:end], bool(number % 2))
      for number, (start, end) in enumerate(zip((0, *self.cuts), ends))
    ]

  def digest(self) -> bytes:
    shape = json.dumps([self.cuts, self.special, self.end]).encode()
    return hashlib.sha256(super().digest() + shape).digest()


class DomainNames:
  """Maps labels to domains.

  `data.taxonomy`, or else `data.domains`, declares the domains: it selects,
  orders and may regroup them. Labels are matched by their fine part. A name in
  `data.domains` without a coarse part takes that of the source. If neither is
  set, every label is a domain.
  """

  def __init__(self, data: DataConfig):
    """Reads the taxonomy file, if there is one.

    Raises:
      UserError: the file or a name in `data.domains` is wrong.
    """
    # The key that messages name as the one to correct.
    self.setting = "data.taxonomy" if data.taxonomy else "data.domains"
    self._file = load_taxonomy(data.taxonomy) if data.taxonomy else None
    self._names = self._file.names if self._file else data.domains
    pairs = [
      split_label(name, self.setting) for name in distinct_names(self._names)
    ]
    # Coarse names ("" for none) of the declared domains by fine label.
    self.declared = {fine: coarse for coarse, fine in pairs}
    # Coarse names that the source gives, by fine label.
    self._coarse: dict[str, str] = {}
    # Fine labels that several coarse ones share, and those met without one.
    self._shared, self._bare = set[str](), set[str]()
    # The label under which `add` knew a source, by its name.
    self._before: dict[str, str] = {}

  def add(self, label: str | None, where: str) -> str:
    """Returns the fine domain of a label that was met at `where`.

    A text without a label (None, "" or "unlabelled") gets `UNLABELLED`, if the
    taxonomy file allows such text.

    Raises:
      UserError: the label is malformed, unknown or contradicts another.
    """
    unlabelled = self._file is not None and self._file.unlabelled
    if unlabelled and label in (None, "", UNLABELLED):
      return UNLABELLED
    if label is None:
      raise UserError(
        f"{where}: key 'domain' is missing; domain must be a string, unless a"
        " data.taxonomy has 'unlabelled: true'"
      )
    coarse, fine = self._told_apart(*split_label(label, where), where)
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
    decided = self._file or self.declared.get(fine)
    if coarse and known and coarse != known and not decided:
      raise UserError(
        f"{where}: domain {fine!r} belongs to {coarse!r} here and to"
        f" {known!r} before; name it {label!r} in data.domains to decide"
      )
    self._coarse[fine] = known or coarse
    return fine

  def _told_apart(self, coarse: str, fine: str, where: str) -> tuple[str, str]:
    """Returns another fine label where coarse ones share it.

    Raises:
      UserError: nothing tells which of them a label without a coarse name is.
    """
    longer = f"{coarse}_{fine}"
    if self.declared:
      hidden = coarse and fine not in self.declared and longer in self.declared
      return coarse, longer if hidden else fine
    if not coarse:
      if fine in self._shared:
        raise UserError(
          f"{where}: domain {fine!r} occurs under several coarse names; write"
          " one before it, as coarse/fine"
        )
      self._bare.add(fine)
    known = self._coarse.get(fine)
    if coarse and known and coarse != known and fine not in self._bare:
      self._shared.add(fine)
      return coarse, longer
    return coarse, fine

  def key(self, source: str) -> str:
    """Returns what `add` returned for a source of the taxonomy."""
    return self._before.get(source, source)

  def _named(self, fine: str) -> str:
    """Returns a domain's name in full, once all labels are known."""
    label = join_label(self.declared.get(fine) or self._coarse[fine], fine)
    if fine not in self._shared:
      return label
    longer = apart(label)
    if fine_name(longer) in self._coarse:
      raise UserError(
        f"domain {fine!r} occurs under several coarse names and as {longer!r};"
        " rename one of them"
      )
    self._before[fine_name(longer)] = fine
    return longer

  def taxonomy(self, found: Collection[str], source: str) -> Taxonomy:
    """Returns the taxonomy of the declared domains, else of those found.

    Domains that are not declared are sorted by name.

    Args:
      found: fine labels that have text; `UNLABELLED` where text has none.
      source: where the text was looked for, for messages.

    Raises:
      UserError: there is no text, or none of a declared domain.
    """
    fine_labels = self.declared or found
    if not fine_labels:
      raise UserError(f"data.files={source}: no text in any of the files")
    for fine in fine_labels:
      if fine not in found:
        raise UserError(
          f"empty domain {fine!r}: no text in {source}; add some, or leave it"
          f" out of {self.setting}"
        )
    if self._file:
      missing = self._file.unlabelled and UNLABELLED not in found
      return self._file.without_unlabelled() if missing else self._file
    names = list(map(self._named, fine_labels))
    return Taxonomy.from_names(names if self.declared else sorted(names))


class Gatherer:
  """Collects documents by fine label, without empty texts and duplicates.

  The texts of a domain have `max_characters` in all; the last one is cut there,
  unless it is a supervised example.
  """

  def __init__(self, max_characters: int):
    self.documents = collections.defaultdict[str, list[Document]](list)
    self._room = collections.defaultdict[str, int](lambda: max_characters)
    self._seen: set[bytes] = set()
    # Texts given of each domain, of which some may be left out.
    self._given = collections.Counter[str]()

  def has_room(self, domain: str) -> bool:
    """Returns whether a domain has fewer characters than its limit."""
    return self._room[domain] > 0

  def add(self, document: Document) -> None:
    """Adds a document, unless it is empty, a duplicate or over the limit."""
    text, domain = document.text, document.domain
    self._given[domain] += 1
    if not self.has_room(domain) or not text or text.isspace():
      return
    digest = document.digest()
    if digest in self._seen:
      return
    self._seen.add(digest)
    if not isinstance(document, SupervisedExample):
      document = dataclasses.replace(document, text=text[: self._room[domain]])
    self._room[domain] -= len(document.text)
    self.documents[domain].append(document)

  def vanished(self) -> list[str]:
    """Returns a message for each domain of which no text is left."""
    return [
      f"domain {name!r} is left out: each of its {count:,} texts is empty or"
      " occurred before"
      for name, count in self._given.items()
      if not self.documents.get(name)
    ]
