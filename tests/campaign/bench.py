"""Starts runs of experiments/tiny.py, and compares what they leave."""

import contextlib
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

# What a run imports late.
import edl_jax.analysis.report  # noqa: F401
from edl_jax import main, storage, train
from tests.campaign.child import Child
from tests.xla import FAST_FLAGS

ROOT = pathlib.Path(__file__).parent.parent.parent
# Longest time that a run may take, in seconds: machines may be busy.
PATIENCE = 3600
_SECONDS_BETWEEN = 0.005


class FaultError(Exception):
  """The product did not do what it must after a fault."""


class SkippedError(Exception):
  """This machine does not allow a fault."""


class Outcome(NamedTuple):
  """What a fault did."""

  text: str
  # How often the product was harmed.
  harms: int = 1


class Bench:
  """A folder with text, an undisturbed run, and as many others as wanted.

  Attributes:
    folder: where all of it lies.
    cache: the cache of tokenizers and tokens of all runs.
    undisturbed: the folder of a run that nothing disturbed.
    seconds: how long a run takes.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.cache = folder / "cache"
    self.files = folder / "texts.jsonl"
    self.undisturbed = folder / "undisturbed"
    # This file says that the folder is complete.
    measured = folder / "bench.json"
    if not measured.exists():
      _write_texts(self.files)
      self.finish(self.undisturbed)
      # Again, now that the programs are compiled: when others are struck.
      begun = time.monotonic()
      self.finish(folder / "again")
      seconds = time.monotonic() - begun
      self.compare(folder / "again")
      storage.write_json(measured, {"seconds": seconds})
    self.seconds = float(json.loads(measured.read_text())["seconds"])

  def environment(self, cache: pathlib.Path | None = None) -> dict[str, str]:
    """Returns the variables of a run."""
    return {
      "JAX_PLATFORMS": "cpu",
      "EDL_JAX_CACHE": str(cache or self.cache),
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
      "XLA_FLAGS": FAST_FLAGS,
    }

  def _path(self, name: str) -> pathlib.Path:
    """Returns a path that no other call has given."""
    return self.folder / f"{name}-{uuid.uuid4().hex}"

  def _configure(self) -> None:
    """Sets what JAX takes from `environment` when it is imported."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", f"{self.folder}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

  def start(
    self,
    workdir: pathlib.Path,
    *arguments: str,
    before: Callable[[], None] | None = None,
    join: Callable[[], None] | None = None,
    fresh: bool = False,
    cache: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
    largest_file: int | None = None,
  ) -> Child:
    """Starts a run.

    Args:
      workdir: its folder.
      *arguments: more of them, for edl_jax.main.
      before: called in the new process, before the run. The step is then
        traced anew.
      join: the same, of what does not change the step.
      fresh: whether it is a new interpreter, not a copy of this process.
      cache: another folder of the cache.
      environment: more variables.
      largest_file: see `Child`.
    """
    command = [
      "--experiment=experiments/tiny.py",
      f"--workdir={workdir}",
      f"--experiment.data.files={self.files}",
      "--experiment.train.checkpoint_every=5",
      "--experiment.train.keep_checkpoints=4",
      "--experiment.train.eval_every=5",
      *arguments,
    ]
    variables = self.environment(cache) | dict(environment or {})

    def work() -> int:
      os.chdir(ROOT)
      if join:
        join()
      if fresh:
        program = [sys.executable, "-m", "edl_jax.main"]
        os.execv(sys.executable, [*program, *command])
      if before:
        before()
      else:
        _reuse_step(self.folder / "step")
      self._configure()
      return main.main(command)

    return Child(work, self._path("errors"), variables, largest_file)

  def ask(self, question: Callable[[], Any]) -> Any:
    """Returns what a function gives, as JSON holds it, in its own process."""
    child, answer = self.begin(question)
    with contextlib.suppress(TimeoutError):
      child.wait(PATIENCE)
    return self.answer(child, answer)

  def begin(self, question: Callable[[], Any]) -> tuple[Child, pathlib.Path]:
    """Starts a process for `answer`; it will write to the path."""
    path = self._path("answer")

    def work() -> None:
      os.chdir(ROOT)
      self._configure()
      path.write_text(json.dumps(question()))

    return Child(work, self._path("errors"), self.environment()), path

  def answer(self, child: Child, path: pathlib.Path) -> Any:
    """Returns what the process of `begin`, which has ended, found.

    Raises:
      FaultError: it raised something.
    """
    errors = child.take_errors()
    if child.returncode:
      raise FaultError(f"a traceback: {errors[-400:]}")
    found = json.loads(path.read_text())
    path.unlink()
    return found

  def end(self, child: Child, *codes: int) -> str:
    """Waits for a run; returns its last error line.

    Raises:
      FaultError: its exit code is none of `codes`, it printed a traceback, or
        its error is not one line.
    """
    try:
      child.wait(PATIENCE)
    except TimeoutError as error:
      raise FaultError(str(error)) from error
    errors = child.take_errors()
    lines = [line for line in errors.splitlines() if line.strip()]
    tail = " | ".join(lines[-3:])[-400:]
    if child.returncode not in codes:
      raise FaultError(f"exit code {child.returncode}, not {codes}: {tail}")
    if "Traceback" in errors:
      raise FaultError(f"a traceback: {tail}")
    told = [line for line in lines if line.startswith("error: ")]
    # A full disk cuts off what is printed into a file too.
    cut = len(errors.encode()) >= (child.largest_file or math.inf)
    if child.returncode > 0 and len(told) != 1 and not cut:
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
    self.compare_with(self.undisturbed, workdir)

  def compare_with(self, wanted: pathlib.Path, workdir: pathlib.Path) -> None:
    """Raises FaultError unless the figures of two runs are equal."""
    theirs, ours = figures(wanted), figures(workdir)
    for key, value in theirs.items():
      if ours[key] != value:
        raise FaultError(f"{key} differs from the undisturbed run's")

  def wait_for_moment(
    self, child: Child, workdir: pathlib.Path, draw: random.Random
  ) -> str:
    """Waits until a random moment of a run; returns it in words.

    A third of the moments lie in seconds after its start, the others shortly
    after it has written a certain line of its metrics: a checkpoint is then
    often being written.
    """
    begun = time.time()
    early, line = draw.random() < 1 / 3, draw.randint(1, 14)
    share = draw.random()
    if early:
      delay = share * self.seconds
      end = time.monotonic() + delay
      while child.poll() is None and time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN)
      return f"{delay:.1f} s"
    path = workdir / "metrics.jsonl"
    while child.poll() is None:
      written = path.exists() and path.stat().st_mtime > begun
      if written and path.read_text().count("\n") >= line:
        break
      time.sleep(_SECONDS_BETWEEN)
    delay = share * 0.1 * self.seconds
    time.sleep(delay)
    return f"line {line} + {delay:.1f} s"


