"""Prepares text by Apache Beam: the same folder, by many machines.

Each step of `data.prepare` is a pipeline over the parts of the corpus that have
no result yet. Results are files in the folder's work/, which all workers must
see, on a shared disk or in a bucket; so a job that was killed resumes. Workers
write the same files by the same functions, which is why the result has the same
bytes.
"""

import contextlib
import functools
import importlib
import io
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
  Set,
)
from typing import Any, NamedTuple, Self

import numpy as np
from etils import epath

from data import chunks
from data.engines import choose_sample
from data.near import Near
from data.plan import Plan
from data.runs import Run, Text, divide
from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.progress import PartsProgress, elapsed

_RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


class _Task(NamedTuple):
  """What every worker needs to know."""

  text: Text
  # Arguments of `chunks.start_worker`.
  out: str
  rules: str
  skip_bad: bool
  near: Near | None

  def path(self, kind: str, number: int, suffix: str = "npz") -> epath.Path:
    """Returns the path of an intermediate result of a file or a chunk."""
    return epath.Path(self.out, "work", f"{kind}-{number:05}.{suffix}")

  def done(self) -> set[str]:
    """Returns the names of the results that there are."""
    return storage.names(epath.Path(self.out, "work"))


def load_beam(runner: str, options: Sequence[str]) -> tuple[Any, Any]:
  """Returns Beam's module and its options.

  Raises:
    UserError: there is no such runner, Beam is not installed, or an option has
      a value that it does not take.
  """
  if runner not in _RUNNERS:
    raise UserError(
      f"--runner={runner}: must be local or one of {', '.join(_RUNNERS)}"
    )
  try:
    # Any: Beam is optional, and types are checked without it.
    beam: Any = importlib.import_module("apache_beam")
    module: Any = importlib.import_module("apache_beam.options")
    importlib.import_module("apache_beam.options.pipeline_options")
    if runner == "DataflowRunner":
      importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")
  except ImportError as error:
    way_out = "pip install -r requirements-beam.txt"
    if runner == "DataflowRunner":
      way_out += " 'apache-beam[gcp]'"
    raise UserError(
      f"--runner={runner} needs the package apache-beam: {way_out}"
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
    # Names of results, once records have been compared.
    self._compared = set[str]()

  def __enter__(self) -> Self:
    _start.cache_clear()
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def scan(self) -> int:
    """See `Engine`."""
    files = range(len(self._task.text.paths))
    self._each(
      "dividing",
      _measure,
      {file: [self._task.path("costs", file).name] for file in files},
    )
    costs = chunks.in_threads(
      lambda file: chunks.read_arrays(self._task.path("costs", file))["costs"],
      files,
    )
    self._runs = divide(costs, self._task.text.characters)
    self._each_run("reading", _scan, "scan")
    self._raise_problem()
    count = sum(len(run.counts) for run in self._runs)
    self._compare("repeated", _digests, count)
    if self._task.near:
      self._compare("similar", _buckets, count)
    self._compared = self._task.done()
    return count

  def read_scan(self, number: int) -> Mapping[str, np.ndarray]:
    """See `Engine`."""
    scan = chunks.read_arrays(chunks.scan_path(self._task.out, number))
    for kind in ("repeated", "similar")[: 2 if self._task.near else 1]:
      scan[kind] = np.zeros(len(scan["label"]), bool)
      path = self._task.path(kind, number)
      if path.name in self._compared:
        scan[kind][chunks.read_arrays(path)["records"]] = True
    return scan

  def sample(self, plan: Plan, enough: int) -> list[str]:
    """See `Engine`."""
    wanted = choose_sample(plan, enough)
    pairs = np.array(sorted(wanted), np.int64).reshape(-1, 2)
    chunk_W = np.searchsorted(plan.begin, pairs[:, 0], "right") - 1
    numbers = np.unique(chunk_W).tolist()

    def want(number: int) -> None:
      own = pairs[chunk_W == number] - [plan.begin[number], 0]
      chunks.write_arrays(self._task.path("wanted", number), records=own)

    deque(chunks.in_threads(want, numbers), maxlen=0)
    self._each_run("sampling", _sample, "sample", "json", set(numbers))
    texts = {}
    for number, own in zip(numbers, chunks.in_threads(self._sampled, numbers)):
      for place, text in own:
        texts[int(plan.begin[number]) + place] = text
    return [texts[number] for number, _ in wanted]

  def _sampled(self, number: int) -> list[tuple[int, str]]:
    path = self._task.path("sample", number, "json")
    return json.loads(storage.read_bytes(path))

  def encode(self, plan: Plan) -> None:
    """See `Engine`."""
    done = self._task.done()

    def write(number: int) -> None:
      path = self._task.path("plan", number)
      chunks.write_arrays(path, **plan.of_chunk(number))

    missing = (
      number
      for run in self._runs
      for number in run.chunks
      if self._task.path("documents", number).name not in done
    )
    deque(chunks.in_threads(write, missing), maxlen=0)
    self._each_run("tokenizing", _encode, "documents")

  def _each_run(
    self,
    title: str,
    function: Callable[[_Task, Run], None],
    kind: str,
    suffix: str = "npz",
    only: Container[int] | None = None,
  ) -> None:
    """Applies a function to runs; it leaves a result of `kind` for each chunk.

    Args:
      title: what is being done.
      function: to apply.
      kind: of the results; see `_Task.path`.
      suffix: of the results.
      only: the chunks that get a result. None: all.
    """
    self._each(
      title,
      function,
      {
        run: [
          self._task.path(kind, number, suffix).name
          for number in run.chunks
          if only is None or number in only
        ]
        for run in self._runs
      },
    )

  def _each(
    self,
    title: str,
    function: Callable[[_Task, Any], None],
    results: Mapping[Any, Sequence[str]],
  ) -> None:
    """Applies a function to the jobs that are not done, on many machines.

    Args:
      title: what is being done.
      function: to apply.
      results: the names in work/ of what each job leaves there.
    """
    done = self._task.done()
    missing = [job for job, names in results.items() if not done >= set(names)]
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

    wanted = {name for job in missing for name in results[job]} - done
    self._run(
      title, build, lambda: _polled(self._on(title), wanted, self._task.done)
    )

  def _on(self, title: str) -> str:
    return f"{title} on {self._runner}"

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

    title = f"finding {kind} texts"
    self._run(title, build, lambda: elapsed(self._on(title)))
    storage.write_bytes(done, b"")

  def _run(
    self,
    title: str,
    build: Callable[[Any], Any],
    progress: Callable[[], contextlib.AbstractContextManager[None]],
  ) -> None:
    try:
      with progress(), self._beam.Pipeline(options=self._options) as p:
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
        f"{self._on(title)} failed ({reason}); the same command resumes"
      ) from error

  def _raise_problem(self) -> None:
    """Raises the first error of the workers, as one machine would."""
    names = sorted(n for n in self._task.done() if n.startswith("problem-"))
    if names:
      paths = [epath.Path(self._task.out, "work", name) for name in names]
      message = storage.read_bytes(paths[0]).decode()
      for path in paths:
        path.unlink()
      raise UserError(message)


@contextlib.contextmanager
def _polled(
  title: str, wanted: Set[str], done: Callable[[], Set[str]]
) -> Iterator[None]:
  """Shows how many of the wanted results there are while the block runs."""
  progress = PartsProgress(title, len(wanted))
  progress.show(f"{title}: {len(wanted):,} parts")
  ended = threading.Event()

  def poll() -> None:
    count, pause = 0, 1.0
    while not ended.wait(pause):
      start = time.monotonic()
      with contextlib.suppress(OSError):
        found = len(wanted & done())
        progress.add(found - count)
        count = found
      # A bucket lists a thousand names a request, so this may take seconds.
      pause = max(1.0, 10 * (time.monotonic() - start))

  thread = threading.Thread(target=poll, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    progress.close(erase=True)


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
