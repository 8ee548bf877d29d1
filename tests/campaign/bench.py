"""Starts runs of experiments/tiny.py, and compares what they leave."""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
# Longest time that a run may take, in seconds.
_PATIENCE = 600


class FaultError(Exception):
  """The product did not do what it must after a fault."""


class Bench:
  """A folder with text, an undisturbed run, and as many others as wanted."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.cache = folder / "cache"
    self.files = folder / "texts.jsonl"
    letters = random.Random(0)
    with open(self.files, "w") as file:
      for domain in ("words/low", "words/high", "digits"):
        for _ in range(30):
          text = domain + "".join(letters.choices("abcdefgh ", k=150))
          file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    self.undisturbed = self.finish(folder / "undisturbed")
    # Again, now that the programs are compiled: when others are struck.
    begun = time.monotonic()
    self.finish(folder / "again")
    self.seconds = time.monotonic() - begun
    self.compare(folder / "again")

  def start(
    self,
    workdir: pathlib.Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "edl_jax.main"),
    cache: pathlib.Path | None = None,
    largest_file: int | None = None,
  ) -> subprocess.Popen[str]:
    """Starts a run; with `largest_file`, bytes beyond fail as a full disk."""

    def limit() -> None:
      if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        bounds = (largest_file, largest_file)
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)

    return subprocess.Popen(
      [
        *(sys.executable, *program, "--experiment=experiments/tiny.py"),
        *(f"--workdir={workdir}", f"--experiment.data.files={self.files}"),
        "--experiment.train.checkpoint_every=5",
        "--experiment.train.eval_every=5",
        *arguments,
      ],
      cwd=ROOT,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "EDL_JAX_CACHE": str(cache or self.cache),
        "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
      },
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      preexec_fn=limit,
    )

  def end(self, process: subprocess.Popen[str], *codes: int) -> str:
    """Waits for a run; returns its last error line.

    Raises:
      FaultError: its exit code is none of `codes`, it printed a traceback, or
        its error is not one line.
    """
    _, errors = process.communicate(timeout=_PATIENCE)
    lines = [line for line in errors.splitlines() if line.strip()]
    tail = " | ".join(lines[-3:])[-400:]
    if process.returncode not in codes:
      raise FaultError(f"exit code {process.returncode}, not {codes}: {tail}")
    if "Traceback" in errors:
      raise FaultError(f"a traceback: {tail}")
    told = [line for line in lines if line.startswith("error: ")]
    if process.returncode > 0 and len(told) != 1:
      raise FaultError(f"{len(told)} error lines: {tail}")
    return told[0] if told else (lines[-1] if lines else "")

  def finish(self, workdir: pathlib.Path, **options: Any) -> pathlib.Path:
    """Runs to the end, from wherever the folder is."""
    self.end(self.start(workdir, **options), 0)
    return workdir

  def copy(self, workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Copies a run's folder."""
    target = self.folder / name
    shutil.copytree(workdir, target)
    return target

  def compare(self, workdir: pathlib.Path) -> None:
    """Raises FaultError unless a run's figures are the undisturbed run's."""
    theirs, ours = figures(self.undisturbed), figures(workdir)
    for key, value in theirs.items():
      if ours[key] != value:
        raise FaultError(f"{key} differs from the undisturbed run's")


def figures(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run found, without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  metrics = [
    {
      key: value
      for key, value in json.loads(line).items()
      if not re.search("^time/|tokens_per_second|input_wait_fraction", key)
    }
    for line in lines
  ]
  result = json.loads((workdir / "result.json").read_text())
  return {
    "metrics.jsonl": metrics,
    "routing.json": (workdir / "routing.json").read_text(),
    **{key: result[key] for key in ("eval", "routing", "step")},
  }
