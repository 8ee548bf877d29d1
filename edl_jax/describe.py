"""Every setting with its value, what it means and what it allows.

`describe` is what `python -m edl_jax.main --describe` prints for an experiment;
`reference_markdown` is the reference page of the documentation. Both are made
from the fields of `config` and import no JAX.
"""

import inspect
import itertools
import shutil
import textwrap
from typing import Any

from edl_jax import config, tables
from edl_jax.config import FIELDS, GROUPS, Experiment, UserError
from edl_jax.fields import nearest, rule_of, type_name

# Columns of a line where there is no terminal, and the least on a terminal.
_PIPED_WIDTH, _LEAST_WIDTH = 100, 80


def describe(experiment: Experiment, part: str = "") -> list[str]:
  """Returns the lines of a table of settings, as wide as the terminal.

  A star marks the values that differ from their defaults.

  Args:
    experiment: the values to show.
    part: a group such as "losses", or a key such as "losses.z_weight"; empty
      for everything.

  Raises:
    UserError: no group or key has that name; names the nearest.
  """
  keys = _keys(part)
  flat = config.flatten(experiment)
  changed = {key for key in keys if flat[key] != FIELDS[key].default}
  names = [f"{'*' * (key in changed):2}{key}" for key in keys]
  values = [_value_lines(flat[key], alone=len(keys) == 1) for key in keys]
  columns = shutil.get_terminal_size((_PIPED_WIDTH, 0)).columns
  text_width = (
    max(_LEAST_WIDTH, columns)
    - max(map(len, names))
    - max(len(line) for lines in values for line in lines)
    - len("    ")
  )
  rows, groups = [], []
  for key, name, value in zip(keys, names, values):
    text = _wrap(_explanation(key, key in changed), text_width)
    cells = list(itertools.zip_longest([name], value, text, fillvalue=""))
    rows += cells
    groups += [key.rpartition(".")[0]] * len(cells)
  lines = []
  for group, members in itertools.groupby(
    zip(groups, tables.aligned(rows, left=(0, 1, 2))), key=lambda pair: pair[0]
  ):
    if group:
      summary = (inspect.getdoc(GROUPS[group]) or "").partition("\n")[0]
      lines += ["", f"{group}: {summary}", ""]
    lines += [line for _, line in members]
  return lines + ["", "* differs from the default"] * bool(changed)


def _keys(part: str) -> list[str]:
  """Returns the keys of a part, in order."""
  keys = [
    key
    for key in FIELDS
    if not part or key == part or key.startswith(f"{part}.")
  ]
  if not keys:
    raise UserError(
      f"--describe={part}: no group or key of that name;"
      f" {nearest(part, [*GROUPS, *FIELDS])}"
    )
  return keys


def _explanation(key: str, with_default: bool) -> str:
  """Returns a field's help and what it allows, as sentences."""
  rule = rule_of(FIELDS[key])
  text = rule.help
  if rule.allowed:
    text += f" {rule.allowed[0].upper()}{rule.allowed[1:]}."
  if with_default:
    text += f" Default: {_shown(FIELDS[key].default)}."
  return text


def _shown(value: Any) -> str:
  """Returns a value as one writes it after --experiment.KEY=."""
  return value if isinstance(value, str) and value else repr(value)


def _value_lines(value: Any, *, alone: bool) -> list[str]:
  """Wraps a value; among others it is narrow, and cut after three lines."""
  lines = _wrap(_shown(value), 40 if alone else 16, break_long_words=True)
  return lines if alone or len(lines) <= 3 else [*lines[:3], "..."]


def _wrap(
  text: str, width: int, *, break_long_words: bool = False
) -> list[str]:
  return textwrap.wrap(
    text, width, break_long_words=break_long_words, break_on_hyphens=False
  )


def reference_markdown() -> str:
  """Returns a Markdown section for each group, with a table of its fields."""
  sections = [_section("Experiment", "", Experiment)]
  sections += [_section(f"`{group}`", group, GROUPS[group]) for group in GROUPS]
  return "\n\n".join(sections) + "\n"


def _section(title: str, group: str, holder: type) -> str:
  headings = ("key", "type", "default", "allowed", "meaning")
  rows = [
    _reference_row(key) for key in FIELDS if key.rpartition(".")[0] == group
  ]
  table = tables.markdown(headings, rows, left=range(len(headings)))
  return f"## {title}\n\n{inspect.getdoc(holder)}\n\n{table}"


def _reference_row(key: str) -> tuple[str, ...]:
  declared = FIELDS[key]
  rule = rule_of(declared)
  return (
    f"`{key}`",
    type_name(declared.type),
    f"`{declared.default!r}`",
    rule.allowed,
    rule.help + " May change when a run resumes." * rule.resumable,
  )
