"""The figures of a run: `metrics.jsonl` and TensorBoard.

Imports no JAX: reports and sweeps read metrics without starting a device.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from etils import epath

from edl_jax import storage
from edl_jax.config import UserError

_METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, Any]]:
  """Reads `workdir`/metrics.jsonl in the order written.

  A last line that is incomplete, because the run was killed or is still
  writing, is left out.

  Returns:
    One dict a line: "step" (int) and its values (float); empty without a file.

  Raises:
    UserError: a line before the last is not a JSON object with a step.
  """
  return [values for _, values in _read_lines(workdir)]


def _read_lines(workdir: str) -> list[tuple[bytes, dict[str, Any]]]:
  """Returns every complete line of metrics.jsonl, as it is and parsed."""
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

  On construction everything after `first_step` is dropped, which a killed run
  may have written after its last checkpoint; so the file of a resumed run
  equals that of one that was never interrupted.

  Objects in a bucket cannot be added to: there both files grow in a temporary
  folder, and `sync` replaces the objects.
  """

  def __init__(self, workdir: str, *, first_step: int = 0):
    """Opens the files, making `workdir` where needed.

    Args:
      workdir: folder of the run.
      first_step: step of the checkpoint the run goes on from, 0 for a new run.

    Raises:
      UserError: `workdir` cannot be written.
    """
    self._workdir, folder = workdir, workdir
    self._temporary = None
    # Bytes of the files that the bucket has, by their names.
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
        os.path.join(folder, "tensorboard"), first_step
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
      values: scalars by name; float32 values are written as the float64 that
        equals them. NaN and infinities are written as Python's json does.

    Raises:
      UserError: the disk is full or gone.
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
        " and start again, the run goes on from its last checkpoint"
      ) from error

  def sync(self) -> None:
    """Writes to a bucket what is new; files of this machine have it already.

    To be called before a checkpoint is written, so that whoever goes on from
    it finds the figures up to its step.

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
          f"cannot write metrics to {self._workdir}: {error.strerror}; once it"
          " can, the same command goes on from the last checkpoint"
        ) from error
      self._synced[name] = len(content)

  def close(self) -> None:
    """Closes both files."""
    # Every write was flushed: all that can be left, and fail again, is a line
    # whose failure `write` has reported; or, in a bucket, what no checkpoint
    # has either.
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


class _TensorBoard:
  """Event files written in this thread.

  tensorboardX.SummaryWriter writes in a thread of its own: on a full disk that
  thread dies and the run hangs on its queue; and two writers opened within one
  second share a file name, so a quick restart loses the first one's events.
  """

  def __init__(self, folder: str, first_step: int):
    # Loads protobuf, which readers of this module do not need.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    os.makedirs(folder, exist_ok=True)
    self._event, self._summary = Event, Summary
    self._events = EventsWriter(
      os.path.join(folder, "events"), filename_suffix=f".{time.time_ns()}"
    )
    # Hides events of this step and later in the files of a killed run.
    self._add(first_step + 1, session_log=SessionLog(status=SessionLog.START))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(step, summary=self._summary(value=values))

  def _add(self, step: int, **content: Any) -> None:
    self._events.write_event(
      self._event(wall_time=time.time(), step=step, **content)
    )
    self._events.flush()

  def close(self) -> None:
    self._events.close()


def _drop_after(workdir: str, first_step: int, path: str) -> None:
  """Leaves at `path` the complete lines up to `first_step`, all or nothing."""
  kept = b"".join(
    line
    for line, values in _read_lines(workdir)
    if values["step"] <= first_step
  )
  present = os.path.getsize(path) if os.path.exists(path) else 0
  if present != len(kept):
    storage.write_bytes(path, kept)
