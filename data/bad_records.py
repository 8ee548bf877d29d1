"""Counts bad records by file and reason."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from edl_jax.config import UserError
from edl_jax.text.readers import file_of

# Number of messages that are kept, and of files that `lines` names.
_MESSAGES, _FILES = 10, 10
# What messages quote of a record, which would make a reason of its own.
_QUOTED = re.compile(r"\b(id|domain) (?:'[^']*'|\"[^\"]*\")")


class BadRecords:
  """The bad records of a corpus, or of a part of it."""

  def __init__(self):
    """Starts without any."""
    # By file and reason.
    self._counts = Counter[tuple[str, str]]()
    # The first messages.
    self.messages: list[str] = []

  @property
  def total(self) -> int:
    """Number of bad records."""
    return self._counts.total()

  def add(self, where: str, error: UserError, file: str = "") -> None:
    """Counts a record.

    Args:
      where: the place that the error's message begins with.
      error: what is wrong.
      file: which has the record, if it is not that of the place.
    """
    message = str(error)
    reason = _reason(message.removeprefix(f"{where}: "))
    self._counts[file or file_of(where), reason] += 1
    self._tell(message)

  def _tell(self, message: str) -> None:
    if len(self.messages) < _MESSAGES and message not in self.messages:
      self.messages.append(message)

  def to_json(self) -> dict[str, Any]:
    """Returns what `merge` takes, for JSON."""
    return {"counts": self.by_file(), "messages": self.messages}

  def merge(self, saved: Mapping[str, Any]) -> None:
    """Adds what `to_json` returned for a later part."""
    for file, reasons in saved["counts"].items():
      for reason, count in reasons.items():
        self._counts[file, reason] += count
    for message in saved["messages"]:
      self._tell(message)

  def by_file(self) -> dict[str, dict[str, int]]:
    """Returns the number of records by file, then by reason, sorted."""
    found: dict[str, dict[str, int]] = {}
    for (file, reason), count in sorted(self._counts.items()):
      found.setdefault(file, {})[reason] = count
    return found


def lines(by_file: Mapping[str, Mapping[str, int]]) -> list[str]:
  """Returns what to print of `BadRecords.by_file`: a line for a file."""
  told = [
    f"{file}: "
    + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    for file, reasons in itertools.islice(by_file.items(), _FILES)
  ]
  if len(by_file) > _FILES:
    told.append(f"{len(by_file) - _FILES:,} more files: see manifest.json")
  return told


def _reason(message: str) -> str:
  """Returns what is wrong, without what differs from record to record.

  Messages may go on in parentheses or after a semicolon.
  """
  return re.split(r" \(|; ", _QUOTED.sub(r"\1", message), maxsplit=1)[0]
