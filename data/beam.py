"""Prepares text by Apache Beam: the same folder, by many machines.

Each step of `data.prepare` is a pipeline over the parts of the corpus that have
no result yet. Results are files in the folder's work/, which all workers must
see, as on one machine; so a job that was killed resumes. Workers write the same
files by the same functions, which is why the result has the same bytes.
"""

import contextlib
import functools
import importlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from data import chunks
from data.engines import choose_sample
from data.near import Near
from data.plan import Plan
from data.runs import Run, Text, divide
from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.progress import elapsed


class _Task(NamedTuple):
  """What every worker needs to know."""

  text: Text
  # Arguments of `chunks.start_worker`.
  out: str
  rules: str
  skip_bad: bool
  near: Near | None

  def path(self, kind: str, number: int, suffix: str = "npz") -> Path:
    """Returns the path of an intermediate result of a file or a chunk."""
    return Path(self.out, "work", f"{kind}-{number:05}.{suffix}")


def load_beam(runner: str, options: Sequence[str]) -> tuple[Any, Any]:
  """Returns Beam's module and its options.

  Raises:
    UserError: Beam is not installed, or an option has a value that it does not
      take.
  """
  try:
    # Any: Beam is optional, and types are checked without it.
    beam: Any = importlib.import_module("apache_beam")
    module: Any = importlib.import_module("apache_beam.options")
    importlib.import_module("apache_beam.options.pipeline_options")
  except ImportError as error:
    raise UserError(
      f"--runner={runner} needs the package apache-beam: pip install -r"
      " requirements-beam.txt"
    ) from error
  # Beam tells every step of a pipeline, and prints what it raises too.
  logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
  made = module.pipeline_options.PipelineOptions(
    [f"--runner={runner}", *(f"--{option}" for option in options)]
  )
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      made.get_all_options()
  except SystemExit as error:  # Of argparse, whose last line says why.
    reason = said.getvalue().strip().splitlines()[-1]
    raise UserError(f"--beam: {reason.partition('error: ')[2]}") from error
  return beam, made


class BeamEngine:
  """A context manager: an `Engine` whose work a Beam runner distributes."""

  def __init__(
    self, text: Text, runner: str, options: Sequence[str], *task: Any
  ):
    """Takes the corpus, how to run Beam, and what `start_worker` takes."""
    self._beam, self._options = load_beam(runner, options)
    self._runner, self._task = runner, _Task(text, *task)
    self._runs: list[Run] = []

  def __enter__(self) -> Self:
    _start.cache_clear()
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def scan(self) -> int:
    """See `Engine`."""
    files = range(len(self._task.text.paths))
    self._each("dividing", _measure, files, self._measured)
    costs = (
      chunks.read_arrays(self._task.path("costs", file))["costs"]
      for file in files
    )
    self._runs = divide(costs, self._task.text.characters)
    self._each_run("reading", _scan, self._scanned)
    self._raise_problem()
    count = sum(len(run.counts) for run in self._runs)
    self._compare("repeated", _digests, count)
    if self._task.near:
      self._compare("similar", _buckets, count)
    return count

  def read_scan(self, number: int) -> Mapping[str, np.ndarray]:
    """See `Engine`."""
    scan = chunks.read_arrays(chunks.scan_path(self._task.out, number))
    for kind in ("repeated", "similar")[: 2 if self._task.near else 1]:
      scan[kind] = np.zeros(len(scan["label"]), bool)
      path = self._task.path(kind, number)
      if path.exists():
        scan[kind][chunks.read_arrays(path)["records"]] = True
    return scan

  def sample(self, plan: Plan, enough: int) -> list[str]:
    """See `Engine`."""
    wanted = choose_sample(plan, enough)
    pairs = np.array(sorted(wanted), np.int64).reshape(-1, 2)
    chunk_W = np.searchsorted(plan.begin, pairs[:, 0], "right") - 1
    numbers = np.unique(chunk_W).tolist()
    for number in numbers:
      own = pairs[chunk_W == number] - [plan.begin[number], 0]
      chunks.write_arrays(self._task.path("wanted", number), records=own)
    self._each_run(
      "sampling", _sample, lambda n: n not in numbers or self._sampled(n)
    )
    texts = {}
    for number in numbers:
      own = json.loads(self._task.path("sample", number, "json").read_text())
      for place, text in own:
        texts[int(plan.begin[number]) + place] = text
    return [texts[number] for number, _ in wanted]

  def encode(self, plan: Plan) -> None:
    """See `Engine`."""
    for run in self._runs:
      for number in run.chunks:
        if not self._encoded(number):
          path = self._task.path("plan", number)
          chunks.write_arrays(path, **plan.of_chunk(number))
    self._each_run("tokenizing", _encode, self._encoded)

  def _measured(self, file: int) -> bool:
    return self._task.path("costs", file).exists()

  def _scanned(self, chunk: int) -> bool:
    return chunks.scan_path(self._task.out, chunk).exists()

  def _sampled(self, chunk: int) -> bool:
    return self._task.path("sample", chunk, "json").exists()

  def _encoded(self, chunk: int) -> bool:
    return chunks.encoded_path(self._task.out, chunk).exists()

  def _each_run(
    self,
    title: str,
    function: Callable[[_Task, Run], None],
    done: Callable[[int], bool],
  ) -> None:
    self._each(
      title, function, self._runs, lambda run: all(map(done, run.chunks))
    )

  def _each(
    self,
    title: str,
    function: Callable[[_Task, Any], None],
    jobs: Iterable[Any],
    done: Callable[[Any], bool],
  ) -> None:
    """Applies a function to the jobs that are not done, on many machines."""
    missing = [job for job in jobs if not done(job)]
    if not missing:
      return
    beam = self._beam

    def build(pipeline: Any) -> Any:
      return (
        pipeline
        | beam.Create(missing)
        | beam.Reshuffle()
        | "do" >> beam.Map(functools.partial(function, self._task))
      )

    self._run(f"{title} on {self._runner}: {len(missing)} parts", build)

  def _compare(
    self,
    kind: str,
    keys: Callable[["_Task", int], Iterator[tuple[Any, "_Place"]]],
    count: int,
  ) -> None:
    """Writes, by chunk, which records have a key that another has too."""
    beam, task = self._beam, self._task
    done = task.path(kind, count, "done")
    if done.exists():
      return

    def build(pipeline: Any) -> Any:
      return (
        pipeline
        | beam.Create(range(count))
        | beam.Reshuffle()
        | "keys" >> beam.FlatMap(functools.partial(keys, task))
        | "by key" >> beam.GroupByKey()
        | "shared" >> beam.FlatMap(_shared)
        | "by chunk" >> beam.GroupByKey()
        | "write" >> beam.Map(functools.partial(_write_records, task, kind))
      )

    self._run(f"finding {kind} texts on {self._runner}", build)
    storage.write_bytes(done, b"")

  def _run(self, title: str, build: Callable[[Any], Any]) -> None:
    try:
      with elapsed(title), self._beam.Pipeline(options=self._options) as p:
        build(p)
    except Exception as error:  # Of the runner; a worker's error is its text.
      # The last line of a traceback that is not part of a quotation.
      lines = [
        line
        for line in str(error).splitlines()
        if line.strip() and not line.startswith((" ", "\t", "[", "Traceback"))
      ]
      reason = lines[-1] if lines else type(error).__name__
      reason = reason.partition(" [while running")[0]
      raise UserError(
        f"{title} failed ({reason}); the same command resumes"
      ) from error

  def _raise_problem(self) -> None:
    """Raises the first error of the workers, as one machine would."""
    paths = sorted(Path(self._task.out, "work").glob("problem-*.txt"))
    if paths:
      message = paths[0].read_text(encoding="utf-8")
      for path in paths:
        path.unlink()
      raise UserError(message)


