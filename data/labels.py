"""Labels the domains of text by rules that a YAML file lists.

  python -m data.labels --files="dump/*.jsonl" --rules=rules.yaml

prints how many documents and bytes each label gets, and with what confidence.
`python -m data.prepare --labels=rules.yaml` uses the same file. With
--out=FILE, FILE gets the records with their labels, which is the way for
supervised examples, as these are not prepared. Rules are tried
in order, and the first that finds a label decides:

  rules:
    - {by: column, column: subject, labels: {cs: code/papers, hist: history}}
    - {by: url, labels: {arxiv.org: papers, .gov: law}}   # column: url
    - {by: path, labels: {"*.py": python, "*/docs/*": prose}}  # column: path
    - {by: language, labels: {en: english, zh: chinese}, at_least: 0.8}
    - {by: file_type, labels: {python: python}}           # needs magika
    - {by: topic, model: topics, at_least: 0.6}           # from data.topics
    - by: both                                            # english/english_law
      coarse: {by: language, labels: {en: english, zh: chinese}}
      fine: {by: topic, model: topics}

`labels` maps what a rule found to a label; a rule finds no label for anything
that `labels` lacks. Without `labels`, what the rule found is the label. A label
is "fine" or "coarse/fine". A document for which no rule finds a label is
unlabelled. A dot in the name of a column leads into an object: meta.subject.

Conditions leave documents out before any rule is tried; all must hold, and a
document without the column is left out. Without `rules`, the label is the key
"domain":

  keep:
    - column score >= 0.5                  # <, <=, >, >=, ==, !=
    - column language in en, zh
"""

import collections
import contextlib
import fnmatch
import json
import os
import sys
import urllib.parse
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Sequence,
)
from typing import Any, NamedTuple

from data.columns import (
  MISSING,
  column_value,
  columns_in,
  load_conditions,
  stored_columns,
)
from edl_jax import tables
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text.examples import is_example
from edl_jax.text.files import find_files
from edl_jax.text.readers import Record, read_records
from edl_jax.text.streams import need_package
from edl_jax.text.taxonomy import UNLABELLED, read_yaml

COMMAND = Command(__doc__)
_FILES = COMMAND.flag("files", "", "Glob of the files to label.", required=True)
_RULES = COMMAND.flag("rules", "", "File of rules.", required=True)
_OUT = COMMAND.flag(
  "out", "", "New file of JSON lines: the records, the label as their domain."
)

# A model examines only these first characters of a text: enough, and cheap.
EXAMINED_CHARACTERS = 1000

# Languages of py3langid that users call by another name.
_LANGUAGES = {"wuu": "zh"}


class Label(NamedTuple):
  """A domain label, and the confidence of its rule, in [0, 1]."""

  name: str
  confidence: float = 1.0


# A rule returns None for a record whose label it cannot find.
Rule = Callable[[Record], Label | None]


def first_of(rules: Sequence[Rule]) -> Rule:
  """Returns the rule that tries `rules` in order until one finds a label."""

  def rule(record: Record) -> Label | None:
    return next(
      (label for each in rules if (label := each(record)) is not None), None
    )

  return rule


def both(coarse: Rule, fine: Rule) -> Rule:
  """Returns the rule that labels "coarse/coarse_fine" by two rules.

  The fine name includes the coarse one, because a fine label has one parent.
  """

  def rule(record: Record) -> Label | None:
    above, below = coarse(record), fine(record)
    if above is None or below is None:
      return None
    name = f"{above.name}/{above.name}_{below.name}"
    return Label(name, above.confidence * below.confidence)

  return rule


def _text(record: Record, column: str) -> str:
  """Returns the text of a column, "" where there is none."""
  value = column_value(record, column)
  return "" if value is MISSING or value is None else str(value)


def by_column(column: str) -> Rule:
  """Returns the rule whose label is the value of a metadata column."""

  def rule(record: Record) -> Label | None:
    value = _text(record, column)
    return Label(value) if value else None

  return rule


def by_url(labels: dict[str, str], column: str = "url") -> Rule:
  """Returns the rule that looks up the host of a URL.

  A host or a suffix, such as "arxiv.org" or ".gov", matches every host below it
  too. The longest match decides.
  """
  by_suffix = {suffix.lstrip("."): name for suffix, name in labels.items()}

  def rule(record: Record) -> Label | None:
    address = _text(record, column)
    try:
      host = urllib.parse.urlsplit(
        address if "//" in address else f"//{address}"
      ).hostname
    except ValueError:  # Such as "http://[".
      return None
    parts = (host or "").split(".")
    for start in range(len(parts)):
      if name := by_suffix.get(".".join(parts[start:])):
        return Label(name)
    return None

  return rule


def by_path(labels: dict[str, str], column: str = "path") -> Rule:
  """Returns the rule that matches a path with patterns, in order.

  A "*" matches slashes too, so "*.py" matches the extension in any folder.
  """

  def rule(record: Record) -> Label | None:
    path = _text(record, column)
    for pattern, name in labels.items():
      if fnmatch.fnmatchcase(path, pattern):
        return Label(name)
    return None

  return rule


