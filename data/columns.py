"""Columns of records: values inside objects, and conditions on them."""

import contextlib
import json
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from edl_jax.config import UserError
from edl_jax.text.readers import Record
from edl_jax.text.taxonomy import read_yaml

# The value of a column that a record lacks.
MISSING = object()


def column_value(record: Any, column: str) -> Any:
  """Returns the value of a column, `MISSING` if the record lacks it.

  A column may lie in objects: meta.subject. An object may be written as JSON in
  a text, as some data sets do to keep their columns flat.
  """
  if isinstance(record, str) and record[:1] == "{":
    with contextlib.suppress(ValueError, RecursionError):
      record = json.loads(record)
  if not isinstance(record, dict):
    return MISSING
  if column in record:
    return record[column]
  # A key may itself have dots, so try the longest first.
  parts = column.split(".")
  for cut in range(len(parts) - 1, 0, -1):
    if (key := ".".join(parts[:cut])) in record:
      found = column_value(record[key], ".".join(parts[cut:]))
      if found is not MISSING:
        return found
  return MISSING


def columns_in(record: Record, columns: Iterable[str]) -> set[str]:
  """Returns those of `columns` that a record has."""
  return {name for name in columns if column_value(record, name) is not MISSING}


def stored_columns(columns: Iterable[str]) -> list[str]:
  """Returns the names that columns may have in a file: all leading parts."""
  return [
    ".".join(parts[:cut])
    for parts in (name.split(".") for name in columns)
    for cut in range(1, len(parts) + 1)
  ]


# --- Conditions --------------------------------------------------------------

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
  "==": operator.eq,
  "!=": operator.ne,
}
_FORM = re.compile(r"column\s+(\S+)\s+(<=|>=|==|!=|<|>|in\s)\s*(.*\S)")


class Condition(NamedTuple):
  """What a column must be for a record to be kept."""

  column: str
  # A comparison, or "in".
  relation: str
  # Numbers for an order; one number or text for == and !=; texts for "in".
  values: tuple[float | str, ...]

  def holds(self, record: Record) -> bool:
    """Returns whether a record has the column, with a value that fits.

    A number that is written as text counts as the number.
    """
    value = column_value(record, self.column)
    if value is MISSING or value is None:
      return False
    if self.relation == "in":
      return str(value) in self.values
    (wanted,) = self.values
    if isinstance(wanted, str):
      value = str(value)
    else:
      number = _number(value)
      if number is None:
        return self.relation == "!="
      value = number
    return _COMPARISONS[self.relation](value, wanted)


def _number(value: Any) -> float | None:
  with contextlib.suppress(TypeError, ValueError):
    return float(value)
  return None


def load_conditions(path: str) -> list[Condition]:
  """Returns the conditions under `keep` in a file of rules, [] without.

  Raises:
    UserError: the file is not YAML, or a condition is wrong.
  """
  content = read_yaml(path).get("keep", [])
  entries = [content] if isinstance(content, str) else content
  if not isinstance(entries, list):
    raise UserError(f"{path}: 'keep' must be a list of conditions")
  return [
    _condition(entry, f"{path}: keep {number}")
    for number, entry in enumerate(entries, start=1)
  ]


def _condition(entry: Any, where: str) -> Condition:
  match = _FORM.fullmatch(entry.strip()) if isinstance(entry, str) else None
  if match is None:
    raise UserError(
      f"{where}: must be as 'column score >= 0.5' or 'column language in en,"
      f" zh', not {entry!r}"
    )
  column, relation, text = match.groups()
  relation = relation.strip()
  if relation == "in":
    return Condition(column, relation, tuple(map(str.strip, text.split(","))))
  number = _number(text)
  if number is None and relation not in ("==", "!="):
    raise UserError(f"{where}: {relation} needs a number, not {text!r}")
  return Condition(column, relation, (text if number is None else number,))
