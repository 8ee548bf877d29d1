"""Finds text files, and what their names and folders say about them."""

import glob
import os
import re
import urllib.parse
from pathlib import Path

from edl_jax.config import UserError

JSON_LINES = (".jsonl", ".json", ".ndjson")

# What Spark, Hive and Delta Lake write beside their data.
_FOLDERS_OF_MARKERS = ("_temporary", "_delta_log", "_spark_metadata")
# Hive writes a missing value so.
_NOTHING = "__HIVE_DEFAULT_PARTITION__"


def find_files(pattern: str, setting: str) -> tuple[str, list[str]]:
  """Returns the folder in which a glob starts, and the matching files, sorted.

  A path that exists is taken as it is, even if it holds "[", "?" or "*"; so are
  the leading folders of a glob that exist. Empty files and the markers of Spark
  and Hive, such as _SUCCESS, are left out, unless the path names one.

  Raises:
    UserError: no file matches; names the `setting` that holds the glob.
  """
  expanded = os.path.expanduser(pattern)
  if os.path.isfile(expanded):
    return os.path.dirname(expanded), [expanded]
  if os.path.isdir(expanded):
    raise UserError(
      f"{setting}={pattern}: is a folder; name its files, such as"
      f" {os.path.join(pattern, '**', '*')}"
    )
  root, rest = _existing(expanded)
  found = filter(
    os.path.isfile,
    glob.glob(os.path.join(glob.escape(root), rest), recursive=True),
  )
  paths = sorted(path for path in found if not _is_marker(path, root))
  filled = [path for path in paths if os.path.getsize(path)]
  if not paths:
    raise UserError(f"{setting}={pattern}: no such file")
  if not filled:
    raise UserError(f"{setting}={pattern}: every file is empty")
  fixed = re.split(r"[*?\[]", rest, maxsplit=1)[0]
  return os.path.dirname(os.path.join(root, fixed)), filled


def _existing(pattern: str) -> tuple[str, str]:
  """Splits a pattern after the last of its leading folders that exist."""
  root, rest = "/" * pattern.startswith("/"), pattern.lstrip("/")
  while "/" in rest:
    name, below = rest.split("/", 1)
    if not os.path.isdir(os.path.join(root, name)):
      break
    root, rest = os.path.join(root, name), below.lstrip("/")
  return root, rest


def _is_marker(path: str, root: str) -> bool:
  """Returns whether a file tells about data instead of holding some."""
  *folders, name = Path(os.path.relpath(path, root or ".")).parts
  hidden = name.startswith(("_", ".")) and not is_known(name)
  return (
    hidden
    or name.endswith(".crc")
    or any(folder in _FOLDERS_OF_MARKERS for folder in folders)
  )


def suffix_of(path: str) -> str:
  """Returns the suffix of a name in lower case, without .gz or .zst."""
  name = os.path.basename(path).lower()
  return os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1]


def is_known(path: str) -> bool:
  """Returns whether the suffix names a kind of file that holds records."""
  return suffix_of(path) in (*JSON_LINES, ".parquet", ".txt", ".md")


def domain_by_folder(path: str, root: str) -> str | None:
  """Returns the first folder below `root`, or the first two as coarse/fine."""
  folders = Path(os.path.relpath(path, root or ".")).parts[:-1]
  return "/".join(folders[:2]) or None


def partitions(path: str) -> dict[str, str | None]:
  """Returns the values that Hive's folders give, such as domain=news.

  The text and the id of a record are its own, so folders give neither.
  """
  found: dict[str, str | None] = {}
  for folder in Path(path).parts[:-1]:
    key, equals, value = folder.partition("=")
    if equals and key and key not in ("text", "id"):
      value = urllib.parse.unquote(value)
      found[key] = None if value in ("", _NOTHING) else value
  return found
