"""Reads the folder of tokenized text that `python -m data.prepare` writes.

  tokens-00000.bin ...   token ids end to end, little-endian
  documents.npy          a DOCUMENT for each document, in the order of reading
  tokenizer.json         the tokenizer
  manifest.json          everything else, and a checksum of each file; it is
                         written last: a folder without it is not finished

Reading maps the files into memory: a corpus need not fit there, and any number
of sources needs no threads. Rows are many small reads at random, which take a
disk microseconds and a bucket tens of milliseconds. So each machine copies a
folder in a bucket to its disk.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from edl_jax import storage
from edl_jax.cache import cache_directory, cache_key
from edl_jax.config import DataConfig, Experiment, UserError
from edl_jax.progress import shown
from edl_jax.text.documents import DomainNames
from edl_jax.text.taxonomy import Taxonomy, fine_name
from edl_jax.text.token_stream import EncodedDocuments
from edl_jax.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"
DOCUMENTS = "documents.npy"
TOKENIZER = "tokenizer.json"

# The place of a document's tokens, and its size, source and split.
DOCUMENT = np.dtype(
  [
    # Number of the token file; first token there; number of tokens.
    ("file", "<u4"),
    ("start", "<u8"),
    ("tokens", "<u4"),
    ("bytes", "<u4"),
    ("characters", "<u4"),
    # Index into the taxonomy's sources.
    ("source", "<u2"),
    ("held_out", "?"),
  ]
)


def tokens_name(number: int) -> str:
  """Returns the name of the token file of a number."""
  return f"tokens-{number:05}.bin"


def checksum(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns a file's size and SHA-256, in the form of the manifest."""
  with storage.open_bytes(path) as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.tell(), "sha256": digest}


# What every manifest has.
_KEYS = {
  *("settings", "taxonomy", "content_hash", "dtype", "token_files", "skipped"),
  "files",
}


def read_manifest(folder: str) -> dict[str, Any] | None:
  """Returns a folder's manifest, None without one.

  Raises:
    UserError: the manifest cannot be read.
  """
  path = os.path.join(folder, MANIFEST)
  try:
    content = json.loads(epath.Path(path).read_text())
    if not isinstance(content, dict) or not _KEYS.issubset(content):
      raise ValueError("not what data.prepare writes")
    return content
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: damaged ({error})") from error


def check_files(
  folder: str, manifest: dict[str, Any], *, content: bool
) -> None:
  """Compares a folder's files with its manifest.

  Args:
    folder: the folder.
    manifest: its manifest.
    content: whether to compare checksums, which reads every file, besides
      sizes.

  Raises:
    UserError: a file is missing or has changed; names it.
  """
  files = manifest["files"]
  for name in shown("checking", files) if content else files:
    path, wanted = os.path.join(folder, name), files[name]
    try:
      size = storage.size(path)
      same = size == wanted["bytes"]
      if same and content:
        same = checksum(path) == wanted
    except OSError as error:
      raise UserError(f"{path}: {error.strerror or error}") from error
    if not same:
      raise _damaged(path, size, wanted)


def _damaged(path: str, size: int, wanted: dict[str, Any]) -> UserError:
  return UserError(
    f"{path}: damaged (it has {size:,} bytes; {wanted['bytes']:,} with SHA-256"
    f" {wanted['sha256'][:12]}... were written); prepare the folder anew"
  )


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCorpus:
  """Tokenized training and held-out documents, by source."""

  taxonomy: Taxonomy
  tokenizer: Tokenizer
  # Equal to that of a `mixture.Corpus` of the same text.
  content_hash: str
  # What preparing left out, a line each.
  notes: Sequence[str]
  # Maps of the token files; the documents, DOCUMENT (documents,), by source.
  _arrays: Sequence[np.ndarray]
  _documents: Sequence[np.ndarray]

  @property
  def supervised(self) -> bool:
    """Whether any source has supervised examples: none has."""
    return False

  def documents(self, split: str) -> list[EncodedDocuments]:
    """Returns the documents of "train" or "held_out", by source."""
    return [
      EncodedDocuments(
        self._arrays,
        own["file"],
        own["start"].astype(np.int64),
        own["tokens"].astype(np.int64),
      )
      for own in self._of(split)
    ]

  def sizes(self) -> list[tuple[int, int]]:
    """Returns the documents and characters of each source, of both splits."""
    return [(len(own), _sum(own["characters"])) for own in self._documents]

  def train_bytes(self) -> list[int]:
    """Returns the UTF-8 bytes of each source's training text."""
    return [_sum(own["bytes"]) for own in self._of("train")]

  def _of(self, split: str) -> list[np.ndarray]:
    held_out = split == "held_out"
    return [own[own["held_out"] == held_out] for own in self._documents]


def _sum(column: np.ndarray) -> int:
  return int(column.sum(dtype=np.int64))


