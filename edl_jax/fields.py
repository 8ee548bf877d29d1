"""Configuration fields that say what they mean and which values they allow.

  width: int = field(128, at_least=1, help="Width of the residual stream, M.")

`config` declares its fields so. The checks of `validation`, the table that
`describe` prints and the reference page of the documentation all read the
`Rule` of a field, and need no list of their own.
"""

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags


class Weight:
  """Type of a loss weight: a number, or "auto:TARGET".

  `auto:1e-4` finds the power of ten that brings the weighted loss nearest to
  1e-4 on the first batch, and keeps it.
  """


class _WeightParser(flags.ArgumentParser):
  """Reads numbers as numbers and leaves everything else to `validation`."""

  def parse(self, argument: Any) -> Any:
    try:
      return float(argument)
    except ValueError:
      return argument


config_flags.register_flag_parser_for_type(Weight, _WeightParser())


def auto_target(weight: float | str) -> float | None:
  """Returns TARGET of the weight "auto:TARGET", None for a number."""
  if not isinstance(weight, str):
    return None
  return float(weight.removeprefix("auto:"))


@dataclasses.dataclass(frozen=True)
class Rule:
  """The meaning of a field and the values that it allows."""

  # One or two sentences, with the unit.
  help: str
  # Bounds of a number, or of every number of a tuple.
  above: float | None = None
  at_least: float | None = None
  below: float | None = None
  at_most: float | None = None
  # One more value, allowed in spite of the bounds.
  also: int | None = None
  # The only values of a text; empty if any text is allowed.
  choices: tuple[str, ...] = ()
  # Whether the field may change between a checkpoint and its continuation: it
  # alters where or how often something happens, not what is computed.
  resumable: bool = False

  @property
  def allowed(self) -> str:
    """The values in words, as "at least 1, or -1"; empty without a limit."""
    if self.choices:
      return f"one of {', '.join(self.choices)}"
    bounds = {
      "above": self.above,
      "at least": self.at_least,
      "below": self.below,
      "at most": self.at_most,
    }
    text = " and ".join(
      f"{word} {bound}" for word, bound in bounds.items() if bound is not None
    )
    return text if self.also is None else f"{text}, or {self.also}"

  def allows(self, number: float) -> bool:
    """Says whether `number` lies within the bounds."""
    return number == self.also or (
      (self.above is None or number > self.above)
      and (self.at_least is None or number >= self.at_least)
      and (self.below is None or number < self.below)
      and (self.at_most is None or number <= self.at_most)
    )


def field(default: Any, **rule: Any) -> Any:
  """Returns a dataclass field that keeps a `Rule` of these arguments."""
  return dataclasses.field(default=default, metadata={"rule": Rule(**rule)})


def rule_of(declared: dataclasses.Field) -> Rule:
  """Returns the rule of a field that was declared with `field`."""
  return declared.metadata["rule"]


def type_name(wanted: Any) -> str:
  """Returns a field's type in words, as "tuple of str"."""
  if wanted is Weight:
    return "number or auto:TARGET"
  if elements := typing.get_args(wanted):
    inner = type_name(elements[0])
    return f"tuple of {inner.replace('tuple', 'tuples', 1)}"
  return wanted.__name__


def requirement(value: Any, declared: dataclasses.Field) -> str | None:
  """Returns what `value` must be but is not, or None if the field allows it.

  The answer completes "model.width=0: must be ...".
  """
  rule, wanted = rule_of(declared), declared.type
  if wanted is Weight:
    if _is_weight(value, rule):
      return None
    return f"a number {rule.allowed}, or auto:TARGET such as auto:1e-4"
  if not _is_a(value, wanted):
    return f"of type {type_name(wanted)}"
  if rule.choices and value not in rule.choices:
    return rule.allowed
  numbers = list(_numbers(value))
  if not all(map(math.isfinite, numbers)):
    return "finite"
  if not all(map(rule.allows, numbers)):
    return f"{rule.allowed}{' throughout' * isinstance(value, tuple)}"
  return None


def nearest(key: str, known: Collection[str]) -> str:
  """Returns "did you mean ...?", or all of `known` if none resembles `key`."""

  def likeness(path: str) -> tuple[float, ...]:
    # The last name decides, because a right name may be under a wrong group.
    names = (key.rpartition(".")[-1], path.rpartition(".")[-1])
    return tuple(
      difflib.SequenceMatcher(None, *pair).ratio()
      for pair in (names, (key, path))
    )

  near = max(known, key=likeness)
  if likeness(near)[0] < 0.6:
    return f"known: {', '.join(known)}"
  return f"did you mean {near}?"


def _is_weight(value: Any, rule: Rule) -> bool:
  """Says whether `value` is a number within bounds, or auto:TARGET above 0."""
  if not isinstance(value, str):
    return _is_a(value, float) and math.isfinite(value) and rule.allows(value)
  if not value.startswith("auto:"):
    return False
  with contextlib.suppress(ValueError):
    target = auto_target(value)
    return target is not None and 0 < target < math.inf
  return False


def _is_a(value: Any, wanted: Any) -> bool:
  """Says whether `value` has the type `wanted`; an int is a float too."""
  if elements := typing.get_args(wanted):
    return isinstance(value, tuple) and all(
      _is_a(item, elements[0]) for item in value
    )
  accepted = (int, float) if wanted is float else wanted
  # bool is an int to Python, but never meant as a number here.
  is_bool = isinstance(value, bool)
  return isinstance(value, accepted) and is_bool == (wanted is bool)


def _numbers(value: Any) -> Iterator[float]:
  """Yields every number of a value, at any depth of tuples."""
  if isinstance(value, tuple):
    for item in value:
      yield from _numbers(item)
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    yield value
