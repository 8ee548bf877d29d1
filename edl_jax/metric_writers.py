"""Where metrics go: one interface, and a class for each place.

This module imports no JAX. To add a place, write its class and enter it in
`WRITERS`; `metrics.writers` then knows its name.
"""

import importlib.util
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.fields import nearest

METRICS_FILE = "metrics.jsonl"


class RunDescription(NamedTuple):
  """What a place may want to know of a run before its first metrics."""

  # The run's folder; that of its files may be another, if it is in a bucket.
  workdir: str = ""
  name: str = ""
  project: str = "edl_jax"
  # Settings by their dotted path, git revision and versions.
  record: Mapping[str, Any] = {}


class Writer(Protocol):
  """A place for metrics. Methods raise OSError if it cannot be written."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds scalars of a step."""
    ...

  def write_histograms(
    self, step: int, values: Mapping[str, np.ndarray]
  ) -> None:
    """Adds the distribution of the elements of each array."""
    ...

  def close(self) -> None:
    """Ends writing."""
    ...


class JsonLines:
  """Appends an object a line to metrics.jsonl; it has no histograms."""

  def __init__(self, folder: str, first_step: int, run: RunDescription):
    del first_step, run
    path = os.path.join(folder, METRICS_FILE)
    self._file = open(path, "ab")  # noqa: SIM115

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    line = json.dumps({"step": int(step), **scalars}) + "\n"
    self._file.write(line.encode())
    self._file.flush()

  def write_histograms(
    self, step: int, values: Mapping[str, np.ndarray]
  ) -> None:
    del step, values

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """Writes TensorBoard's event files in the calling thread.

  tensorboardX.SummaryWriter has two faults for our use. It writes in a thread
  of its own, which dies on a full disk, and the run then hangs on its queue.
  And it names files by the time alone: two writers opened within one second
  share a name, so that a quick restart overwrites the events of the first.
  """

  def __init__(self, folder: str, first_step: int, run: RunDescription):
    # These load protobuf, which readers of metrics do not need.
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import RecordWriter

    others = _names(os.path.join(run.workdir or folder, "tensorboard"))
    folder = os.path.join(folder, "tensorboard")
    os.makedirs(folder, exist_ok=True)
    # Any: protobuf makes the classes at import.
    events: Any = event_pb2
    summaries: Any = summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
    self._histogram = summaries.HistogramProto
    self._file: Any = RecordWriter(os.path.join(folder, _events_name(others)))
    self._add(0, file_version="brain.Event:2")
    # TensorBoard then hides events of this step and later in older files.
    self._add(
      first_step + 1,
      session_log=events.SessionLog(status=events.SessionLog.START),
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(step, summary=self._summary(value=values))

  def write_histograms(
    self, step: int, values: Mapping[str, np.ndarray]
  ) -> None:
    found = []
    for name, x in values.items():
      counts, edges = _buckets(x)
      histogram = self._histogram(
        min=float(x.min()),
        max=float(x.max()),
        num=float(x.size),
        sum=float(x.sum()),
        sum_squares=float(np.square(x).sum()),
        bucket_limit=[float(edge) for edge in edges[1:]],
        bucket=[float(count) for count in counts],
      )
      found.append(self._summary.Value(tag=name, histo=histogram))
    self._add(step, summary=self._summary(value=found))

  def _add(self, step: int, **content: Any) -> None:
    event = self._event(wall_time=time.time(), step=step, **content)
    self._file.write(event.SerializeToString())
    self._file.flush()

  def close(self) -> None:
    self._file.close()


_EVENTS = re.compile(r"events[.]out[.]tfevents[.][0-9]+[.]")


def _names(folder: str) -> list[str]:
  path = epath.Path(folder)
  return [each.name for each in path.iterdir()] if path.is_dir() else []


def _events_name(others: Iterable[str]) -> str:
  """Returns a name for an event file that sorts behind those of `others`.

  TensorBoard reads files in the order of their names, which begin with a time.
  The clock may stand behind that of an earlier process of the run.
  """
  times = [int(name.split(".")[3]) for name in others if _EVENTS.match(name)]
  now = max(int(time.time()), *(1 + each for each in times), 0)
  owner = f"{socket.gethostname()}.{uuid.uuid4().hex}"
  return f"events.out.tfevents.{now:010}.{owner}"


class WeightsAndBiases:
  """Logs to Weights & Biases; WANDB_MODE and WANDB_API_KEY say how.

  A resumed run continues the one that its folder names. W&B ignores what it
  gets again for steps behind the last checkpoint, which are the same numbers.
  """

  def __init__(self, folder: str, first_step: int, run: RunDescription):
    import wandb  # pyright: ignore[reportMissingImports]

    del first_step
    self._wandb = wandb
    path = os.path.join(run.workdir or folder, "wandb_run.txt")
    if not epath.Path(path).exists():
      storage.write_bytes(path, uuid.uuid4().hex.encode())
    self._run = wandb.init(
      project=run.project,
      name=run.name or None,
      id=epath.Path(path).read_text(),
      resume="allow",
      dir=folder,
      config=dict(run.record),
      settings=wandb.Settings(silent=True),
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=int(step))

  def write_histograms(
    self, step: int, values: Mapping[str, np.ndarray]
  ) -> None:
    made = {
      name: self._wandb.Histogram(np_histogram=_buckets(x))
      for name, x in values.items()
    }
    self._run.log(made, step=int(step))

  def close(self) -> None:
    self._run.finish()


WRITERS: dict[str, Callable[[str, int, RunDescription], Writer]] = {
  "jsonl": JsonLines,
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
}


def writer_names(text: str) -> list[str]:
  """Returns the places that `metrics.writers` asks for, metrics.jsonl first.

  Raises:
    UserError: a name is unknown or comes twice, or what a place needs is not
      installed.
  """
  names = ["jsonl", *filter(None, map(str.strip, text.split(",")))]
  shown = f"metrics.writers={text}"
  for name in names:
    if name not in WRITERS:
      raise UserError(f"{shown}: {name!r}: {nearest(name, WRITERS)}")
  if len(set(names)) < len(names):
    raise UserError(f"{shown}: names a place twice (metrics.jsonl is one)")
  if "wandb" in names and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"{shown}: wandb is not installed: python -m pip install -r"
      " requirements-wandb.txt"
    )
  return names


def _buckets(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the counts and the edges of 30 buckets of equal width."""
  return np.histogram(np.asarray(x, np.float64).reshape(-1), bins=30)
