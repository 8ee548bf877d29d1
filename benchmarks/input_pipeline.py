"""Measures how fast text is prepared and rows are read.

  python -m benchmarks.input_pipeline --json=input.json

The text is the embedded mixture, which every machine has. Files are read,
labelled and prepared as by `data.prepare`; rows are read and batched by the
iterator that trains. Rates are per second of processor time of all threads and
processes, so they do not depend on who else uses the machine. A megabyte is
10^6 bytes of UTF-8 text.
"""

import dataclasses
import gzip
import itertools
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from benchmarks import measure
from data import labels, topics
from data.prepare import Options, prepare
from edl_jax.command import Command
from edl_jax.config import DataConfig, Experiment, ModelConfig, TrainConfig
from edl_jax.text.documents import Document
from edl_jax.text.input_pipeline import train_dataset, train_iterator
from edl_jax.text.prepared import load_prepared
from edl_jax.text.readers import read_records
from edl_jax.text.sources import read_documents

COMMAND = Command(__doc__)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_ROUNDS = COMMAND.flag(
  "rounds", 3, "Turns that each contestant takes.", minimum=1
)
_CHARACTERS = COMMAND.flag(
  "characters",
  1_500_000,
  "Most characters to read of each domain of the embedded mixture.",
  minimum=1,
)

SOURCES = (6, 49, 1000)
SEQUENCE_LENGTH, BATCH_SIZE, BATCHES = 1024, 16, 60
VOCABULARY = 8192


def processor_seconds() -> float:
  """Returns the processor seconds of this process and its ended children."""
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime


def timed(function: Callable[[], Any]) -> float:
  """Returns the processor seconds that a call takes."""
  start = processor_seconds()
  function()
  return processor_seconds() - start


def write_files(folder: str, documents: Sequence[Document]) -> dict[str, str]:
  """Writes the documents in every format; returns the paths by suffix."""
  records = [dataclasses.asdict(document) for document in documents]
  content = "".join(json.dumps(record) + "\n" for record in records).encode()
  kinds = {
    ".jsonl": lambda: content,
    ".jsonl.gz": lambda: gzip.compress(content, 6),
    ".jsonl.zst": lambda: zstandard.compress(content),
  }
  paths = {}
  for suffix, make in kinds.items():
    paths[suffix] = os.path.join(folder, f"text{suffix}")
    with open(paths[suffix], "wb") as file:
      file.write(make())
  paths[".parquet"] = os.path.join(folder, "text.parquet")
  table = pyarrow.Table.from_pylist(records)
  pyarrow.parquet.write_table(table, paths[".parquet"])
  return paths


def label_rules(
  folder: str, documents: Sequence[Document]
) -> dict[str, labels.Rule]:
  """Returns a rule of each kind that the requirements allow."""
  rng = random.Random(0)
  sample = rng.sample(list(documents), min(1000, len(documents)))
  model = os.path.join(folder, "topics")
  topics.train_topics(
    [document.text for document in sample],
    [document.domain for document in sample],
  ).save(model)
  return {
    "column": labels.by_column("domain"),
    "address": labels.by_url({".org": "a", "python.org": "b"}, "origin"),
    "path": labels.by_path({"*.py": "a", "*.h": "b", "*": "c"}, "origin"),
    "language": labels.by_language(),
    "topic": labels.by_topic(model),
  }


def preparations(folder: str, files: str) -> dict[str, Callable[[], float]]:
  """Returns functions that prepare the files in several ways, from scratch."""
  # Without the tokenizer's threads, one process uses one core.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  numbers = itertools.count()
  first = os.path.join(folder, "first")
  prepare(Options(files, first, f"bpe:{VOCABULARY}"))
  bpe = os.path.join(first, "tokenizer.json")

  def call(workers: int, tokenizer: str) -> Callable[[], float]:
    def run() -> float:
      out = os.path.join(folder, f"out {next(numbers)}")
      options = Options(
        files, out, tokenizer, workers=workers, chunk_characters=500_000
      )
      return timed(lambda: prepare(options))

    return run

  return {
    "prepare, bytes": call(1, "byte"),
    f"prepare, BPE of {VOCABULARY}": call(1, bpe),
    f"prepare, BPE of {VOCABULARY}, two processes": call(2, bpe),
  }


def prepared_rows(
  folder: str, documents: Sequence[Document], sources: int
) -> Experiment:
  """Prepares pieces of the text, dealt out to `sources` domains, as bytes."""
  whole = "\n".join(document.text for document in documents)
  piece = min(20_000, len(whole) // sources // 4)
  path = os.path.join(folder, f"{sources}.jsonl")
  with open(path, "w", encoding="utf-8") as file:
    for number, start in enumerate(range(0, len(whole) - piece, piece)):
      text, domain = whole[start : start + piece], f"d{number % sources}"
      file.write(json.dumps({"text": text, "domain": domain}) + "\n")
  out = os.path.join(folder, f"prepared {sources}")
  prepare(Options(files=path, out=out, tokenizer="byte"))
  return Experiment(
    model=ModelConfig(vocabulary_size=512),
    train=TrainConfig(batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH),
    data=DataConfig(prepared=out),
  )


def row_reader(experiment: Experiment) -> Callable[[], float]:
  """Returns a function that times the reading of `BATCHES` batches."""
  corpus = load_prepared(experiment)
  rows, _ = train_dataset(corpus, corpus.tokenizer, experiment)

  def read() -> float:
    iterator = train_iterator(rows, experiment, len(corpus.taxonomy.fine))
    next(iterator)
    seconds = timed(lambda: [next(iterator) for _ in range(BATCHES)])
    iterator.close()
    return seconds

  return read


@COMMAND.main
def main() -> None:
  """Measures reading, labelling, preparing and rows; prints the table."""
  _, documents, _ = read_documents(
    DataConfig(max_characters_per_domain=_CHARACTERS.value)
  )
  megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
  rows = []

  def compare(
    unit: str, work: float, calls: dict[str, Callable[[], float]]
  ) -> None:
    taken = measure.take_turns(calls, _ROUNDS.value)
    for name, seconds in taken.items():
      rates = sorted(work / each for each in seconds)
      rows.append(
        {
          "what": name,
          "median": statistics.median(rates),
          "least": rates[0],
          "greatest": rates[-1],
          "unit": unit,
        }
      )

  with tempfile.TemporaryDirectory() as folder:
    paths = write_files(folder, documents)
    compare(
      "MB/s",
      megabytes,
      {
        f"read {suffix}": lambda path=path: timed(
          lambda: list(read_records(path))
        )
        for suffix, path in paths.items()
      },
    )
    some = [
      vars(document) for document in documents[:: max(1, len(documents) // 300)]
    ]
    compare(
      "documents/s",
      len(some),
      {
        f"label by {name}": lambda rule=rule: timed(
          lambda: list(map(rule, some))
        )
        for name, rule in label_rules(folder, documents).items()
      },
    )
    compare("MB/s", megabytes, preparations(folder, paths[".jsonl.gz"]))
    compare(
      "rows/s",
      BATCHES * BATCH_SIZE,
      {
        f"rows of {SEQUENCE_LENGTH} tokens, {sources} sources": row_reader(
          prepared_rows(folder, documents, sources)
        )
        for sources in SOURCES
      },
    )
  measure.report(rows, _JSON.value, megabytes=megabytes)


if __name__ == "__main__":
  sys.exit(main())
