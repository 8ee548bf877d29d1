"""Measures how fast text is prepared, beside the tokenizer alone.

  python -m benchmarks.prepare --megabytes=20 --json=prepare.json

Three kinds of text are prepared from JSON lines with one tokenizer, a BPE that
learned from all three:

- english and code: documents of the embedded mixture, which is everywhere;
- chinese: sentences of random words, a fifth of them new.

--english, --chinese and --code name files of records to take instead, such as
those of `data.corpora`. --texts chooses the kinds that are prepared.

The bounds are the libraries alone, called on the same texts as their own
documentation shows it: `tokenizers`, and `fastokens`, which encodes byte-level
BPE. Contestants take turns, without threads unless they say otherwise. Rates
are in MB (10^6 bytes of UTF-8) a second of processor time of all threads and
processes, after imports; `of bound` is the median over rounds of the time as a
multiple of that of fastokens. With --baseline, an older checkout takes part.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import measure
from edl_jax.command import Command
from edl_jax.config import DataConfig, UserError
from edl_jax.text.files import find_files
from edl_jax.text.readers import read_records
from edl_jax.text.sources import read_documents
from edl_jax.text.tokenizer import train_tokenizer

COMMAND = Command(__doc__)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_ROUNDS = COMMAND.flag(
  "rounds", 3, "Turns that each contestant takes.", minimum=1
)
_MEGABYTES = COMMAND.flag(
  "megabytes", 10, "Most text of each kind, in 10^6 characters.", minimum=1
)
_KINDS = ("english", "chinese", "code")
_TEXTS = COMMAND.flag("texts", ",".join(_KINDS), "Kinds of text to prepare.")
_GIVEN = {
  kind: COMMAND.flag(kind, "", "Glob of files with such records, if any.")
  for kind in _KINDS
}
_CONTESTANTS = COMMAND.flag(
  "contestants", "", "Those that take part, by commas, beside fastokens alone."
)
_BASELINE = COMMAND.flag(
  "baseline", "", "Folder of an older checkout that takes part."
)

VOCABULARY = 16384
# Characters of each kind that the tokenizer learns from, at most.
_LEARNED = 4_000_000

# Each contestant is a program of its own, which prints its processor seconds
# after its imports, with those of its workers, and its memory in KiB.
_MEASURED = """
import json, resource, sys, time
{imports}
def used():
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime
{before}
start = used()
{work}
# getrusage would count the process that started this one.
with open("/proc/self/status") as file:
  (own,) = [line.split()[1] for line in file if line.startswith("VmHWM")]
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(used() - start, max(int(own), children))
"""
_PREPARE = _MEASURED.format(
  imports="from data.prepare import Options, prepare",
  before="files, tokenizer, out, workers = sys.argv[1:]",
  work="prepare(Options(files, out, tokenizer, workers=int(workers)))",
)
_LINES = (
  'texts = [json.loads(line)["text"] for line in open(sys.argv[1], "rb")]'
)
_TOKENIZERS = _MEASURED.format(
  imports="import tokenizers",
  before=_LINES,
  work="""
library = tokenizers.Tokenizer.from_file(sys.argv[2])
library.encode_batch_fast(texts, add_special_tokens=False)
""",
)
_FASTOKENS = _MEASURED.format(
  imports="import fastokens",
  before=_LINES,
  work="""
