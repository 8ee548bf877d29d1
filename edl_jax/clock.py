"""Where the seconds of a run go: steps, input, compilation, checkpoints."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from edl_jax import storage

_FOLDER = "processes"


class Clock:
  """Measures training steps, and what else takes time in a process.

  The caller excludes the time of compilation, evaluation and checkpoints from
  that of steps.

  Attributes:
    seconds: seconds of this process so far by what took them: those that were
      excluded, "input", in which no input was ready, and "steps", all else
      between two steps.
  """

  def __init__(
    self,
    tokens_per_step: int,
    step: int,
    peak_rate: float | None = None,
    compiled: float = 0.0,
  ):
    """Starts after step number `step`.

    Args:
      tokens_per_step: tokens of a global batch.
      step: number of the last step that was taken.
      peak_rate: steps per second at which the devices would work at their
        published peak; None if that is unknown.
      compiled: seconds of compilation before the start.
    """
    self._tokens_per_step = tokens_per_step
    self._peak_rate = peak_rate
    self._first_step = step
    self._began = time.monotonic() - compiled
    self.seconds = {"steps": 0.0, "input": 0.0}
    if compiled:
      self.seconds["compile"] = compiled
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts to measure after step number `step`."""
    self._step = step
    self._start = self._last = time.monotonic()
    self._waited = 0.0
    self._steps: list[float] = []

  def exclude(self, started: float, what: str) -> None:
    """Leaves out the time since `started`, a value of `time.monotonic`."""
    seconds = time.monotonic() - started
    self._start += seconds
    self._last += seconds
    self.seconds[what] = self.seconds.get(what, 0.0) + seconds

  def add_wait(self, seconds: float) -> None:
    """Counts `seconds` as time in which no input was ready."""
    self._waited += seconds
    self.seconds["input"] += seconds

  def end_step(self) -> None:
    """Notes that the loop has worked through one more step."""
    now = time.monotonic()
    self._steps.append(now - self._last)
    self.seconds["steps"] += now - self._last
    self._last = now

  def read(self, step: int) -> dict[str, float]:
    """Returns the figures since the last restart, and restarts."""
    seconds = max(time.monotonic() - self._start, 1e-9)
    steps_per_second = (step - self._step) / seconds
    figures = {
      "train/tokens_per_second": steps_per_second * self._tokens_per_step,
      "train/input_wait_fraction": min(self._waited / seconds, 1.0),
      **step_seconds(self._steps),
    }
    if self._peak_rate is not None:
      figures["train/mfu"] = steps_per_second / self._peak_rate
    self.restart(step)
    return figures

  def record(self, step: int) -> dict[str, Any]:
    """Returns what `write_record` keeps of this process."""
    return {
      "first_step": self._first_step,
      "step": step,
      "wall": time.monotonic() - self._began,
      "cpu": time.process_time(),
      "seconds": dict(self.seconds),
    }


def step_seconds(steps: Sequence[float]) -> dict[str, float]:
  """Returns the median, the 90th percentile and the largest of step times."""
  if not steps:
    return {}
  median, high = np.percentile(steps, [50, 90])
  return {
    "time/step_median": float(median),
    "time/step_90": float(high),
    "time/step_max": float(max(steps)),
  }


def write_record(workdir: str, name: str, record: Mapping[str, Any]) -> None:
  """Writes the record of the process `name` so far, in place of its last."""
  folder = os.path.join(workdir, _FOLDER)
  storage.make_folder(folder)
  storage.write_json(os.path.join(folder, f"{name}.json"), record)


def read_records(workdir: str) -> Iterator[dict[str, Any]]:
  """Yields the records of a run's processes, in the order of their start."""
  folder = epath.Path(workdir, _FOLDER)
  if folder.exists():
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
      yield json.loads(path.read_text())


def goodput(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Adds up the processes that a run took.

  Returns:
    "processes", their number; "wall_seconds" in all; "cpu_seconds", which the
    operating system counted for their threads; "seconds" by what took them; and
    "goodput", the share of wall time that went into steps that the run kept. A
    process that was killed may have taken steps behind its last checkpoint:
    these were taken again, and do not count.
  """
  useful = wall = 0.0
  seconds: dict[str, float] = {}
  for number, record in enumerate(records):
    wall += record["wall"]
    for name, value in record["seconds"].items():
      seconds[name] = seconds.get(name, 0.0) + value
    first, last = record["first_step"], record["step"]
    later = [other["first_step"] for other in records[number + 1 :]]
    kept = min([last, *later]) - first
    steps = record["seconds"]["steps"]
    useful += steps * max(kept, 0) / max(last - first, 1)
  return {
    "processes": len(records),
    "wall_seconds": wall,
    # Records of older versions lack it.
    "cpu_seconds": sum(record.get("cpu", 0.0) for record in records),
    "seconds": seconds,
    "goodput": useful / wall if wall else 0.0,
  }
