"""Domains: their taxonomy, the split of their documents, their proportions."""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import grain

from edl_jax.config import DataConfig, UserError
from edl_jax.sources import Document, read_documents


@dataclasses.dataclass(frozen=True)
class Taxonomy:
  """Two levels of domain names; labels are indices into `fine`.

  A domain without a coarse name is its own parent.
  """

  fine: tuple[str, ...]
  coarse: tuple[str, ...]
  # Index into `coarse` of each fine domain.
  parent: tuple[int, ...]

  @classmethod
  def from_names(cls, names: Sequence[str]) -> "Taxonomy":
    """Builds the taxonomy of domains named "coarse/fine" or "fine"."""
    fine = tuple(name.rsplit("/", 1)[-1] for name in names)
    parents = [name.split("/", 1)[0] for name in names]
    coarse = tuple(dict.fromkeys(parents))
    return cls(fine, coarse, tuple(map(coarse.index, parents)))

  def to_dict(self) -> dict[str, list]:
    """Returns the fields as JSON can hold them."""
    return {key: list(value) for key, value in vars(self).items()}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "Taxonomy":
    """Inverse of `to_dict`."""
    return cls(**{key: tuple(value) for key, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents by fine domain, in the order of the taxonomy, and their split."""

  taxonomy: Taxonomy
  train: tuple[tuple[Document, ...], ...]
  held_out: tuple[tuple[Document, ...], ...]
  # SHA-256 of the domain names and of every document, held out or not: its
  # origin and its text, in order.
  content_hash: str


def load_corpus(data: DataConfig) -> Corpus:
  """Reads and splits all documents; touches no device.

  Whole origins are held out, those whose hash lies in the lowest
  `data.held_out_fraction`: the choice for one document does not depend on
  which others there are. A domain that this leaves without held-out (or
  without training) documents gives up its origin of lowest (highest) hash.

  Raises:
    UserError: bad or missing text; a domain that cannot be split.
  """
  names, documents = read_documents(data)
  taxonomy = Taxonomy.from_names(names)
  by_domain = collections.defaultdict[str, list[Document]](list)
  for document in documents:
    by_domain[document.domain].append(document)
  groups = [by_domain[fine] for fine in taxonomy.fine]
  held_out = _held_out_origins(taxonomy.fine, groups, data.held_out_fraction)
  return Corpus(
    taxonomy=taxonomy,
    train=tuple(
      tuple(d for d in group if d.origin not in held_out) for group in groups
    ),
    held_out=tuple(
      tuple(d for d in group if d.origin in held_out) for group in groups
    ),
    content_hash=_content_hash(names, groups),
  )


def _position(origin: str) -> float:
  """Hashes an origin to [0, 1)."""
  digest = hashlib.sha256(origin.encode(errors="replace")).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def _held_out_origins(
  names: Sequence[str],
  groups: Sequence[Sequence[Document]],
  fraction: float,
) -> set[str]:
  """Chooses the origins to hold out, the same in every domain."""
  position = {d.origin: _position(d.origin) for group in groups for d in group}
  held_out = {origin for origin, at in position.items() if at < fraction}
  origins = [{document.origin for document in group} for group in groups]
  for own in origins:
    if not own & held_out:
      held_out.add(min(own, key=position.__getitem__))
  for own in origins:
    if own <= held_out:
      held_out.remove(max(own, key=position.__getitem__))
  for name, own in zip(names, origins):
    if own <= held_out or not own & held_out:
      raise UserError(
        f"domain {name!r} has too few documents to hold some out"
        f" ({len(own)} distinct); split or add documents"
      )
  return held_out


def _content_hash(
  names: Sequence[str], groups: Sequence[Sequence[Document]]
) -> str:
  """Hashes what split and rows follow from: origins too, and in their order."""
  content = hashlib.sha256()
  for name, group in zip(names, groups):
    # Documents never equal this line, being hashed themselves.
    content.update(f"{name}\n".encode())
    for document in group:
      for part in (document.origin, document.text):
        encoded = part.encode(errors="surrogateescape")
        content.update(hashlib.sha256(encoded).digest())
  return content.hexdigest()


def mixture_weights(data: DataConfig, taxonomy: Taxonomy) -> tuple[float, ...]:
  """Returns the share of rows of each fine domain; they add up to one.

  Raises:
    UserError: `data.weights` has another length than the taxonomy.
  """
  count = len(taxonomy.fine)
  weights = data.weights or (1.0,) * count
  if len(weights) != count:
    raise UserError(
      f"data.weights has {len(weights)} entries for {count} domains:"
      f" {', '.join(taxonomy.fine)}"
    )
  total = sum(weights)
  return tuple(weight / total for weight in weights)


def mix(
  datasets: Sequence[grain.MapDataset], weights: Sequence[float]
) -> grain.MapDataset:
  """Interleaves data sets by index, evenly, in proportion to `weights`.

  Example i depends on i only. Grain counts in hundredths of the smallest
  weight: weights whose ratio to it has at most two decimals are met exactly,
  others to within half a hundredth of it. Those of weight zero are left out.
  """
  pairs = [(d, w) for d, w in zip(datasets, weights, strict=True) if w > 0]
  smallest = min(weight for _, weight in pairs)
  # Grain cuts down to hundredths where we want the nearest, and a rounding
  # error must not tip a whole number over: aim at the middle of the step.
  hundredths = [round(100 * weight / smallest) for _, weight in pairs]
  steps = [1.0 if n == 100 else (n + 0.5) / 100 for n in hundredths]
  return grain.MapDataset.mix([dataset for dataset, _ in pairs], steps)
