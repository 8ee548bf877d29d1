"""Kills preparation on Beam at random, and compares what it ends with.

  python -m benchmarks.prepare_killed --megabytes=50 --kills=5

needs the environment of requirements-beam.txt. One folder is prepared by this
machine alone; another by Beam's direct runner with worker processes, which are
killed with their parent (SIGKILL) and started again. A start is killed when a
random number of new results are there. Both folders must have the same bytes. A
row is a start; `lost` counts token files that were there when it was killed and
were written once more afterwards.
"""

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.prepare import Options, prepare
from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import DataConfig, UserError
from edl_jax.text.sources import read_documents

COMMAND = Command(__doc__)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_MEGABYTES = COMMAND.flag(
  "megabytes", 50, "Text to prepare, in 10^6 characters.", minimum=1
)
_KILLS = COMMAND.flag("kills", 5, "Times to kill.", minimum=1)
_WORKERS = COMMAND.flag("workers", 2, "Worker processes.", minimum=1)
_SEED = COMMAND.flag("seed", 0, "Of the moments of killing.")

_FILES = 12
_PROGRAM = """
import json, sys
from data.prepare import Options, prepare
prepare(Options(**json.loads(sys.argv[1])))
"""


def write_texts(folder: Path, characters: int) -> None:
  """Writes the embedded mixture in files, every 40th text of it twice.

  It is repeated with numbers before the texts until there is enough.
  """
  _, documents, _ = read_documents(DataConfig())
  size = sum(len(document.text) for document in documents)
  records = [
    {"text": f"{number}\n{document.text}", "domain": document.domain}
    for number in range(-(-characters // size))
    for document in documents
  ]
  # In the order of the mixture, a part of it would have a few domains alone.
  random.Random(0).shuffle(records)
  size, kept = 0, 0
  while size < characters:
    size += len(records[kept]["text"])
    kept += 1
  records = [*records[:kept], *records[:kept:40]]
  for number in range(_FILES):
    lines = [json.dumps(record) + "\n" for record in records[number::_FILES]]
    content = "".join(lines).encode()
    if number % 3 == 0:
      path = folder / f"{number:02}.jsonl.gz"
      path.write_bytes(gzip.compress(content, 1))
    else:
      (folder / f"{number:02}.jsonl").write_bytes(content)


def results(out: Path) -> set[Path]:
  """Returns the finished files of a folder that is being prepared."""
  found = [*out.glob("*.bin"), *out.glob("work/*.npz")]
  return {path for path in found if not path.name.startswith(".")}


def killed(made: Options, more: int) -> dict[str, int | float]:
  """Starts preparation, and kills it when there are `more` new results.

  Raises:
    UserError: it ended before.
  """
  out, start = Path(made.out), time.monotonic()
  before = results(out)
  process = subprocess.Popen(
    [sys.executable, "-c", _PROGRAM, json.dumps(dataclasses.asdict(made))],
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  while len(found := results(out)) < len(before) + more:
    if process.poll() is not None:
      raise UserError("the job ended before it was killed; take more text")
    time.sleep(0.02)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  return {
    "results before": len(before),
    "when killed": len(found),
    "token files": sum(path.suffix == ".bin" for path in found),
    "seconds": time.monotonic() - start,
  }


def times(out: Path) -> dict[Path, int]:
  """Returns when each token file was written."""
  return {path: path.stat().st_mtime_ns for path in out.glob("tokens-*.bin")}


def _shown(value: object) -> str:
  return f"{value:.0f}" if isinstance(value, float) else str(value)


@COMMAND.main
def main() -> None:
  """Prints a row for each start; ends with an error if a byte differs."""
  rng = random.Random(_SEED.value)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "texts").mkdir()
    write_texts(folder / "texts", _MEGABYTES.value * 1_000_000)
    one = Options(
      files=f"{folder}/texts/*",
      out=f"{folder}/one",
      tokenizer="bpe:8192",
      chunk_characters=500_000,
    )
    manifest = prepare(one)
    processes = f"direct_num_workers={_WORKERS.value}"
    made = dataclasses.replace(
      one,
      out=f"{folder}/killed",
      runner="DirectRunner",
      beam=("direct_running_mode=multi_processing", processes),
    )
    # Scans, plans, documents and tokens of each chunk, and some more.
    each = 4 * manifest["token_files"] // (_KILLS.value + 1)
    rows, before = [], {}
    for _ in range(_KILLS.value):
      row = killed(made, rng.randint(1, each))
      after = times(Path(made.out))
      lost = sum(after[path] != then for path, then in before.items())
      rows.append(row | {"lost": lost})
      before = after
    start = time.monotonic()
    prepare(made)
    after = times(Path(made.out))
    lost = sum(after[path] != then for path, then in before.items())
    last = {"results before": rows[-1]["when killed"], "when killed": "ended"}
    last |= {"token files": len(after), "seconds": time.monotonic() - start}
    rows.append(last | {"lost": lost})
    names = {path.name for path in Path(one.out).iterdir()}
    different = [
      name
      for name in names | {path.name for path in Path(made.out).iterdir()}
      if Path(made.out, name).read_bytes() != Path(one.out, name).read_bytes()
    ]
    if different:
      raise UserError(f"other bytes in {', '.join(sorted(different))}")
  if _JSON.value:
    storage.write_json(_JSON.value, rows, indent=2)
  for row in rows:
    print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
  print(f"{len(names)} files have the same bytes")


if __name__ == "__main__":
  sys.exit(main())