def load_prepared(experiment: Experiment) -> PreparedCorpus:
  """Opens the folder `data.prepared`.

  `data.taxonomy` or `data.domains` may select, order, regroup or weight its
  domains anew, by their fine labels.

  Raises:
    UserError: the folder is missing, not finished or damaged, or does not fit
      the experiment.
  """
  data = experiment.data
  folder = os.path.expanduser(data.prepared)
  setting = f"data.prepared={data.prepared}"
  storage.check_access(folder, "data.prepared=")
  manifest = read_manifest(folder)
  if manifest is None:
    reason = (
      f"not finished (no {MANIFEST}); run the command that began it again"
      if epath.Path(folder).is_dir()
      else "no such folder"
    )
    raise UserError(f"{setting}: {reason}")
  if storage.in_bucket(folder):
    folder = _local_copy(folder, manifest)
  check_files(folder, manifest, content=False)
  # These decide what every token means; tokens alone are too many to read.
  for name in (TOKENIZER, DOCUMENTS):
    wanted = manifest["files"][name]
    if checksum(path := os.path.join(folder, name)) != wanted:
      raise _damaged(path, wanted["bytes"], wanted)
  held_out = manifest["settings"]["held_out_fraction"]
  if held_out != data.held_out_fraction:
    raise UserError(
      f"{setting} was split with held_out_fraction={held_out}, not"
      f" data.held_out_fraction={data.held_out_fraction}"
    )
  text = Path(folder, TOKENIZER).read_text(encoding="utf-8")
  tokenizer = Tokenizer.from_json(text)
  if tokenizer.vocabulary_size > experiment.model.vocabulary_size:
    raise UserError(
      f"{setting} has {tokenizer.vocabulary_size} token ids, more than"
      f" model.vocabulary_size={experiment.model.vocabulary_size}"
    )
  whole = Taxonomy.from_dict(manifest["taxonomy"])
  taxonomy = _chosen(data, whole, setting)
  documents = np.load(os.path.join(folder, DOCUMENTS))
  # One stable sort, where a mask for each source would take many passes.
  order = np.argsort(documents["source"], kind="stable")
  ends = np.searchsorted(
    documents["source"][order], np.arange(len(whole.sources) + 1)
  )
  places = [whole.sources.index(name) for name in taxonomy.sources]
  return PreparedCorpus(
    taxonomy=taxonomy,
    tokenizer=tokenizer,
    content_hash=manifest["content_hash"],
    notes=_notes(manifest["skipped"]),
    _arrays=[
      _map(os.path.join(folder, tokens_name(number)), manifest["dtype"])
      for number in range(manifest["token_files"])
    ],
    _documents=[documents[order[ends[at] : ends[at + 1]]] for at in places],
  )


def _notes(skipped: dict[str, Any]) -> list[str]:
  """Returns lines about bad records and domains that preparing left out."""
  messages = [f"  {message}" for message in skipped["messages"]]
  bad = f"left out {skipped['bad']:,} bad records when prepared:"
  return [bad, *messages] if messages else []


def _local_copy(folder: str, manifest: dict[str, Any]) -> str:
  """Copies a bucket's folder to the cache folder, once on each machine.

  The checksums of all files determine the name of the copy: text that was
  prepared anew is copied anew.

  Returns:
    The path of the copy.

  Raises:
    UserError: the copy does not fit on the disk, cannot be read or written, or
      is damaged.
  """
  files = manifest["files"]
  key = cache_key(json.dumps(files, sort_keys=True))
  copy = cache_directory() / "prepared" / key
  needed = sum(file["bytes"] for file in files.values())
  way_out = "make room, or set EDL_JAX_CACHE to a folder with more"
  try:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{copy}.lock", "w") as lock:
      # Other processes of this machine wait here, then find the copy.
      fcntl.flock(lock, fcntl.LOCK_EX)
      if copy.is_dir():
        return str(copy)
      partial = Path(f"{copy}.partial")
      shutil.rmtree(partial, ignore_errors=True)
      free = shutil.disk_usage(copy.parent).free
      if free < needed:
        raise UserError(
          f"data.prepared={folder} must be copied to {copy}, which takes"
          f" {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are free;"
          f" {way_out}"
        )
      print(
        f"copying {needed / 2**20:,.0f} MiB of {folder} to {copy}", flush=True
      )
      partial.mkdir()
      for name, wanted in files.items():
        _copy_file(f"{folder}/{name}", partial / name, wanted)
      partial.rename(copy)
  except OSError as error:
    raise UserError(
      f"data.prepared={folder} cannot be copied to {copy}:"
      f" {error.strerror or error}; {way_out}"
    ) from error
  return str(copy)


def _copy_file(source: str, target: Path, wanted: dict[str, Any]) -> None:
  try:
    reader = epath.Path(source).open("rb")
  except FileNotFoundError as error:
    raise UserError(f"{source}: missing; prepare the folder anew") from error
  with reader, open(target, "wb") as writer:
    shutil.copyfileobj(reader, writer, 1 << 24)
  found = checksum(target)
  if found != wanted:
    raise _damaged(source, found["bytes"], wanted)


def _map(path: str, dtype: str) -> np.ndarray:
  # An empty file cannot be mapped.
  if not os.path.getsize(path):
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode="r")


def _chosen(data: DataConfig, whole: Taxonomy, setting: str) -> Taxonomy:
  """Returns the domains that `data` declares, of those in the folder."""
  domains = DomainNames(data)
  if not domains.declared:
    return whole
  for fine in domains.declared:
    if fine not in whole.fine:
      raise UserError(
        f"{setting} has no domain {fine!r}; it has {', '.join(whole.fine)}"
      )
  for name in whole.names:
    if fine_name(name) in domains.declared:
      domains.add(name, setting)
  return domains.taxonomy(whole.sources, setting)