library = fastokens.Tokenizer.from_file(sys.argv[2])
library.encode_batch_flat(texts)
""",
)


def measured(
  program: str, arguments: Sequence[str], folder: str, threads: int
) -> tuple[float, float]:
  """Runs a program; returns its processor seconds and its memory in MB."""
  paths = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
  environment = os.environ | {
    "RAYON_NUM_THREADS": str(threads),
    "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
  }
  done = subprocess.run(
    [sys.executable, "-c", program, *arguments],
    cwd=folder,
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  seconds, kibibytes = map(float, done.stdout.split()[-2:])
  return seconds, kibibytes * 1024 / 1e6


def texts_of_kinds(limit: int) -> dict[str, list[str]]:
  """Returns texts by kind, of about `limit` characters each."""
  _, documents, _ = read_documents(DataConfig(max_characters_per_domain=limit))
  kinds = {"english": ("documentation", "legal"), "code": ("python_source",)}
  texts = {
    kind: [d.text for d in documents if d.domain in domains]
    for kind, domains in kinds.items()
  }
  texts["chinese"] = _sentences(limit)
  for kind, given in _GIVEN.items():
    if given.value:
      _, paths = find_files(given.value, f"--{kind}")
      texts[kind] = [
        record["text"]
        for path in paths
        for _, record in read_records(path)
        if isinstance(record, dict)
      ]
      if not texts[kind]:
        raise UserError(f"--{kind}={given.value}: no text")
  return {kind: _first(texts[kind], limit) for kind in _KINDS}


def _first(texts: Sequence[str], limit: int) -> list[str]:
  kept, size = [], 0
  for text in texts:
    if size >= limit:
      break
    kept.append(text)
    size += len(text)
  return kept


def _sentences(limit: int) -> list[str]:
  rng = random.Random(0)

  def word() -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x5500)) for _ in range(2))

  words = [word() for _ in range(5000)]

  def sentence() -> str:
    parts = [
      rng.choice(words) if rng.random() < 0.8 else word() for _ in range(8)
    ]
    return "".join(parts) + "\u3002"

  return [
    "".join(sentence() for _ in range(120)) for _ in range(limit // 2040 + 1)
  ]


def contestants(
  folder: str, files: str, tokenizer: str, memory: dict[str, float]
) -> dict[str, Callable[[], float]]:
  """Returns functions that take a turn each; they note memory in MB."""
  here = Path(__file__).resolve().parents[1]
  cores = os.cpu_count() or 1
  out = os.path.join(folder, "out")

  def call(
    name: str, program: str, *more: str, threads: int = 1, where: Path = here
  ) -> dict[str, Callable[[], float]]:
    def run() -> float:
      arguments = [files, tokenizer, *more]
      seconds, size = measured(program, arguments, str(where), threads)
      memory[name] = max(memory.get(name, 0), size)
      shutil.rmtree(out, ignore_errors=True)
      return seconds

    return {name: run}

  calls = {
    **call("tokenizers alone", _TOKENIZERS),
    **call("fastokens alone", _FASTOKENS),
    **call("prepare", _PREPARE, out, "1"),
    **call(f"prepare, {cores} threads", _PREPARE, out, "1", threads=cores),
    **call(f"prepare, {cores} processes", _PREPARE, out, str(cores)),
  }
  if _BASELINE.value:
    older = Path(_BASELINE.value).resolve()
    calls |= call("baseline", _PREPARE, out, "1", where=older)
  chosen = _CONTESTANTS.value.split(",")
  return {
    name: run
    for name, run in calls.items()
    if chosen == [""] or name in ("fastokens alone", *chosen)
  }


@COMMAND.main
def main() -> None:
  """Prints rates, ratios and memory for three kinds of text."""
  rows = []
  limit = _MEGABYTES.value * 1_000_000
  kinds = texts_of_kinds(limit)
  with tempfile.TemporaryDirectory() as folder:
    sample = [t for texts in kinds.values() for t in _first(texts, _LEARNED)]
    tokenizer = os.path.join(folder, "tokenizer.json")
    content = train_tokenizer(sample, VOCABULARY).to_json()
    Path(tokenizer).write_text(content, encoding="utf-8")
    for kind in _TEXTS.value.split(","):
      texts = kinds[kind]
      files = os.path.join(folder, f"{kind}.jsonl")
      with open(files, "w", encoding="utf-8") as file:
        for text in texts:
          file.write(json.dumps({"text": text, "domain": kind}) + "\n")
      size = sum(len(text.encode()) for text in texts) / 1e6
      memory: dict[str, float] = {}
      taken = measure.take_turns(
        contestants(folder, files, tokenizer, memory), _ROUNDS.value
      )
      bound = taken["fastokens alone"]
      for name in taken:
        row = {
          "text": kind,
          "MB": size,
          "what": name,
          "MB/s": statistics.median(size / each for each in taken[name]),
          "of bound": measure.median_ratio(taken[name], bound),
        }
        if "baseline" in taken:
          row["speed-up"] = measure.median_ratio(taken["baseline"], taken[name])
        rows.append(row | {"memory MB": memory[name]})
  measure.report(rows, _JSON.value)


if __name__ == "__main__":
  sys.exit(main())
