"""Progress lines: one live line on a terminal, plain lines elsewhere.

This module imports no JAX: data preparation needs no device.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import IO, TypeVar

_Item = TypeVar("_Item")

_ERASE = "\r\x1b[K"


class ProgressLine:
  """A line of text that a terminal rewrites in place.

  A stream that is no terminal gets every text as a line of its own.
  """

  def __init__(self, stream: IO[str] | None = None):
    """Writes to `stream`, by default stdout."""
    self._stream = sys.stdout if stream is None else stream
    self.live = self._stream.isatty()
    self._line = ""

  def show(self, line: str) -> None:
    """Replaces the live line, or prints `line`."""
    self._line = line
    if self.live:
      # A line wider than the terminal would wrap and could not be rewritten.
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"{_ERASE}{line[:width]}")
    else:
      self._stream.write(f"{line}\n")
    self._stream.flush()

  def print(self, text: str) -> None:
    """Prints `text` on lines of its own, above the live line, if any."""
    if self.live and self._line:
      self._stream.write(f"{_ERASE}{text}\n")
      self.show(self._line)
    else:
      self._stream.write(f"{text}\n")
      self._stream.flush()

  def close(self, *, erase: bool = False) -> None:
    """Ends the live line, which stays visible unless `erase`."""
    if self.live and self._line:
      self._stream.write(_ERASE if erase else "\n")
      self._stream.flush()
    self._line = ""


class Progress(ProgressLine):
  """The steps that a run has taken, with its latest figures."""

  def __init__(
    self, num_steps: int, first_step: int, stream: IO[str] | None = None
  ):
    """Starts at `first_step` of `num_steps`; `stream` defaults to stdout."""
    super().__init__(stream)
    self._num_steps = num_steps
    self.restart(first_step)

  def restart(self, step: int) -> None:
    """Measures the rate, and with it the ETA, from `step` and now on."""
    self._origin = (step, time.monotonic())

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows a step.

    Args:
      step: steps taken so far.
      values: scalars to show, in order, named by the last part of their keys;
        `tokens_per_second` is shown in its unit.
    """
    now = time.monotonic()
    parts = [
      f"step {step}/{self._num_steps}",
      f"{100 * step // self._num_steps}%",
    ]
    origin_step, origin_time = self._origin
    if step > origin_step:
      seconds_per_step = (now - origin_time) / (step - origin_step)
      seconds = seconds_per_step * (self._num_steps - step)
      parts.append(f"ETA {format_duration(seconds)}")
    for key, value in values.items():
      name = key.rpartition("/")[-1]
      if name == "tokens_per_second":
        parts.append(f"{format_quantity(value)} tokens/s")
      else:
        parts.append(f"{name} {value:.4g}")
    self.show("  ".join(parts))


class PartsProgress(ProgressLine):
  """The parts that a task has done, with its rate.

  The line is shown five times a second on a terminal, and every ten seconds
  elsewhere.
  """

  _unit, _scale, _digits = "parts", 1.0, 0

  def __init__(
    self,
    task: str,
    total: int | None = None,
    stream: IO[str] | None = None,
  ):
    """Starts at zero of `total`, if known; `stream` is stderr by default.

    Args:
      task: what is being done, such as "tokenizing"; opens the line.
      total: where the task ends; without it the line has no ETA.
      stream: where the line goes.
    """
    super().__init__(sys.stderr if stream is None else stream)
    self._task, self._total, self._done = task, total, 0
    self._start = self._shown = time.monotonic()

  def add(self, count: int) -> None:
    """Counts `count` more as done."""
    self._done += count
    now = time.monotonic()
    if now - self._shown < (0.2 if self.live else 10):
      return
    self._shown = now
    rate = self._done / (now - self._start)
    amount = self._amount(self._done)
    parts = [f"{self._task} {amount} {self._unit}"]
    if self._total:
      parts[0] = (
        f"{self._task} {amount}/{self._amount(self._total)} {self._unit}"
      )
      parts.append(f"{100 * self._done // self._total}%")
      if self._done:
        seconds = (self._total - self._done) / rate
        parts.append(f"ETA {format_duration(max(seconds, 0))}")
    parts.append(f"{rate / self._scale:.2f} {self._unit}/s")
    self.show("  ".join(parts))

  def _amount(self, count: int) -> str:
    return f"{count / self._scale:,.{self._digits}f}"


class BytesProgress(PartsProgress):
  """The bytes that a task has worked through."""

  _unit, _scale, _digits = "MB", 1e6, 1


def shown(task: str, items: Collection[_Item]) -> Iterator[_Item]:
  """Yields items, and shows on stderr how many are done; see `PartsProgress`.

  Args:
    task: what is being done; opens the line.
    items: to yield.
  """
  progress = PartsProgress(task, len(items))
  for item in items:
    yield item
    progress.add(1)
  progress.close(erase=True)


@contextlib.contextmanager
def elapsed(
  task: str, stream: IO[str] | None = None, after: float = 0
) -> Iterator[None]:
  """Shows `task` and the seconds that the block has taken so far.

  The seconds are shown every second on a terminal, whose line is erased when
  the block ends, and every 30 seconds elsewhere.

  Args:
    task: what the block does, such as "compiling".
    stream: where the line goes; stderr by default. Nothing else may write to
      it while the block runs.
    after: seconds before anything is shown.
  """
  line = ProgressLine(sys.stderr if stream is None else stream)
  ended = threading.Event()
  start = time.monotonic()

  def count() -> None:
    if after:
      if ended.wait(after):
        return
      line.show(f"{task} ...")
    while not ended.wait(1 if line.live else 30):
      line.show(f"{task} ... {time.monotonic() - start:.0f} s")

  if not after:
    line.show(f"{task} ...")
  thread = threading.Thread(target=count, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    line.close(erase=True)


def format_duration(seconds: float) -> str:
  """Formats seconds as 1:02:03, or 2:03 below an hour."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{rest:02}"
  return f"{minutes}:{rest:02}"


def format_quantity(value: float) -> str:
  """Formats a rate or a size as 950, 12.3k, 4.6M or 15.1G."""
  for suffix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= scale:
      return f"{value / scale:.1f}{suffix}"
  return f"{value:.0f}"
