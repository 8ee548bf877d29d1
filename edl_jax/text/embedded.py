"""The embedded mixture `python_install`: text that every machine has.

It needs no download. The place where a text was found decides its domain, never
the text itself.
"""

import ast
import collections
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from edl_jax.config import DataConfig, UserError
from edl_jax.text.arithmetic import worked_problems
from edl_jax.text.documents import Document, DomainNames, Gatherer
from edl_jax.text.taxonomy import fine_name

# Readers yield (origin, text).
_Texts = Iterator[tuple[str, str]]

# Folders that do not belong to the library itself. pydoc_data holds prose in a
# Python file, which belongs to the documentation.
_SKIPPED_FOLDERS = frozenset(
  {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
  }
)


_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_HEADERS = Path(sysconfig.get_path("include"))

# The packages of requirements.txt; `_find_in_packages` adds what they require.
_REQUIRED = (
  "jax",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "absl-py",
  "ml_collections",
  "tokenizers",
  "tensorboardx",
  "matplotlib",
)


_PYTHON_FILE = re.compile(r"\.py$")
_HEADER_FILE = re.compile(r"\.(h|hh|hpp)$")
_LEGAL_FILE = re.compile(
  r"^(licen[cs]e|copying|copyright|notice|third.?party.?notices?)"
  r"(?!.*\.(py|pyc|pyi|so|json|html|js|css)$)",
  re.IGNORECASE,
)

_CODE_POINTS_PER_TABLE = 64


def read_embedded(
  data: DataConfig, domains: DomainNames, gathered: Gatherer
) -> None:
  """Adds the embedded mixture's texts of the declared domains, or all.

  Raises:
    UserError: a declared domain is not in the mixture.
  """
  name_of = {fine_name(name): name for name in _EMBEDDED}
  wanted = domains.declared or name_of
  for fine in wanted:
    if fine not in name_of:
      raise UserError(
        f"{domains.setting}: the embedded mixture has no domain {fine!r}; it"
        f" has {', '.join(_EMBEDDED)}"
      )
  # Where the limit is small, one huge file must not be a whole domain.
  longest = -(-data.max_characters_per_domain // 16)
  for fine, name in name_of.items():
    if fine not in wanted:
      continue
    domains.add(name, "embedded")
    for origin, text in _EMBEDDED[name]():
      gathered.add(Document(text[:longest], fine, origin))
      if not gathered.has_room(fine):
        break


def _by_hash(origin: str) -> bytes:
  """Returns a sort key that is independent of what the text is about.

  It is also independent of the split, which hashes origins without the prefix.
  A small limit keeps the first files of this order alone, and these must not be
  the held-out ones.
  """
  return hashlib.sha256(f"order {origin}".encode(errors="replace")).digest()


def _find(name: str, root: Path, pattern: re.Pattern[str]) -> dict[str, Path]:
  """Returns the files under `root` that match, by `name`/relative path."""
  found = {}
  for folder, folders, files in os.walk(root):
    folders[:] = [inner for inner in folders if inner not in _SKIPPED_FOLDERS]
    for file in files:
      if pattern.search(file):
        path = Path(folder, file)
        found[f"{name}/{path.relative_to(root).as_posix()}"] = path
  return found


def _find_in_packages(pattern: re.Pattern[str]) -> dict[str, Path]:
  """Returns the matching files of all packages that this library requires.

  It leaves out other installed packages: installing one between two starts of a
  run would change the run's text.
  """
  found: dict[str, Path] = {}
  waiting: list[str] = list(_REQUIRED)
  known = set(waiting)
  while waiting:
    name = waiting.pop()
    try:
      distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # Another platform or an extra requires it.
    for path in distribution.files or ():
      inner = _SKIPPED_FOLDERS.intersection(path.parts)
      if pattern.search(path.name) and not inner:
        found[f"packages/{path.as_posix()}"] = Path(path.locate())
    for requirement in map(Requirement, distribution.requires or ()):
      needed, marker = requirement.name.lower(), requirement.marker
      # Markers leave out extras, and what other platforms require.
      applies = marker is None or marker.evaluate({"extra": ""})
      if applies and needed not in known:
        known.add(needed)
        waiting.append(needed)
  return found


def _read(files: dict[str, Path]) -> _Texts:
  """Yields the readable files in the order of their hash."""
  for origin in sorted(files, key=_by_hash):
    try:
      yield origin, files[origin].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
      continue


def _python_source() -> _Texts:
  """Yields the standard library, without its tests."""
  return _read(_find("python", _STANDARD_LIBRARY, _PYTHON_FILE))


def _c_headers() -> _Texts:
  """Yields C and C++ headers of the interpreter and of required packages."""
  return _read(
    _find("include", _HEADERS, _HEADER_FILE) | _find_in_packages(_HEADER_FILE)
  )


def _documentation() -> _Texts:
  """Yields the topics of `help()`, and each module's docstrings as one text.

  The origin of docstrings is the module's file, which python_source shares.
  """
  files = _find("python", _STANDARD_LIBRARY, _PYTHON_FILE)
  for package in ("numpy", "jax"):
    found = importlib.util.find_spec(package)
    if found and found.origin:
      files |= _find(package, Path(found.origin).parent, _PYTHON_FILE)
  topics = _reference_topics()
  for name in sorted(topics):
    yield f"pydoc_data/topics/{name}", topics[name]
  for origin, source in _read(files):
    text = _docstrings(origin, source)
    if text:
      yield origin, text


def _reference_topics() -> Mapping[str, str]:
  try:
    from pydoc_data.topics import topics
  except ImportError:  # Minimal Python packages of Linux systems omit it.
    return {}
  return topics


# The nodes of a syntax tree that may have a docstring.
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(origin: str, source: str) -> str:
  """Returns a module's docstrings, each under its dotted name.

  It parses the source; nothing is imported.
  """
  if '"""' not in source:
    return ""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      module = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError):
    return ""
  name = origin.removeprefix("python/").removesuffix(".py").replace("/", ".")
  sections = []
  definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

  def visit(node: _Documented, name: str) -> None:
    docstring = ast.get_docstring(node)
    if docstring:
      sections.append(f"{name}\n\n{docstring}\n")
    for inner in node.body:
      if isinstance(inner, definitions):
        visit(inner, f"{name}.{inner.name}")

  visit(module, name.removesuffix(".__init__"))
  # An escape in a docstring can spell half a surrogate pair.
  return "\n".join(sections).encode(errors="replace").decode()


