"""What a program prints to: streams that are closed, full or not UTF-8.

A wrong stdout is no wrong --workdir: these errors name the stream, and a run
that trains for days goes on without it.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from edl_jax.config import UserError


def prepare_streams() -> None:
  """Makes sure that the three standard streams exist and take any character.

  A closed stream (`>&-`) becomes /dev/null: otherwise the next file that opens
  would get its number, and what is printed. Characters that the encoding lacks
  are written as escapes.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # The lowest free number, which is this.
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError, ValueError):
      stream.reconfigure(errors="backslashreplace")  # pyright: ignore


class _Output:
  """A stream that is silenced when it cannot be written."""

  def __init__(self, stream: Any, failed: Callable[[OSError], None]):
    """Takes the stream, and what to do with its first error."""
    self._stream, self._failed = stream, failed

  @property
  def unwrapped(self) -> Any:
    """The stream itself."""
    return self._stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._watched():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._watched():
      self._stream.flush()

  @contextlib.contextmanager
  def _watched(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      silence(self._stream)
      self._failed(error)


def silence(stream: Any) -> None:
  """Sends what a stream still holds, and what comes, to nowhere.

  Python flushes stdout once more at its end, which must not fail again.
  """
  with contextlib.suppress(OSError, ValueError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def named_stdout(*, lasting: bool = False) -> Iterator[None]:
  """Makes errors of stdout name it.

  Args:
    lasting: whether to go on without stdout instead, with a line on stderr.

  Raises:
    BrokenPipeError: the reader, such as `head`, has seen enough.
    UserError: stdout cannot be written for another reason.
  """

  def failed(error: OSError) -> None:
    reason = error.strerror or type(error).__name__
    if lasting:
      print(
        f"stdout cannot be written any more ({reason}); going on without",
        file=sys.stderr,
        flush=True,
      )
    elif isinstance(error, BrokenPipeError):
      raise error
    else:
      raise UserError(f"stdout cannot be written: {reason}") from error

  before = sys.stdout
  stream = before.unwrapped if isinstance(before, _Output) else before
  sys.stdout = _Output(stream, failed)
  try:
    yield
  finally:
    sys.stdout = before


@contextlib.contextmanager
def lasting_stderr() -> Iterator[None]:
  """Lets a program go on, and keep its exit code, without a stderr."""
  before = sys.stderr
  if not isinstance(before, _Output):
    sys.stderr = _Output(before, lambda error: None)
  try:
    yield
  finally:
    sys.stderr = before
