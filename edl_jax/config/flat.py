"""An experiment in flat form: every field by its dotted path."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from edl_jax.config.groups import Experiment, UserError
from edl_jax.fields import nearest, rule_of

# The parts of an experiment, such as `losses`, by name.
GROUPS = {
  declared.name: declared.type
  for declared in dataclasses.fields(Experiment)
  if isinstance(declared.type, type) and dataclasses.is_dataclass(declared.type)
}

# Every field that can be set, by its dotted path.
FIELDS = {
  f"{group}.{declared.name}".lstrip("."): declared
  for group, holder in {"": Experiment, **GROUPS}.items()
  for declared in dataclasses.fields(holder)
  if group or declared.name not in GROUPS
}


def choose_variant(variant: str, known: tuple[str, ...] = ()) -> str:
  """Returns the variant of an experiment file; the first of `known` if empty.

  Raises:
    UserError: no such variant, or the file has none.
  """
  if variant and variant not in known:
    allowed = f"must be one of {', '.join(known)}" if known else "leave it out"
    raise UserError(f"variant {variant!r}: {allowed}")
  return variant or next(iter(known), "")


def choices(key: str) -> tuple[str, ...]:
  """Returns the values that the field `key` may take, such as "model.remat"."""
  return rule_of(FIELDS[key]).choices


def flatten(experiment: Experiment) -> dict[str, Any]:
  """Returns every leaf of `experiment` by its dotted path, in field order."""
  return {key: operator.attrgetter(key)(experiment) for key in FIELDS}


def unflatten(flat: Mapping[str, Any]) -> Experiment:
  """Inverse of `flatten`; lists (as JSON gives them) become tuples.

  Keys that are missing keep their defaults, so that a newer version reads the
  checkpoints of an older one.

  Raises:
    UserError: a key does not exist in this version.
  """
  experiment = Experiment()
  for key, value in flat.items():
    check_key(key)
    group, _, name = key.rpartition(".")
    holder = getattr(experiment, group) if group else experiment
    setattr(holder, name, _as_tuples(value))
  return experiment


def _as_tuples(value: Any) -> Any:
  """Turns lists into tuples, at any depth."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_as_tuples, value))
  return value


def check_key(key: str) -> None:
  """Raises UserError, naming the nearest right key, unless `key` exists."""
  if key in GROUPS:
    raise UserError(
      f"experiment.{key} is a group: set one of its fields, which"
      f" --describe={key} lists"
    )
  if key not in FIELDS:
    raise UserError(f"unknown key experiment.{key}; {nearest(key, FIELDS)}")


def differing_keys(
  saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
  """Lists `key: saved -> current` for keys that forbid resuming."""

  # Fields that an older version did not have take their defaults.
  saved = {**flatten(Experiment()), **saved}
  differing = []
  for key in dict.fromkeys([*current, *saved]):
    before, now = (_as_tuples(flat.get(key)) for flat in (saved, current))
    may_change = key in FIELDS and rule_of(FIELDS[key]).resumable
    if before != now and not may_change:
      differing.append(f"{key}: {before!r} -> {now!r}")
  return differing