def by_language() -> Rule:
  """Returns the rule that names the text's language: "en", "zh", ...

  py3langid identifies it offline; the confidence is its probability.
  """
  module = need_package("py3langid.langid", "labelling by language")
  identifier = module.LanguageIdentifier.from_model_file(
    module.MODEL_FILE, norm_probs=True
  )

  def rule(record: Record) -> Label | None:
    shares = collections.Counter[str]()
    for name, share in identifier.rank(record["text"][:EXAMINED_CHARACTERS]):
      language: str = _LANGUAGES.get(name) or name
      shares[language] += share
    return Label(*shares.most_common(1)[0])

  return rule


def by_file_type() -> Rule:
  """Returns the rule that names the type of file that magika finds."""
  try:
    magika = need_package("magika", "labelling by file type").Magika()
  except UserError as error:
    raise UserError(
      "labelling by file type needs the package magika: pip install magika"
    ) from error

  def rule(record: Record) -> Label | None:
    found = magika.identify_bytes(record["text"].encode())
    return Label(str(found.output.label), float(found.score))

  return rule


def by_topic(model: str) -> Rule:
  """Returns the rule that applies a classifier of `data.topics`."""
  from data.topics import TopicClassifier

  classifier = TopicClassifier.load(model)

  def rule(record: Record) -> Label | None:
    return Label(*classifier.classify(record["text"]))

  return rule


def translated(
  rule: Rule, labels: dict[str, str] | None, at_least: float = 0.0
) -> Rule:
  """Returns a rule that maps the labels of `rule` by `labels`, if given.

  It finds no label where `labels` lacks the name, or where the confidence is
  below `at_least`.
  """

  def outer(record: Record) -> Label | None:
    label = rule(record)
    if label is None or label.confidence < at_least:
      return None
    if labels is None:
      return label
    name = labels.get(label.name)
    return None if name is None else label._replace(name=name)

  return outer


# --- The file of rules -------------------------------------------------------

# Keys of each kind of rule besides "by".
_KEYS = {
  "column": {"column", "labels"},
  "url": {"column", "labels"},
  "path": {"column", "labels"},
  "language": {"labels", "at_least"},
  "file_type": {"labels", "at_least"},
  "topic": {"labels", "at_least", "model"},
  "both": {"coarse", "fine"},
}
_REQUIRED = {
  "column": "column",
  "url": "labels",
  "path": "labels",
  "topic": "model",
  "both": "fine",
}


def load_rules(path: str) -> Rule:
  """Reads a file of rules, as this module's docstring shows them.

  Paths of models are relative to the file.

  Raises:
    UserError: a rule is wrong, or its package is missing; names file and rule.
  """
  content = read_yaml(path)
  if list(content) == ["keep"]:
    return by_column("domain")
  rules = content.get("rules")
  if not {"rules"} <= set(content) <= {"keep", "rules"} or not (
    isinstance(rules, list) and rules
  ):
    raise UserError(
      f"{path}: must hold a list under 'rules', conditions under 'keep', and"
      " nothing else"
    )
  folder = os.path.dirname(path)
  return first_of(
    [
      _rule(entry, f"{path}: rule {number}", folder)
      for number, entry in enumerate(rules, start=1)
    ]
  )


def _rule(entry: Any, where: str, folder: str) -> Rule:
  if not isinstance(entry, dict) or entry.get("by") not in _KEYS:
    raise UserError(
      f"{where}: 'by' must be one of {', '.join(_KEYS)}; the rule is {entry!r}"
    )
  kind = entry["by"]
  for key in entry:
    if key not in _KEYS[kind] | {"by"}:
      raise UserError(
        f"{where}: unknown key {key!r}; by {kind} knows"
        f" {', '.join(sorted(_KEYS[kind]))}"
      )
  if kind in _REQUIRED and entry.get(_REQUIRED[kind]) is None:
    raise UserError(f"{where}: by {kind} needs {_REQUIRED[kind]!r}")
  if kind == "both":
    parts = (
      _rule(entry.get(part), f"{where}, {part}", folder)
      for part in ("coarse", "fine")
    )
    return both(*parts)
  labels, at_least = entry.get("labels"), entry.get("at_least", 0.5)
  if labels is not None:
    if not isinstance(labels, dict) or not labels:
      raise UserError(f"{where}: 'labels' must be {{found: label, ...}}")
    # YAML reads no as a boolean and 3 as an integer.
    labels = {str(found): str(name) for found, name in labels.items()}
  if isinstance(at_least, bool) or not isinstance(at_least, (int, float)):
    raise UserError(f"{where}: at_least must be a number, not {at_least!r}")
  if kind in ("url", "path"):
    make = by_url if kind == "url" else by_path
    return make(labels or {}, str(entry.get("column", kind)))
  if kind == "column":
    return translated(by_column(str(entry["column"])), labels)
  if kind == "language":
    return translated(by_language(), labels, at_least)
  if kind == "file_type":
    return translated(by_file_type(), labels, at_least)
  model = os.path.join(folder, str(entry["model"]))
  return translated(by_topic(model), labels, at_least)


