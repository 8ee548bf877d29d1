"""Lets the product run for long, and watches what it holds.

  python -m tests.soak --minutes=60

Watches three programs for so long each: the demo's training with evaluations
and checkpoints, the input pipeline alone over 1,000 sources, and data.prepare
again and again. After a sixth of the time, a program's resident memory must
stay within 2% (or 8 MiB), and its threads and open files must not become more.
Exit code 1 if one grew.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from edl_jax import tables
from edl_jax.command import Command

COMMAND = Command(__doc__)
_MINUTES = COMMAND.flag(
  "minutes", 60.0, "How long each program runs.", minimum=0
)
_ONLY = COMMAND.flag(
  "only",
  ("training", "input", "prepare"),
  "The programs.",
  choices=["training", "input", "prepare"],
)

ROOT = pathlib.Path(__file__).parent.parent.parent
_SECONDS_BETWEEN = 1.0
_GROWTH, _LEAST_GROWTH = 0.02, 8 * 2**20

_INPUT = """
import sys
from edl_jax.config import DataConfig, Experiment, TrainConfig
from edl_jax.text.input_pipeline import train_dataset, train_iterator
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import byte_tokenizer
experiment = Experiment(
  data=DataConfig(files=sys.argv[1]), train=TrainConfig(sequence_length=64)
)
corpus = load_corpus(experiment.data)
rows, _ = train_dataset(corpus, byte_tokenizer(), experiment)
iterator = train_iterator(rows, experiment, len(corpus.taxonomy.fine))
while True:
  next(iterator)
"""
_PREPARE = """
import pathlib, shutil, sys
from data.prepare import Options, prepare
while True:
  prepare(Options(files=sys.argv[1], out=sys.argv[2], tokenizer="byte"))
  shutil.rmtree(sys.argv[2])
"""


class Sample(NamedTuple):
  """What a process holds at a moment."""

  resident_bytes: int
  threads: int
  files: int


def look(pid: int) -> Sample:
  """Reads what a process holds from /proc."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  values = dict(line.split(":", 1) for line in status.splitlines())
  return Sample(
    int(values["VmRSS"].split()[0]) * 1024,
    int(values["Threads"]),
    len(os.listdir(f"/proc/{pid}/fd")),
  )


def watch(
  name: str, command: Sequence[str], seconds: float, cache: pathlib.Path
) -> list[Sample]:
  """Runs a program for `seconds`, then ends it; returns a sample a second.

  Prints a line a minute. `cache` is the program's cache folder.

  Raises:
    RuntimeError: the program ended by itself.
  """
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "EDL_JAX_CACHE": str(cache)},
    stdout=subprocess.DEVNULL,
  )
  samples, end = [], time.monotonic() + seconds
  try:
    while time.monotonic() < end:
      time.sleep(_SECONDS_BETWEEN)
      if process.poll() is not None:
        raise RuntimeError(f"it ended by itself, with {process.returncode}")
      samples.append(look(process.pid))
      if len(samples) % 60 == 0:
        print(name, *_cells(samples[-1]), sep="  ", flush=True)
  finally:
    if process.poll() is None:
      process.send_signal(signal.SIGTERM)
    process.wait()
  return samples


def _cells(sample: Sample) -> tuple[str, str, str]:
  size = f"{sample.resident_bytes / 2**20:.1f}"
  return size, str(sample.threads), str(sample.files)


def problems(samples: Sequence[Sample]) -> list[str]:
  """Returns what grew after a sixth of the time.

  The last third is compared with what came before, by medians and maxima, as
  memory goes up and down with every evaluation and checkpoint.
  """
  settled = samples[len(samples) // 6 :]
  cut = 2 * len(settled) // 3
  before, after = settled[:cut], settled[cut:]
  found = []
  first, last = (
    sorted(sample.resident_bytes for sample in part)[len(part) // 2]
    for part in (before, after)
  )
  if last - first > max(_GROWTH * first, _LEAST_GROWTH):
    found.append(f"resident memory grew by {(last - first) / 2**20:.0f} MiB")
  for name in ("threads", "files"):
    most, later = (
      max(getattr(sample, name) for sample in part) for part in (before, after)
    )
    if later > most:
      found.append(f"{name} grew from {most} to {later}")
  return found


def _write_text(path: pathlib.Path, sources: int) -> None:
  with open(path, "w") as file:
    for number in range(20 * sources):
      text = f"text {number} " * 20
      domain = number % sources
      file.write(f'{{"text": "{text}", "domain": "d{domain}"}}\n')


@COMMAND.main
def main() -> int:
  """Watches the programs one after another; returns the exit code."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
  many = folder / "many.jsonl"
  _write_text(many, 1000)
  commands = {
    "training": [
      *("-m", "edl_jax.main", "--experiment=experiments/demo.py"),
      f"--workdir={folder}/run",
      *("--experiment.train.num_steps=100000000",),
      *("--experiment.train.eval_every=50",),
      *("--experiment.train.checkpoint_every=50",),
    ],
    "input": ["-c", _INPUT, str(many)],
    "prepare": ["-c", _PREPARE, str(many), f"{folder}/prepared"],
  }
  rows, grew = [("program", "MiB", "threads", "files", "")], False
  try:
    for name in _ONLY.value:
      command = [sys.executable, *commands[name]]
      seconds = 60 * _MINUTES.value
      samples = watch(name, command, seconds, folder / "cache")
      found = problems(samples)
      grew = grew or bool(found)
      rows.append((name, *_cells(samples[-1]), "; ".join(found) or "flat"))
      print("  ".join(rows[-1]), flush=True)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  print("\n".join(tables.aligned(rows, left=(0, 4))))
  return int(grew)


if __name__ == "__main__":
  sys.exit(main())
