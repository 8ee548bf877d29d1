"""The metrics of a run, in `metrics.jsonl` and other places.

This module imports no JAX: reports and sweeps read metrics without a device.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from etils import epath

from edl_jax import storage
from edl_jax.config import UserError
from edl_jax.metric_writers import (
  METRICS_FILE,
  WRITERS,
  RunDescription,
  Writer,
)


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
  path = os.path.join(workdir, METRICS_FILE)
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
  """Appends metrics to metrics.jsonl in `workdir`, and to other places.

  A killed run may have written lines after its last checkpoint. The constructor
  drops the lines after `first_step`, so that the file of a resumed run equals
  that of an uninterrupted one.

  An object in a bucket cannot be appended to. If `workdir` is in a bucket, the
  files grow in a temporary folder, and `sync` uploads them.
  """

  def __init__(
    self,
    workdir: str,
    *,
    first_step: int = 0,
    writers: Sequence[str] = ("jsonl", "tensorboard"),
    run: RunDescription = RunDescription(),  # noqa: B008
  ):
    """Opens the files; creates `workdir` if it is missing.

    Args:
      workdir: folder of the run.
      first_step: step of the checkpoint that the run resumes from, 0 for none.
      writers: names of places, from `metric_writers.WRITERS`.
      run: what they may want to know of the run; its folder is `workdir`.

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
      _drop_after(workdir, first_step, os.path.join(folder, METRICS_FILE))
      run = run._replace(workdir=workdir)
      self._writers = [
        WRITERS[name](folder, first_step, run) for name in writers
      ]
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
    self._to_all(lambda writer: writer.write(step, scalars))

  def write_histograms(
    self, step: int, values: Mapping[str, np.ndarray]
  ) -> None:
    """Adds histograms of the elements of arrays, where a place has them.

    Raises:
      UserError: as `write`.
    """
    self._to_all(lambda writer: writer.write_histograms(step, values))

  def _to_all(self, write: Callable[[Writer], None]) -> None:
    with self._writing():
      for writer in self._writers:
        write(writer)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"cannot write metrics to {self._workdir}: {error.strerror}; make room"
        " and run the same command again: it resumes from the last checkpoint"
      ) from error

  def sync(self) -> None:
    """Uploads files that have grown; waits for the disk of a local `workdir`.

    Call this before writing a checkpoint: a run that resumes from it then finds
    the metrics up to its step, even if the power or the disk has failed.

    Raises:
      UserError: the bucket or the disk cannot be written.
    """
    if self._temporary is None:
      with self._writing():
        for name in (METRICS_FILE, ""):
          path = os.path.join(self._workdir, name)
          if os.path.exists(path):
            storage.flush(path)
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
    """Closes all places."""
    # Every write was flushed. Closing can only fail again for a line whose
    # failure `write` has reported. An upload that fails here loses metrics that
    # are newer than the last checkpoint.
    for writer in self._writers:
      with contextlib.suppress(OSError):
        writer.close()
    with contextlib.suppress(UserError):
      self.sync()
    if self._temporary is not None:
      self._temporary.cleanup()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


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
