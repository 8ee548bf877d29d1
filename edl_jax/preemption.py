"""Signals that ask a run to end, after a checkpoint."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """A signal asked the process to end, after which it wrote a checkpoint.

  Attributes:
    signal: the number of the signal.
  """

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.signal = number


@contextlib.contextmanager
def requests_to_end() -> Iterator[Callable[[int], int | None]]:
  """Catches the signals that ask the process to end.

  These are SIGTERM, SIGINT, and SIGHUP of a closed terminal, which `nohup` has
  ignored.

  A second signal of the same kind ends the process at once. With several
  processes only SIGTERM is caught: JAX notes it in any one of them, and all
  agree on a step that none has passed.

  Yields:
    A function of the step just taken. It returns the signal's number if the
    run must end after this step, and None otherwise.
  """
  if jax.process_count() > 1:

    def agreed(step: int) -> int | None:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else None

    yield agreed
    return
  noted: list[int] = []
  previous = {}

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    noted.append(number)
    signal.signal(number, previous[number])

  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    before = signal.getsignal(number)
    if before != signal.SIG_IGN:
      previous[number] = before
      signal.signal(number, note)
  try:
    yield lambda step: noted[0] if noted else None
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