def _legal() -> _Texts:
  """Yields licences and notices of the interpreter and of required packages.

  Most are copies of a few texts that differ in the copyright line. The origin
  is the text without that line, so that all copies of a licence are on the
  same side of the split.
  """
  files = _find_in_packages(_LEGAL_FILE)
  files["python/LICENSE.txt"] = _STANDARD_LIBRARY / "LICENSE.txt"
  for _, text in _read(files):
    lines = text.lower().splitlines()
    lines = [line for line in lines if "copyright (c)" not in line]
    yield "legal/" + " ".join(re.findall(r"[a-z]+", " ".join(lines))), text


def _unicode() -> _Texts:
  """Yields tables of the Unicode character database, tab-separated.

  It leaves out characters whose name follows from their code by a rule (Han,
  Hangul, Tangut): they would be most of the text.
  """
  rows = collections.defaultdict[int, list[str]](list)
  for code in range(0x110000):
    character = chr(code)
    name = unicodedata.name(character, "")
    if (
      name
      and not name.startswith("HANGUL SYLLABLE")
      and not name.endswith(f"-{code:04X}")
    ):
      row = (
        f"U+{code:04X}",
        character if character.isprintable() else "",
        unicodedata.category(character),
        unicodedata.bidirectional(character),
        unicodedata.decomposition(character),
        str(unicodedata.numeric(character, "")),
        name,
      )
      rows[code // _CODE_POINTS_PER_TABLE].append("\t".join(row))
  header = "code\tcharacter\tcategory\tdirection\tdecomposition\tvalue\tname"
  tables = {f"unicode/{number}": lines for number, lines in rows.items()}
  for origin in sorted(tables, key=_by_hash):
    yield origin, "\n".join([header, *tables[origin], ""])


def _arithmetic() -> _Texts:
  """Yields worked arithmetic and algebra, generated without end."""
  for number, text in enumerate(worked_problems()):
    yield f"arithmetic/{number}", text


_EMBEDDED: dict[str, Callable[[], _Texts]] = {
  "code/python_source": _python_source,
  "code/c_headers": _c_headers,
  "prose/documentation": _documentation,
  "prose/legal": _legal,
  "tables/unicode": _unicode,
  "math/arithmetic": _arithmetic,
}
