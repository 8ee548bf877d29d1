"""Tokenizes text once, into files that training maps into memory.

  python -m data.prepare --files="text/*.jsonl.gz" --taxonomy=taxonomy.yaml \\
    --tokenizer=bpe:8192 --out=prepared

An experiment with `data.prepared="prepared"` then trains on the same rows as
one that reads the files themselves. Domains come from the key "domain" of each
record, or from the rules of --labels (see data/labels.py). Started again after
an interruption, the same command resumes; once it has finished, it verifies
checksums. The folder is complete once it holds manifest.json.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data import bad_records, chunks
from data.beam import BeamEngine, load_beam
from data.engines import Engine, LocalEngine
from data.labels import LabelReport, rule_columns, stored_columns
from data.near import Near
from data.plan import Plan, make_plan
from data.runs import Text
from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import DataConfig, UserError
from edl_jax.progress import shown
from edl_jax.text.files import find_files
from edl_jax.text.flat_encoder import has_fastokens
from edl_jax.text.mixture import content_hash
from edl_jax.text.prepared import (
  DOCUMENT,
  DOCUMENTS,
  MANIFEST,
  TOKENIZER,
  check_files,
  checksum,
  read_manifest,
  tokens_name,
)
from edl_jax.text.tokenizer import (
  Tokenizer,
  byte_tokenizer,
  open_tokenizer,
  train_tokenizer,
  training_characters,
)
from edl_jax.text.tokenizer_files import tokenizer_file

COMMAND = Command(__doc__)
_FILES = COMMAND.flag("files", "", "Glob, as data.files.", required=True)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)
_TOKENIZER = COMMAND.flag(
  "tokenizer", "", "bpe:SIZE, byte, or the path of a tokenizer.", required=True
)
_TAXONOMY = COMMAND.flag("taxonomy", "", "Taxonomy file, as data.taxonomy.")
_LABELS = COMMAND.flag("labels", "", "File of rules that label the records.")
_HELD_OUT_FRACTION = COMMAND.flag(
  "held_out_fraction",
  DataConfig.held_out_fraction,
  "Share of each domain's documents that is held out.",
  between=(0, 1),
)
_MAX_CHARACTERS = COMMAND.flag(
  "max_characters_per_domain",
  None,
  "Most characters to keep of each domain. No limit without it.",
  kind=int,
  minimum=1,
)
_SKIP_BAD = COMMAND.flag(
  "skip_bad", False, "Leave out records that are wrong; do not stop at them."
)
_NEAR = COMMAND.flag(
  "near_duplicates",
  None,
  "Leave out texts at least so similar to an earlier one, such as 0.8.",
  kind=float,
  between=(0, 1),
)
_SHINGLE = COMMAND.flag(
  "near_shingle", 5, "Words of the runs that similarity compares.", minimum=1
)
_PERMUTATIONS = COMMAND.flag(
  "near_permutations", 128, "Hashes that estimate similarity.", minimum=16
)
_RUNNER = COMMAND.flag(
  "runner",
  "local",
  "local: processes of this machine. DirectRunner, DataflowRunner, FlinkRunner,"
  " SparkRunner: Apache Beam's, which share the work among machines.",
)
_BEAM = COMMAND.flag(
  "beam", [], "Argument for Beam, without its dashes; may be repeated."
)
_WORKERS = COMMAND.flag(
  "workers", os.cpu_count() or 1, "Processes that share the work.", minimum=1
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What to prepare and how; see the flags."""

  files: str
  out: str
  # "bpe:SIZE", "byte", or the path of a tokenizer.
  tokenizer: str
  taxonomy: str = ""
  labels: str = ""
  held_out_fraction: float = DataConfig.held_out_fraction
  # None: no limit.
  max_characters_per_domain: int | None = None
  skip_bad: bool = False
  # None: near duplicates stay. Else see `near.Near`.
  near_duplicates: float | None = None
  near_shingle: int = 5
  near_permutations: int = 128
  workers: int = 1
  # "local" for processes of this machine, or a runner of Apache Beam.
  runner: str = "local"
  # Arguments for Beam, without the dashes.
  beam: tuple[str, ...] = ()
  # Size of the chunks in which text is processed and written.
  chunk_characters: int = 4_000_000

  @property
  def near(self) -> Near | None:
    """Which near duplicates to leave out, if any."""
    if self.near_duplicates is None:
      return None
    return Near(self.near_duplicates, self.near_shingle, self.near_permutations)

  def settings(self, paths: Sequence[str]) -> dict[str, Any]:
    """Returns everything that the result depends on, for JSON."""
    settings = dataclasses.asdict(self)
    for key in ("out", "workers", "runner", "beam"):
      del settings[key]
    if self.near is None:
      for key in ("near_duplicates", "near_shingle", "near_permutations"):
        del settings[key]
    for key in ("taxonomy", "labels", "tokenizer"):
      path = settings[key]
      if key == "tokenizer" and os.path.isdir(path):
        path = tokenizer_file(path)
      # A name is no file; what is missing is reported where it is used.
      with contextlib.suppress(OSError):
        settings[f"content of {key}"] = checksum(path)["sha256"]
    inputs = hashlib.sha256()
    for path, state in zip(paths, storage.states(paths)):
      inputs.update(os.fsencode(path))
      inputs.update(f"\n{state.size} {state.version}\n".encode())
    return settings | {"input files": len(paths), "inputs": inputs.hexdigest()}


