"""The corpus and its split, and the proportions in which domains are mixed."""

import collections
import dataclasses
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain

from edl_jax.config import DataConfig, TrainConfig, UserError
from edl_jax.text.chat import ChatTemplate
from edl_jax.text.documents import Document, SupervisedExample
from edl_jax.text.sources import read_documents
from edl_jax.text.taxonomy import Taxonomy

# More rows than any run reads. Grain allows no more than 2**63 - 1.
_ENDLESS = 2**62
# Of two shares. A domain with less would have a row in longer than any run.
_LARGEST_RATIO = 1e9


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Training and held-out documents, by source."""

  taxonomy: Taxonomy
  # In the order of `taxonomy.sources`.
  train: tuple[tuple[Document, ...], ...]
  held_out: tuple[tuple[Document, ...], ...]
  # SHA-256 of the names of the sources and of the origin and text of every
  # document of both splits, in order.
  content_hash: str
  # What reading left out, a line each.
  notes: tuple[str, ...] = ()

  @property
  def supervised(self) -> bool:
    """Whether any source has supervised examples."""
    return any(
      isinstance(document, SupervisedExample)
      for group in self.train
      for document in group[:1]
    )

  def sizes(self) -> list[tuple[int, int]]:
    """Returns the documents and characters of each source, of both splits."""
    return [
      (len(own), sum(len(document.text) for document in own))
      for own in map(operator.add, self.train, self.held_out)
    ]

  def train_bytes(self) -> list[int]:
    """Returns the UTF-8 bytes of each source's training text."""
    return [
      sum(len(document.text.encode()) for document in group)
      for group in self.train
    ]


def load_corpus(
  data: DataConfig, template: ChatTemplate | None = None
) -> Corpus:
  """Reads and splits all documents; touches no device.

  An origin is held out if its hash, as a number in [0, 1), is less than
  `data.held_out_fraction`. So the choice for one document does not depend on
  the others. If a domain would have no held-out text, its origin of lowest hash
  is held out; if it would have no training text, its origin of highest hash is
  trained on.

  Args:
    data: settings.
    template: renders the messages of supervised examples.

  Raises:
    UserError: text is missing or wrong, or a domain cannot be split or has both
      texts and supervised examples.
  """
  taxonomy, documents, notes = read_documents(data, template)
  by_domain = collections.defaultdict[str, list[Document]](list)
  for document in documents:
    by_domain[document.domain].append(document)
  groups = [by_domain[name] for name in taxonomy.sources]
  for name, own in zip(taxonomy.sources, groups):
    if len({isinstance(each, SupervisedExample) for each in own}) > 1:
      raise UserError(
        f"domain {name!r} has both texts and supervised examples; give them"
        " different domains"
      )
  held_out = held_out_origins(
    taxonomy.fine,
    [[origin_digest(document.origin) for document in own] for own in groups],
    data.held_out_fraction,
  )

  def split(held: bool) -> tuple[tuple[Document, ...], ...]:
    return tuple(
      tuple(d for d in own if (origin_digest(d.origin) in held_out) == held)
      for own in groups
    )

  return Corpus(
    taxonomy=taxonomy,
    train=split(False),
    held_out=split(True),
    content_hash=content_hash(
      taxonomy.source_names,
      [[(_digest(d.origin), d.digest()) for d in own] for own in groups],
    ),
    notes=tuple(notes),
  )


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def origin_digest(origin: str) -> bytes:
  """Returns the SHA-256 of an origin, which decides its side of the split."""
  return hashlib.sha256(origin.encode(errors="replace")).digest()


def position(digest: bytes) -> float:
  """Maps a digest to a number in [0, 1)."""
  return int.from_bytes(digest[:6], "big") / 2**48