def rule_columns(path: str) -> list[str]:
  """Returns the columns that a file of rules reads, in order.

  Raises:
    UserError: the file is not YAML, or a condition is wrong.
  """
  entries = read_yaml(path).get("rules")
  found = [condition.column for condition in load_conditions(path)]
  waiting = list(entries) if isinstance(entries, list) else []
  while waiting:
    entry = waiting.pop(0)
    if not isinstance(entry, dict):
      continue
    kind = entry.get("by")
    if kind == "column" and entry.get("column"):
      found.append(str(entry["column"]))
    elif kind in ("url", "path"):
      found.append(str(entry.get("column", kind)))
    elif kind == "both":
      waiting[:0] = [entry.get("coarse"), entry.get("fine")]
  return list(dict.fromkeys(found))


def check_columns(path: str, missing: Collection[str]) -> None:
  """Raises UserError if there are columns of rules that no record has."""
  if missing:
    raise UserError(
      f"{path}: no record has the column {', '.join(sorted(missing))}; give the"
      " name of a key, or of one in an object as meta.subject"
    )


# --- The report --------------------------------------------------------------


class LabelReport:
  """Documents, bytes and mean confidence by label."""

  def __init__(self):
    self._sums = collections.defaultdict[str, list[float]](lambda: [0, 0, 0.0])

  def add(self, name: str, size: int, confidence: float) -> None:
    """Counts a document of `size` bytes."""
    sums = self._sums[name]
    sums[0] += 1
    sums[1] += size
    sums[2] += confidence

  def merge(self, rows: Iterable[dict[str, Any]]) -> None:
    """Adds the `rows` of another report."""
    for row in rows:
      sums = self._sums[row["label"]]
      sums[0] += row["documents"]
      sums[1] += row["bytes"]
      sums[2] += row["confidence"] * row["documents"]

  def rows(self) -> list[dict[str, Any]]:
    """Returns a dict for each label, in order of the names, for JSON."""
    return [
      {
        "label": name,
        "documents": documents,
        "bytes": size,
        "confidence": total / documents,
      }
      for name, (documents, size, total) in sorted(self._sums.items())
    ]

  def lines(self) -> list[str]:
    """Returns the report as a table of text."""
    rows = [
      (
        row["label"],
        f"{row['documents']:,}",
        f"{row['bytes']:,}",
        f"{row['confidence']:.3f}",
      )
      for row in self.rows()
    ]
    return tables.aligned(
      [("label", "documents", "bytes", "confidence"), *rows]
    )


@contextlib.contextmanager
def _writer(path: str) -> Iterator[Callable[[Record, str | None], None]]:
  """Yields what writes a record with its label; for the path "", nothing.

  The file is there once the block has ended without an error.

  Raises:
    UserError: the file cannot be written.
  """
  if not path:
    yield lambda record, label: None
    return
  partial = f"{path}.partial"
  try:
    with open(partial, "w", encoding="utf-8") as file:

      def write(record: Record, label: str | None) -> None:
        # An example has a text only since it was read.
        added = {"path", "text"} if is_example(record) else {"path"}
        kept = {k: v for k, v in record.items() if k not in added}
        line = json.dumps(
          kept | {"domain": label}, ensure_ascii=False, default=str
        )
        file.write(f"{line}\n")

      yield write
    os.rename(partial, path)
  except OSError as error:
    raise UserError(f"--out={path}: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)


@COMMAND.main
def main() -> None:
  """Prints how many documents and bytes each label gets."""
  rule, report = load_rules(_RULES.value), LabelReport()
  root, paths = find_files(_FILES.value, "--files")
  columns = rule_columns(_RULES.value)
  conditions, dropped = load_conditions(_RULES.value), 0
  missing = set(columns)
  if os.path.lexists(_OUT.value):
    raise UserError(f"--out={_OUT.value} exists; name a new file")
  with _writer(_OUT.value) as write:
    for path in paths:
      for _, record in read_records(
        path, root, stored_columns(columns), examples=True
      ):
        if isinstance(record, UserError):
          raise record
        missing -= columns_in(record, missing)
        if not all(condition.holds(record) for condition in conditions):
          dropped += 1
          continue
        name, confidence = rule(record) or (UNLABELLED, 0.0)
        report.add(name, len(record["text"].encode()), confidence)
        write(record, None if name == UNLABELLED else name)
    check_columns(_RULES.value, missing)
  print("\n".join(report.lines()))
  if conditions:
    print(f"left out by 'keep': {dropped:,} documents")


if __name__ == "__main__":
  sys.exit(main())
