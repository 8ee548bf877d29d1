"""The metrics of a run, in `metrics.jsonl` and TensorBoard.

This module imports no JAX: reports and sweeps read metrics without a device.
"""

import contextlib
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from etils import epath

from edl_jax import storage
from edl_jax.config import UserError

_METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, Any]]:
  """Reads `workdir`/metrics.jsonl, in the order written.

  An incomplete last line is ignored: the run was killed, or is still writing.

  Returns:
    One dict per line with "step" (int) and the values of that line (float); an
    empty list if there is no file.

  Raises:
    UserError: a line before the last is not a JSON object with a step.
  """
  return [values for _, values in _read_lines(workdir)]


def _read_lines(workdir: str) -> list[tuple[bytes, dict[str, Any]]]:
  """Returns every complete line of metrics.jsonl: its bytes, and its values."""
  path = os.path.join(workdir, _METRICS_FILE)
  if not epath.Path(path).exists():
    return []
  lines = epath.Path(path).read_bytes().splitlines(keepends=True)
  parsed = []
  for number, line in enumerate(lines, start=1):
    try:
      values = json.loads(line)
      if not isinstance(values["step"], int):
        raise TypeError("step")
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise UserError(
        f"{path}:{number}: not a JSON object with a step; delete that line"
      ) from error
    if line.endswith(b"\n"):
      parsed.append((line, values))
  return parsed


class MetricsWriter:
  """Appends scalars to metrics.jsonl and to TensorBoard, both in `workdir`.

  A killed run may have written lines after its last checkpoint. The constructor
  drops the lines after `first_step`, so that the file of a resumed run equals
  that of an uninterrupted one.

  An object in a bucket cannot be appended to. If `workdir` is in a bucket, both
  files grow in a temporary folder, and `sync` uploads them.
  """

  def __init__(self, workdir: str, *, first_step: int = 0):
    """Opens the files; creates `workdir` if it is missing.

    Args:
      workdir: folder of the run.
      first_step: step of the checkpoint that the run resumes from, 0 for none.

    Raises:
      UserError: `workdir` cannot be written.
    """
    self._workdir, folder = workdir, workdir
    self._temporary = None
    # Sizes of the uploaded files in bytes, by name.
    self._synced: dict[str, int] = {}
    try:
      if storage.in_bucket(workdir):
        self._temporary = tempfile.TemporaryDirectory()
        folder = self._temporary.name
      os.makedirs(folder, exist_ok=True)
      path = os.path.join(folder, _METRICS_FILE)
      _drop_after(workdir, first_step, path)
      self._file = open(path, "ab")  # noqa: SIM115
      self._tensorboard = _TensorBoard(
        os.path.join(folder, "tensorboard"),
        first_step,
        _names(os.path.join(workdir, "tensorboard")),
      )
      self.sync()
    except OSError as error:
      raise UserError(
        f"cannot write to {workdir}: {error.strerror}; choose another --workdir"
      ) from error

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Appends one line and flushes it.

    Args:
      step: optimizer steps taken so far.
      values: scalars by name. A float32 is written as the float64 of the same
        value; NaN and infinities are written as Python's json writes them.

    Raises:
      UserError: the disk is full or cannot be written any more.
    """
    scalars = {name: float(value) for name, value in values.items()}
    line = json.dumps({"step": int(step), **scalars}) + "\n"
    try:
      self._file.write(line.encode())
      self._file.flush()
      self._tensorboard.write(step, scalars)
    except OSError as error:
      raise UserError(
        f"cannot write metrics to {self._workdir}: {error.strerror}; make room"
        " and run the same command again: it resumes from the last checkpoint"
      ) from error

  def sync(self) -> None:
    """Uploads files that have grown; does nothing for a local `workdir`.

    Call this before writing a checkpoint: a run that resumes from it then finds
    the metrics up to its step.

    Raises:
      UserError: the bucket cannot be written.
    """
    if self._temporary is None:
      return
    for file in Path(self._temporary.name).rglob("*"):
      name = str(file.relative_to(self._temporary.name))
      if file.is_dir() or file.stat().st_size == self._synced.get(name):
        continue
      content = file.read_bytes()
      try:
        storage.write_bytes(f"{self._workdir}/{name}", content)
      except OSError as error:
        raise UserError(
          f"cannot write metrics to {self._workdir}: {error.strerror}; once the"
          " bucket can be written, run the same command again: it resumes from"
          " the last checkpoint"
        ) from error
      self._synced[name] = len(content)

  def close(self) -> None:
    """Closes both files."""
    # Every write was flushed. Closing can only fail again for a line whose
    # failure `write` has reported. An upload that fails here loses metrics that
    # are newer than the last checkpoint.
    for file in (self._file, self._tensorboard):
      with contextlib.suppress(OSError):
        file.close()
    with contextlib.suppress(UserError):
      self.sync()
    if self._temporary is not None:
      self._temporary.cleanup()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


_EVENTS = re.compile(r"events[.]out[.]tfevents[.][0-9]+[.]")


def _names(folder: str) -> list[str]:
  path = epath.Path(folder)
  return [each.name for each in path.iterdir()] if path.is_dir() else []


class _TensorBoard:
  """Writes TensorBoard's event files in the calling thread.

  tensorboardX.SummaryWriter has two faults for our use. It writes in a thread
  of its own, which dies on a full disk, and the run then hangs on its queue.
  And it names files by the time alone: two writers opened within one second
  share a name, so that a quick restart overwrites the events of the first.
  """

  def __init__(self, folder: str, first_step: int, others: Iterable[str]):
    # These load protobuf, which readers of metrics do not need.
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import RecordWriter

    os.makedirs(folder, exist_ok=True)
    # Any: protobuf makes the classes at import.
    events: Any = event_pb2
    summaries: Any = summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
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

  def _add(self, step: int, **content: Any) -> None:
    event = self._event(wall_time=time.time(), step=step, **content)
    self._file.write(event.SerializeToString())
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def _events_name(others: Iterable[str]) -> str:
  """Returns a name for an event file that sorts behind those of `others`.

  TensorBoard reads files in the order of their names, which begin with a time.
  The clock may stand behind that of an earlier process of the run.
  """
  times = [int(name.split(".")[3]) for name in others if _EVENTS.match(name)]
  now = max(int(time.time()), *(1 + each for each in times), 0)
  owner = f"{socket.gethostname()}.{uuid.uuid4().hex}"
  return f"events.out.tfevents.{now:010}.{owner}"


def _drop_after(workdir: str, first_step: int, path: str) -> None:
  """Writes the complete lines of `workdir` up to `first_step` to `path`."""
  kept = b"".join(
    line
    for line, values in _read_lines(workdir)
    if values["step"] <= first_step
  )
  present = os.path.getsize(path) if os.path.exists(path) else 0
  if present != len(kept):
    storage.write_bytes(path, kept)