def held_out_origins(
  names: Sequence[str], groups: Sequence[Sequence[bytes]], fraction: float
) -> set[bytes]:
  """Chooses the origins to hold out; see `load_corpus`.

  An origin that several domains share is held out in all of them or in none.

  Args:
    names: of the domains.
    groups: digests of the origins of each domain's documents. A last group
      beyond `names` holds unlabelled documents. They are not evaluated and need
      no held-out part.
    fraction: of the origins.

  Raises:
    UserError: a domain has a single origin.
  """
  every = set().union(*groups)
  held_out = {origin for origin in every if position(origin) < fraction}
  origins = [set(own) for _, own in zip(names, groups)]
  for own in origins:
    if not own & held_out:
      held_out.add(min(own, key=position))
  for own in origins:
    if own <= held_out:
      held_out.remove(max(own, key=position))
  for name, own in zip(names, origins):
    if own <= held_out or not own & held_out:
      raise UserError(
        f"domain {name!r} has too few documents to hold some out"
        f" ({len(own)} distinct); split or add documents"
      )
  return held_out


def content_hash(
  names: Sequence[str], groups: Sequence[Iterable[tuple[bytes, bytes]]]
) -> str:
  """Returns a SHA-256 of everything that determines split and rows.

  Args:
    names: of the sources.
    groups: digests of the origin and the text of each source's documents, in
      order.
  """
  content = hashlib.sha256()
  for name, group in zip(names, groups):
    # Documents enter as digests, so that no text can imitate this line.
    content.update(f"{name}\n".encode())
    for origin, text in group:
      content.update(origin + text)
  return content.hexdigest()


@dataclasses.dataclass(frozen=True)
class Phases:
  """The weights of the sources in each phase of a run."""

  # First row of each phase in the global sequence of rows, from 0, increasing.
  starts: tuple[int, ...]
  # Share of each source, by phase and source; each phase adds up to one.
  weights: tuple[tuple[float, ...], ...]

  @property
  def in_use(self) -> tuple[bool, ...]:
    """Whether each source has rows in any phase."""
    return tuple(any(column) for column in zip(*self.weights))

  def drawn(self, count: int) -> tuple[int, ...]:
    """Returns how many of the first `count` rows come from each source."""
    ends = (*self.starts[1:], count)
    parts = [
      _drawn(max(0, min(end, count) - start), weights)
      for start, end, weights in zip(self.starts, ends, self.weights)
    ]
    return tuple(map(sum, zip(*parts)))


class EpochCounter:
  """Counts how often each source's text was read, after any number of rows.

  A source that runs out is read again in a new order.

  Args:
    phases: how sources are mixed.
    rows: the rows of one epoch of each source, by name.
  """

  def __init__(self, phases: Phases, rows: Mapping[str, int]):
    self._phases, self._rows = phases, rows

  def at(self, rows: int) -> dict[str, float]:
    """Returns the epochs of each source after `rows` rows; exact fractions."""
    drawn = self._phases.drawn(rows)
    return {
      name: count / own if count else 0.0
      for (name, own), count in zip(self._rows.items(), drawn)
    }

  def repeats(self, start: int, stop: int) -> list[str]:
    """Returns messages of sources that began epoch 2, 3, 5, 9, ... in a span.

    It reports doublings alone, as small sources begin an epoch every few steps.

    Args:
      start, stop: the span of rows, [start, stop).
    """
    begun: dict[int, list[str]] = {}
    before = self.at(start)
    for name, epochs in self.at(stop).items():
      # The row that completes an epoch does not begin another.
      last, now = (max(0, math.ceil(x) - 1) for x in (before[name], epochs))
      if now.bit_length() > last.bit_length():
        epoch = 2 ** (now.bit_length() - 1) + 1
        begun.setdefault(epoch, []).append(name)
    return [
      f"{', '.join(names)}: read {epoch - 1} time(s), now again in a new order"
      for epoch, names in sorted(begun.items())
    ]


def mixture_weights(
  data: DataConfig, taxonomy: Taxonomy, sizes: Sequence[float] = ()
) -> tuple[float, ...]:
  """Returns each source's share of rows in the first phase; the sum is one.

  Args:
    data: `weights`, `mixing` and `temperature`.
    taxonomy: the sources; its weights apply where `data.weights` is empty.
    sizes: training text of each source, in the unit of `data.mixing`; unused if
      that is "equal".

  Raises:
    UserError: `data.weights` does not have one entry for each source.
  """
  weights = data.weights or taxonomy.weights or (1.0,) * len(taxonomy.sources)
  return _shares("data.weights", weights, data, taxonomy, sizes)


