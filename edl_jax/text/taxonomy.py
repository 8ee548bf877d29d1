"""The taxonomy of domains: fine labels, their coarse parents, their weights."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import yaml

from edl_jax import storage
from edl_jax.config import UserError

# Name of the source of rows whose domain is unknown.
UNLABELLED = "unlabelled"


@dataclasses.dataclass(frozen=True)
class Taxonomy:
  """Two levels of domain names; labels are indices into `fine`.

  A domain without a coarse name is its own parent.
  """

  fine: tuple[str, ...]
  coarse: tuple[str, ...]
  # Index into `coarse` of each fine domain.
  parent: tuple[int, ...]
  # Weight of each of the `sources` in the mixture; empty: equal weights.
  weights: tuple[float, ...] = ()
  # Whether there is one more source, of rows without a domain. They train the
  # model, but the divergence loss leaves them out.
  unlabelled: bool = False

  @classmethod
  def from_names(cls, names: Sequence[str], **options: Any) -> "Taxonomy":
    """Builds the taxonomy of domains named "coarse/fine" or "fine".

    Args:
      names: of the domains, in the order of their labels.
      **options: values of the other fields.
    """
    fine = tuple(map(fine_name, names))
    parents = [name.split("/", 1)[0] for name in names]
    coarse = tuple(dict.fromkeys(parents))
    return cls(fine, coarse, tuple(map(coarse.index, parents)), **options)

  @property
  def sources(self) -> tuple[str, ...]:
    """Names of the sources: fine domains, then the unlabelled rows if any."""
    return self.fine + (UNLABELLED,) * self.unlabelled

  @property
  def labels(self) -> tuple[int, ...]:
    """Domain label of each source's rows; -1 for the unlabelled."""
    return (*range(len(self.fine)), *(-1,) * self.unlabelled)

  @property
  def names(self) -> tuple[str, ...]:
    """Fine domains as "coarse/fine", or "fine" where a domain is its parent."""
    return tuple(
      fine if self.coarse[parent] == fine else f"{self.coarse[parent]}/{fine}"
      for fine, parent in zip(self.fine, self.parent)
    )

  @property
  def source_names(self) -> tuple[str, ...]:
    """Names of the `sources`, fine domains as in `names`."""
    return self.names + self.sources[len(self.fine) :]

  def without_unlabelled(self) -> "Taxonomy":
    """Returns this taxonomy without the source of unlabelled rows."""
    weights = self.weights[: len(self.fine)]
    return dataclasses.replace(self, weights=weights, unlabelled=False)

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON object.

    It omits default values of `weights` and `unlabelled`, which older
    checkpoints do not have.
    """
    fields: dict[str, Any] = {
      key: list(value)
      for key, value in vars(self).items()
      if isinstance(value, tuple) and (value or key != "weights")
    }
    return fields | ({"unlabelled": True} if self.unlabelled else {})

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "Taxonomy":
    """Inverse of `to_dict`."""
    values: dict[str, Any] = {
      key: tuple(value) if isinstance(value, list) else value
      for key, value in fields.items()
    }
    return cls(**values)


def split_label(label: str, where: str) -> tuple[str, str]:
  """Splits a label "coarse/fine" or "fine" into (coarse or "", fine).

  Raises:
    UserError: the label, met at `where`, has neither form.
  """
  coarse, _, fine = label.rpartition("/")
  if not fine or "/" in coarse or label.startswith("/"):
    raise UserError(f"{where}: domain {label!r} must be fine or coarse/fine")
  return coarse, fine


def join_label(coarse: str, fine: str) -> str:
  """Inverse of `split_label`."""
  return f"{coarse}/{fine}" if coarse else fine


def fine_name(label: str) -> str:
  """Returns the fine part of a label "coarse/fine" or "fine"."""
  return label.rpartition("/")[-1]


def distinct_names(names: Sequence[str]) -> list[str]:
  """Returns names of which no two share the fine part.

  Fine labels that several coarse ones share take these into their names:
  en/news and de/news become en/en_news and de/de_news.
  """
  fine = list(map(fine_name, names))
  return [
    label if fine.count(name) == 1 or label == name else apart(label)
    for name, label in zip(fine, names)
  ]


def apart(label: str) -> str:
  """Returns "coarse/coarse_fine" of "coarse/fine"."""
  coarse, fine = label.rsplit("/", 1)
  return f"{coarse}/{coarse}_{fine}"


def load_taxonomy(path: str) -> Taxonomy:
  """Reads a taxonomy file:

    domains:                 # in the order of the labels
      - {fine: wordnet, coarse: english, weight: 2.0}
      - {fine: sympy}        # its own parent, of weight 1
    unlabelled: true         # or {weight: 0.5}; false by default

  Raises:
    UserError: there is no such file, or an entry is wrong; names both.
  """
  content = read_yaml(path)
  _check_keys(content, {"domains", UNLABELLED}, path)
  entries = content.get("domains")
  if not isinstance(entries, list) or not entries:
    raise UserError(f"{path}: 'domains' must be a list of {{fine: NAME, ...}}")
  names, weights = [], []
  for number, entry in enumerate(entries, start=1):
    where = f"{path}: domain {number}"
    if not isinstance(entry, dict):
      raise UserError(f"{where}: must be {{fine: NAME, ...}}, not {entry!r}")
    _check_keys(entry, {"fine", "coarse", "weight"}, where)
    fine, coarse = _name(entry, "fine", where), _name(entry, "coarse", where)
    if fine == UNLABELLED:
      raise UserError(
        f"{where}: the name {UNLABELLED!r} is reserved; for rows without a"
        " domain set the key of that name"
      )
    others = [name for name in names if fine_name(name) == fine]
    # Coarse names tell fine ones apart, if each has one of its own.
    if others and (not coarse or {fine, f"{coarse}/{fine}"} & {*others}):
      raise UserError(f"{where}: {fine!r} occurs more than once")
    names.append(join_label(coarse, fine))
    weights.append(_weight(entry, where))
  rest = content.get(UNLABELLED, False)
  if isinstance(rest, dict):
    where = f"{path}: {UNLABELLED}"
    _check_keys(rest, {"weight"}, where)
    weights.append(_weight(rest, where))
  elif not isinstance(rest, bool):
    raise UserError(
      f"{path}: {UNLABELLED!r} must be true, false or {{weight: NUMBER}}, not"
      f" {rest!r}"
    )
  elif rest:
    weights.append(1.0)
  if not any(weights):
    raise UserError(f"{path}: all weights are zero")
  return Taxonomy.from_names(
    distinct_names(names), weights=tuple(weights), unlabelled=rest is not False
  )


def read_yaml(path: str) -> dict[str, Any]:
  """Reads a YAML file whose top level is a mapping.

  Raises:
    UserError: the file cannot be read; names file and line.
  """
  try:
    content = storage.read_bytes(os.path.expanduser(path)).decode()
    content = yaml.safe_load(content)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    mark = getattr(error, "problem_mark", None)
    place = f":{mark.line + 1}" if mark else ""
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    raise UserError(f"{path}{place}: not YAML ({reason})") from error
  if not isinstance(content, dict):
    raise UserError(
      f"{path}: must hold 'key: value' lines, not {type(content).__name__}"
    )
  return content


def _check_keys(content: dict[str, Any], known: set[str], where: str) -> None:
  for key in content:
    if key not in known:
      raise UserError(
        f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}"
      )


def _name(entry: dict[str, Any], key: str, where: str) -> str:
  """Reads a name; only "coarse" may be missing or empty."""
  name = entry.get(key, "" if key == "coarse" else None)
  if isinstance(name, str) and "/" not in name and (name or key == "coarse"):
    return name
  raise UserError(f"{where}: {key!r} must be a name without '/', not {name!r}")


def _weight(entry: dict[str, Any], where: str) -> float:
  weight = entry.get("weight", 1.0)
  number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
  if not number or not 0 <= weight < math.inf:
    raise UserError(
      f"{where}: weight must be a number of at least 0, not {weight!r}"
    )
  return float(weight)