def prepare(options: Options) -> dict[str, Any]:
  """Prepares a folder, or the part of it that is missing; returns its manifest.

  Raises:
    UserError: the text or an option is wrong, the folder has other options or
      cannot be written. A later call resumes from the finished chunks.
  """
  if options.near:
    options.near.new_index()
  storage.check_access(options.out, "--out=")
  if options.runner != "local":
    _check_paths(options)
    load_beam(options.runner, options.beam)
  root, paths = find_files(options.files, "--files")
  settings = options.settings(paths)
  manifest = read_manifest(options.out)
  if manifest is not None:
    _check_same(options.out, manifest["settings"], settings)
    check_files(options.out, manifest, content=True)
    epath.Path(options.out, "work").rmtree(missing_ok=True)
    return manifest
  try:
    with _opened(options.out, settings):
      return _Preparation(options, root, paths).run(settings)
  except OSError as error:
    raise UserError(
      f"cannot write to --out={options.out}: {error.strerror or error}; once it"
      " can, start the same command again to resume"
    ) from error


def _check_paths(options: Options) -> None:
  """Checks that the machines of Dataflow, which share no disk, see the files.

  Raises:
    UserError: they do not.
  """
  if options.runner != "DataflowRunner":
    return
  for name in ("files", "labels", "out"):
    path = getattr(options, name)
    if path and not storage.in_bucket(path):
      raise UserError(
        f"--{name}={path}: DataflowRunner needs it in a bucket, as"
        " gs://BUCKET/..."
      )