def mixture_phases(
  data: DataConfig,
  train: TrainConfig,
  taxonomy: Taxonomy,
  sizes: Sequence[float] = (),
) -> Phases:
  """Returns the weights of all phases of a run; see `mixture_weights`.

  A phase begins at the step nearest to its fraction of `train.num_steps`.

  Raises:
    UserError: a phase does not have one weight for each source.
  """
  phases = {0: mixture_weights(data, taxonomy, sizes)}
  for number, (fraction, *weights) in enumerate(data.weight_phases, start=1):
    name = f"data.weight_phases: phase {number}"
    # If two phases begin at the same step, the later one applies.
    start = round(fraction * train.num_steps) * train.batch_size
    phases[start] = _shares(name, weights, data, taxonomy, sizes)
  return Phases(tuple(phases), tuple(phases.values()))


def _shares(
  name: str,
  weights: Sequence[float],
  data: DataConfig,
  taxonomy: Taxonomy,
  sizes: Sequence[float],
) -> tuple[float, ...]:
  count = len(taxonomy.sources)
  if len(weights) != count:
    raise UserError(
      f"{name} has {len(weights)} entries for {count} domains:"
      f" {', '.join(taxonomy.sources)}"
    )
  try:
    if data.mixing != "equal":
      weights = [
        weight * size ** (1 / data.temperature)
        for weight, size in zip(weights, sizes, strict=True)
      ]
    total = sum(weights)
    shares = tuple(weight / total for weight in weights)
  except (OverflowError, ZeroDivisionError):
    shares = (0.0,)
  positive = [share for share in shares if share > 0]
  if not positive or max(positive) / min(positive) > _LARGEST_RATIO:
    raise UserError(
      f"{name}: the shares of the domains differ by more than"
      f" {_LARGEST_RATIO:.0e}; set the least to 0, or raise data.temperature"
    )
  return shares


def _proportions(weights: Sequence[float]) -> list[int]:
  """Returns the weights in hundredths of the smallest positive one."""
  smallest = min(weight for weight in weights if weight > 0)
  return [round(100 * weight / smallest) for weight in weights]


def _drawn(count: int, weights: Sequence[float]) -> list[int]:
  """Returns how many of the first `count` rows of `mix` each data set gives.

  Grain divides the rows between the first data set and the rest, those of the
  rest between the second data set and its rest, and so on, each time as evenly
  as whole numbers allow.
  """
  proportions = _proportions(weights)
  rest, drawn = sum(proportions), []
  for own in proportions:
    left = count * (rest - own) // rest if rest else 0
    drawn.append(count - left)
    count, rest = left, rest - own
  return drawn


def mix_phases(
  datasets: Sequence[grain.MapDataset[Any]], phases: Phases
) -> grain.MapDataset[Any]:
  """Interleaves endless data sets, by phase; see `mix`.

  Example i depends on i only. Each phase continues every data set where the
  phase before stopped.
  """
  if len(phases.starts) == 1:
    return mix(datasets, phases.weights[0])
  parts = []
  for start, end, weights in zip(
    phases.starts, (*phases.starts[1:], _ENDLESS), phases.weights
  ):
    rest = [
      dataset[skipped:]
      for dataset, skipped in zip(datasets, phases.drawn(start))
    ]
    parts.append(mix(rest, weights)[: end - start])
  return grain.MapDataset.concatenate(parts)


def mix(
  datasets: Sequence[grain.MapDataset[Any]], weights: Sequence[float]
) -> grain.MapDataset[Any]:
  """Interleaves data sets by index, evenly, in proportion to `weights`.

  Example i depends on i only. Weights are rounded to hundredths of the smallest
  positive weight: a ratio to it of at most two decimals is exact. Data sets of
  weight zero are left out.
  """
  hundredths = _proportions(weights)
  pairs = [(d, n) for d, n in zip(datasets, hundredths, strict=True) if n]
  # Grain truncates to hundredths. The middle of each step is safe from rounding
  # errors.
  steps = [1.0 if n == 100 else (n + 0.5) / 100 for _, n in pairs]
  return grain.MapDataset.mix([dataset for dataset, _ in pairs], steps)
