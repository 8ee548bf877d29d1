"""Chooses which scanned records to keep and which to hold out.

The choice is exactly that of `edl_jax.text`, which reads text into memory.
"""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.bad_records import BadRecords
from data.labels import check_columns
from data.near import Near, NearDuplicates
from edl_jax.config import DataConfig, UserError
from edl_jax.text.documents import DomainNames
from edl_jax.text.mixture import held_out_origins
from edl_jax.text.readers import SeenIds
from edl_jax.text.taxonomy import Taxonomy


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What happens to each of N good records, in the order of reading."""

  taxonomy: Taxonomy
  # Index into the taxonomy's sources, -1 for a dropped record, (N,).
  source_N: np.ndarray
  # Number of characters to keep, 0 for a dropped record, (N,).
  characters_N: np.ndarray
  held_out_N: np.ndarray
  # Confidence of the label, (N,).
  confidence_N: np.ndarray
  # SHA-256 of the origin, uint8 (N, 32).
  origin_N: np.ndarray
  # Number of the first record of each chunk, then N, (chunks + 1,).
  begin: np.ndarray
  # UTF-8 bytes of the kept records, before texts are shortened.
  num_bytes: int
  # Number of dropped records by reason, and "messages" about bad ones.
  skipped: dict[str, Any]
  # Number of bad records by file and reason.
  bad: dict[str, dict[str, int]]
  # What `NearDuplicates.report` tells, if they were looked for.
  near_duplicates: dict[str, Any] | None = None

  def of_chunk(self, number: int) -> dict[str, np.ndarray]:
    """Returns `source_N`, `held_out_N` and `characters_N` of a chunk."""
    part = slice(self.begin[number], self.begin[number + 1])
    return {
      name: getattr(self, name)[part]
      for name in ("source_N", "held_out_N", "characters_N")
    }

  def digests(
    self, source_K: np.ndarray, text_K: Sequence[np.ndarray]
  ) -> list[Iterator[tuple[bytes, bytes]]]:
    """Returns the digests of origin and text of K kept documents, by source.

    Args:
      source_K: source of each document.
      text_K: digest of each document's text.
    """
    origin_K = self.origin_N[self.source_N >= 0]

    def of_source(source: int) -> Iterator[tuple[bytes, bytes]]:
      for number in np.flatnonzero(source_K == source).tolist():
        yield origin_K[number].tobytes(), text_K[number].tobytes()

    return [of_source(source) for source in range(len(self.taxonomy.sources))]

  def report(self, documents: np.ndarray) -> list[dict[str, Any]]:
    """Returns the counts, sizes and confidence of each source.

    Args:
      documents: the kept documents, of type `prepared.DOCUMENT`.
    """
    confidence_K = self.confidence_N[self.source_N >= 0]
    rows = []
    for source, name in enumerate(self.taxonomy.sources):
      own = documents["source"] == source
      sums = {
        key: int(documents[key][own].sum(dtype=np.int64))
        for key in ("held_out", "bytes", "tokens")
      }
      confidence = float(confidence_K[own].mean(dtype=np.float64))
      count = int(own.sum())
      rows.append({"label": name, "documents": count, **sums})
      rows[-1]["confidence"] = confidence
    return rows


class _Selection:
  """Chooses record by record, in the order of reading."""

  def __init__(self, data: DataConfig, skip_bad: bool, near: Near | None):
    self.domains, self._skip_bad = DomainNames(data), skip_bad
    self.near = NearDuplicates(near) if near else None
    self._ids, self._texts = SeenIds(), set[bytes]()
    limit = data.max_characters_per_domain
    self._room = defaultdict[str, int](lambda: limit)
    # Records of each domain, kept or not.
    self.given = Counter[str]()
    # Domain (None if dropped) and kept characters of each record.
    self.domain: list[str | None] = []
    self.characters: list[int] = []
    self.skipped: dict[str, Any] = {
      "bad": 0,
      "duplicate": 0,
      "empty": 0,
      "over the limit": 0,
    }
    self.bad = BadRecords()

  def add(self, scan: Mapping[str, np.ndarray]) -> None:
    """Adds the records of a chunk.

    Raises:
      UserError: a label or an id is bad, and bad records are not skipped.
    """
    self.bad.merge(json.loads(str(scan["bad"])))
    if self.near:
      lists = {key: json.loads(str(scan[key])) for key in ("places", "heads")}
      scan = {**scan, **lists}
    names: list[str | tuple[str, UserError]] = []
    for name, where in json.loads(str(scan["labels"])):
      try:
        names.append(self.domains.add(name, where))
      except UserError as error:
        names.append((where, error))
    files = itertools.chain.from_iterable(
      itertools.repeat(file, count)
      for file, count in json.loads(str(scan["files"]))
    )
    ids = {index: rest for index, *rest in json.loads(str(scan["ids"]))}
    for index, (label, file) in enumerate(zip(scan["label"].tolist(), files)):
      if label < 0:
        self.skipped.setdefault("not kept", 0)
        self.skipped["not kept"] += 1
        self.domain.append(None)
        self.characters.append(0)
        continue
      domain = names[label]
      if index in ids:
        identifier, where = ids[index]
        if problem := self._ids.problem({"id": identifier}, where):
          domain = where, problem
      if isinstance(domain, tuple):
        where, error = domain
        if not self._skip_bad:
          raise error
        self.bad.add(where, error, file)
        domain, kept = None, 0
      else:
        self.given[domain] += 1
        kept = self._kept(domain, scan, index)
      self.domain.append(domain if kept else None)
      self.characters.append(kept)

  def _kept(
    self, domain: str, scan: Mapping[str, np.ndarray], index: int
  ) -> int:
    """Returns the number of characters to keep, 0 to drop the record."""
    digest = scan["text"][index].tobytes()
    if self._room[domain] <= 0:
      reason = "over the limit"
    elif scan["blank"][index]:
      reason = "empty"
    elif digest in self._texts:
      reason = "duplicate"
    else:
      # A text that occurs once needs no memory, where that is known.
      if "repeated" not in scan or scan["repeated"][index]:
        self._texts.add(digest)
      if self.near and self.near.seen(domain, scan, index):
        self.skipped.setdefault("near duplicate", 0)
        self.skipped["near duplicate"] += 1
        return 0
      kept = min(int(scan["characters"][index]), self._room[domain])
      self._room[domain] -= kept
      return kept
    self.skipped[reason] += 1
    return 0


def make_plan(
  scans: Iterable[Mapping[str, np.ndarray]],
  data: DataConfig,
  *,
  skip_bad: bool,
  rules: str = "",
  near: Near | None = None,
) -> Plan:
  """Chooses which records to keep and which to hold out.

  Args:
    scans: arrays that `chunks.scan` wrote, one mapping a chunk. They may have
      "repeated": whether a record's text occurs in another record too.
    data: gives taxonomy, limit, held-out fraction, and files (for messages).
    skip_bad: whether to drop bad records instead of stopping at the first.
    rules: the file of rules that labelled the records, if any.
    near: which near duplicates to drop, if any. Scans then have its columns.

  Raises:
    UserError: a record is bad, no record has a column of the rules, there is no
      text, or a domain has none or too little to split.
  """
  selection = _Selection(data, skip_bad, near)
  columns: dict[str, list[np.ndarray]] = defaultdict(list)
  missing: set[str] | None = None
  for scan in scans:
    selection.add(scan)
    absent = set(json.loads(str(scan["missing"])))
    missing = absent if missing is None else missing & absent
    for name in ("origin", "confidence", "bytes"):
      columns[name].append(scan[name])
  found = defaultdict[str, list[int]](list)
  for number, domain in enumerate(selection.domain):
    if domain is not None:
      found[domain].append(number)
  check_columns(rules, missing or ())
  taxonomy = selection.domains.taxonomy(found, data.files)
  vanished = [
    f"domain {name!r} is left out: each of its {count:,} texts is empty or"
    " occurred before"
    for name, count in selection.given.items()
    if name not in found
  ]
  origin_N = np.concatenate(columns["origin"])
  groups = [
    [origin_N[number].tobytes() for number in found[key]]
    for key in map(selection.domains.key, taxonomy.sources)
  ]
  held_out = held_out_origins(taxonomy.fine, groups, data.held_out_fraction)
  source_N = np.full(len(origin_N), -1, np.int32)
  held_out_N = np.zeros(len(origin_N), bool)
  for source, (name, origins) in enumerate(zip(taxonomy.sources, groups)):
    numbers = found[selection.domains.key(name)]
    source_N[numbers] = source
    held_out_N[numbers] = [origin in held_out for origin in origins]
  sizes = np.concatenate(columns["bytes"])
  return Plan(
    taxonomy=taxonomy,
    source_N=source_N,
    characters_N=np.array(selection.characters, np.int64),
    held_out_N=held_out_N,
    confidence_N=np.concatenate(columns["confidence"]),
    origin_N=origin_N,
    begin=np.cumsum([0, *map(len, columns["bytes"])]),
    num_bytes=int(sizes[source_N >= 0].sum(dtype=np.int64)),
    skipped=selection.skipped
    | {
      "bad": selection.bad.total,
      "messages": selection.bad.messages + vanished,
    },
    bad=selection.bad.by_file(),
    near_duplicates=selection.near.report() if selection.near else None,
  )