# --- Functions that run on the workers ---------------------------------------


@functools.lru_cache(maxsize=1)
def _start(out: str, rules: str, skip_bad: bool, near: Near | None) -> None:
  """Prepares a process for the functions of `chunks`."""
  # Beam runs several parts at once.
  os.environ["RAYON_NUM_THREADS"] = "1"
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  chunks.start_worker(out, rules, skip_bad, near)


def _measure(task: _Task, file: int) -> None:
  costs = task.text.costs(file)
  chunks.write_arrays(task.path("costs", file), costs=costs)


def _scan(task: _Task, run: Run) -> None:
  _start(*task[1:])
  for chunk in task.text.read_run(run):
    if chunks.scan_path(task.out, chunk.number).exists():
      continue
    try:
      chunks.scan(chunk)
    except UserError as error:
      # Beam would try again, and wrap the message; the driver reads this file.
      path = task.path("problem", chunk.number, "txt")
      storage.write_bytes(path, str(error).encode())
      return


def _sample(task: _Task, run: Run) -> None:
  for chunk in task.text.read_run(run):
    wanted = task.path("wanted", chunk.number)
    if not wanted.exists():
      continue
    records = chunk.records()
    pairs = chunks.read_arrays(wanted)["records"].tolist()
    found = [(place, records[place]["text"][:size]) for place, size in pairs]
    storage.write_json(task.path("sample", chunk.number, "json"), found)


def _encode(task: _Task, run: Run) -> None:
  _start(*task[1:])
  for chunk in task.text.read_run(run):
    if not chunks.encoded_path(task.out, chunk.number).exists():
      plan = chunks.read_arrays(task.path("plan", chunk.number))
      chunks.encode(chunks.Job.of_chunk(chunk, **plan))


_Place = tuple[int, int]


def _digests(task: _Task, number: int) -> Iterator[tuple[bytes, _Place]]:
  """Yields the text's digest and the place, (chunk, record), of each record."""
  for place, digest in enumerate(
    chunks.read_arrays(chunks.scan_path(task.out, number))["text"]
  ):
    yield digest.tobytes(), (number, place)


def _buckets(task: _Task, number: int) -> Iterator[tuple[Any, _Place]]:
  """Yields the buckets and the place of each record; see `near.Near`."""
  assert task.near is not None
  ranges = task.near.ranges()
  scan = chunks.read_arrays(chunks.scan_path(task.out, number))
  for place, signature in enumerate(scan["signature"]):
    for start, stop in ranges:
      yield (start, signature[start:stop].tobytes()), (number, place)


def _shared(group: tuple[Any, Iterable[_Place]]) -> Iterator[_Place]:
  """Yields the places of a key that has more than one."""
  places = list(group[1])
  if len(places) > 1:
    yield from places


def _write_records(
  task: _Task, kind: str, group: tuple[int, Iterable[int]]
) -> None:
  number, places = group
  records = np.unique(np.array(list(places), np.int64))
  chunks.write_arrays(task.path(kind, number), records=records)