def _check_same(
  out: str, saved: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
  different = [
    f"{key}: {saved.get(key)!r} -> {settings.get(key)!r}"
    for key in {**saved, **settings}
    if saved.get(key) != settings.get(key)
  ]
  if different:
    raise UserError(
      f"--out={out} was prepared with other settings ({'; '.join(different)});"
      " choose another folder or delete this one"
    )


@contextlib.contextmanager
def _opened(out: str, settings: Mapping[str, Any]) -> Iterator[None]:
  """Creates the folder, or checks its settings; locks it for the block."""
  work = epath.Path(out, "work")
  path = work / "settings.json"
  if path.exists():
    _check_same(out, json.loads(storage.read_bytes(path)), settings)
  elif storage.names(out) - {"work"}:
    raise UserError(
      f"--out={out} holds other files; choose an empty or a new folder"
    )
  storage.make_folder(os.fspath(work))
  with _locked(out):
    storage.write_json(path, settings)
    yield


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
  """Keeps other processes out of a folder; a bucket has no locks."""
  if storage.in_bucket(out):
    yield
    return
  with open(os.path.join(out, "work", "lock"), "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"--out={out}: another process is writing it") from error
    yield


class _Preparation:
  """Scan, plan, encode, finish: four steps that skip what earlier runs did."""

  def __init__(self, options: Options, root: str, paths: Sequence[str]):
    self._options, self._out = options, epath.Path(options.out)
    columns = (
      stored_columns(rule_columns(options.labels)) if options.labels else []
    )
    self._text = Text(
      root, tuple(paths), tuple(columns), options.chunk_characters
    )

  def run(self, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the four steps; returns the manifest."""
    options = self._options
    arguments = (
      options.out,
      options.labels,
      options.skip_bad,
      options.near,
    )
    if options.runner != "local":
      context = BeamEngine(self._text, options.runner, options.beam, *arguments)
    else:
      context = LocalEngine(self._text, options.workers, *arguments)
    with context as engine:
      count = engine.scan()
      plan = make_plan(
        chunks.in_threads(engine.read_scan, shown("choosing", range(count))),
        DataConfig(
          files=options.files,
          taxonomy=options.taxonomy,
          held_out_fraction=options.held_out_fraction,
          max_characters_per_domain=options.max_characters_per_domain
          or sys.maxsize,
        ),
        skip_bad=options.skip_bad,
        rules=options.labels,
        near=options.near,
      )
      tokenizer = self._tokenizer(plan, engine)
      if not has_fastokens():
        print(
          "tokenizing takes four times as long without fastokens: pip install"
          " -r requirements-data.txt",
          file=sys.stderr,
        )
      engine.encode(plan)
    return self._finish(plan, tokenizer, settings)

  def _tokenizer(self, plan: Plan, engine: Engine) -> Tokenizer:
    """Returns the tokenizer, and writes tokenizer.json if it is missing."""
    kind, path = self._options.tokenizer, self._out / TOKENIZER
    if path.exists():
      return Tokenizer.from_json(storage.read_bytes(path).decode())
    if kind == "byte":
      tokenizer = byte_tokenizer()
    elif kind.startswith("bpe:"):
      print("training the tokenizer", file=sys.stderr)
      size = int(kind[4:])
      sample = engine.sample(plan, training_characters(size))
      tokenizer = train_tokenizer(sample, size)
    else:
      tokenizer = open_tokenizer(kind)
    storage.write_bytes(path, tokenizer.to_json().encode())
    return tokenizer

  def _finish(
    self, plan: Plan, tokenizer: Tokenizer, settings: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Writes the index and, last, the manifest."""
    parts, digests, files = [np.zeros(0, DOCUMENT)], [], {}
    numbers = range(len(plan.begin) - 1)
    for number, (arrays, found) in enumerate(
      chunks.in_threads(self._checked, shown("checking", numbers))
    ):
      parts.append(arrays["documents"])
      digests += list(arrays["text"])
      files[tokens_name(number)] = found
    documents = np.concatenate(parts)
    index = io.BytesIO()
    np.save(index, documents)
    storage.write_bytes(self._out / DOCUMENTS, index.getvalue())
    for name in (DOCUMENTS, TOKENIZER):
      files[name] = checksum(self._out / name)
    manifest = {
      "settings": dict(settings),
      "taxonomy": plan.taxonomy.to_dict(),
      "content_hash": content_hash(
        plan.taxonomy.source_names,
        plan.digests(documents["source"], digests),
      ),
      "dtype": chunks.token_dtype(tokenizer),
      "token_files": len(plan.begin) - 1,
      "vocabulary_size": tokenizer.vocabulary_size,
      "domains": plan.report(documents),
      "skipped": plan.skipped,
      "bad_records": plan.bad,
      "files": files,
    }
    if plan.near_duplicates is not None:
      manifest["near_duplicates"] = plan.near_duplicates
    storage.write_json(self._out / MANIFEST, manifest, indent=2)
    (self._out / "work").rmtree()
    # A worker that was killed while it wrote a file leaves what it had.
    for part in self._out.glob(".*.tmp"):
      part.unlink(missing_ok=True)
    return manifest

  def _checked(
    self, number: int
  ) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """Returns a chunk's documents, and the checksum of its tokens.

    Raises:
      UserError: the tokens are not those that were written.
    """
    encoded = chunks.encoded_path(self._out, number)
    arrays = chunks.read_arrays(encoded)
    found = checksum(self._out / tokens_name(number))
    if found["sha256"] != str(arrays["sha256"]):
      encoded.unlink()
      raise chunks.lost(self._out / tokens_name(number))
    return arrays, found


@COMMAND.main
def main() -> None:
  """Prepares the text, then prints the documents and bytes of each domain."""
  manifest = prepare(_options())
  report = LabelReport()
  report.merge(manifest["domains"])
  skipped = dict(manifest["skipped"])
  messages = skipped.pop("messages")
  # Manifests of earlier versions do not have it.
  bad = manifest.get("bad_records", {})
  counts = ", ".join(f"{n:,} {name}" for name, n in skipped.items())
  tokens = sum(row["tokens"] for row in manifest["domains"])
  lines = [
    f"{tokens:,} tokens in {_OUT.value}:",
    *(f"  {line}" for line in report.lines()),
    f"left out: {counts}",
    *(f"  {line}" for line in bad_records.lines(bad)),
    *(f"  {message}" for message in messages),
    *_near_lines(manifest.get("near_duplicates")),
  ]
  print("\n".join(lines))


def _near_lines(report: Mapping[str, Any] | None) -> list[str]:
  """Returns what to tell of near duplicates, if they were looked for."""
  if report is None:
    return []
  counts = ", ".join(f"{n:,} of {d}" for d, n in report["removed"].items())
  return [
    f"near duplicates: {counts or 'none'}",
    *(
      f"  {e['removed']} is like {e['like']} ({e['similarity']:.2f}):"
      f" {e['text']!r}"
      for e in report["examples"]
    ),
  ]


def _options() -> Options:
  """Returns the options that the flags set.

  Raises:
    UserError: the vocabulary is too small.
  """
  kind, _, size = _TOKENIZER.value.partition(":")
  if kind == "bpe" and not (size.isdigit() and int(size) >= 300):
    raise UserError(
      f"--tokenizer={_TOKENIZER.value}: bpe needs a size of at least 300"
    )
  return Options(
    files=_FILES.value,
    out=_OUT.value,
    tokenizer=_TOKENIZER.value,
    taxonomy=_TAXONOMY.value,
    labels=_LABELS.value,
    held_out_fraction=_HELD_OUT_FRACTION.value,
    max_characters_per_domain=_MAX_CHARACTERS.value,
    skip_bad=_SKIP_BAD.value,
    near_duplicates=_NEAR.value,
    near_shingle=_SHINGLE.value,
    near_permutations=_PERMUTATIONS.value,
    workers=_WORKERS.value,
    runner=_RUNNER.value,
    beam=tuple(_BEAM.value),
  )


if __name__ == "__main__":
  sys.exit(main())