def _write_texts(path: pathlib.Path) -> None:
  letters = random.Random(0)
  with open(path, "w") as file:
    for domain in ("words/low", "words/high", "digits"):
      for _ in range(30):
        text = domain + "".join(letters.choices("abcdefgh ", k=150))
        file.write(json.dumps({"text": text, "domain": domain}) + "\n")


def _reuse_step(path: pathlib.Path) -> None:
  """Makes the run in this process reuse the compiled training step in a file.

  To trace and lower the step anew takes half of a short run's time. The
  first run writes the file.
  """
  make, compile_step = train.make_train_step, train.compile_program

  class Lowered(NamedTuple):
    step: Any
    arguments: tuple[Any, ...]

  class Step(NamedTuple):
    step: Any

    def lower(self, *arguments: Any) -> Lowered:
      return Lowered(self.step, arguments)

  def make_step(*arguments: Any) -> Any:
    return Step(make(*arguments))

  def compiled(lowered: Any, device: Any) -> Any:
    taken = jax.tree.structure((lowered.arguments, {}))
    if path.exists():
      program, result = pickle.loads(path.read_bytes())
      return serialize_executable.deserialize_and_load(
        program, taken, jax.tree.structure(result), execution_devices=[device]
      )
    made = compile_step(lowered.step.lower(*lowered.arguments), device)
    program, _, given = serialize_executable.serialize(made)
    numbered = jax.tree.unflatten(given, range(given.num_leaves))
    storage.write_bytes(path, pickle.dumps((program, numbered)))
    return made

  # Any: the run takes these for JAX's own.
  patched: Any = train
  patched.make_train_step, patched.compile_program = make_step, compiled


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
