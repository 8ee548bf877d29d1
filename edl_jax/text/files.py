"""Finds text files, and what their names and folders say about them."""

import glob
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from edl_jax import storage
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
  and Hive, such as _SUCCESS, are left out, unless the path names one. A glob in
  a bucket, gs://BUCKET/..., matches its objects.

  Raises:
    UserError: no file matches, or a bucket cannot be read; names the `setting`
      that holds the glob.
  """
  if storage.in_bucket(pattern):
    return _find_objects(pattern, setting)
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
  start = os.path.dirname(os.path.join(root, _fixed(rest)))
  sizes = {path: os.path.getsize(path) for path in found}
  return start, _filled(sizes, root, f"{setting}={pattern}")


def _find_objects(pattern: str, setting: str) -> tuple[str, list[str]]:
  storage.check_access(pattern, f"{setting}=")
  try:
    sizes = dict(storage.find(pattern))
  except OSError as error:
    raise UserError(
      f"{setting}={pattern}: {error.strerror or error}"
    ) from error
  root = os.path.dirname(pattern if pattern in sizes else _fixed(pattern))
  return root, _filled(sizes, root, f"{setting}={pattern}")


def _fixed(pattern: str) -> str:
  """Returns the part of a pattern before its first special character."""
  return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def _filled(sizes: Mapping[str, int], root: str, given: str) -> list[str]:
  """Returns the files that hold something, of those that are no markers."""
  paths = sorted(path for path in sizes if not _is_marker(path, root))
  filled = [path for path in paths if sizes[path]]
  if not paths:
    raise UserError(f"{given}: no such file")
  if not filled:
    raise UserError(f"{given}: every file is empty")
  return filled


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
