"""Processes that the campaign starts: forked copies of itself.

The campaign has imported everything that a run imports, which saves a run a
fifth of its time. It never uses a device, so that a copy can start its own.
"""

import os
import pathlib
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping

_SECONDS_BETWEEN = 0.02


class Child:
  """A process that does a piece of work; its stderr goes to a file.

  Attributes:
    pid: its id.
    returncode: its exit code, minus the number of the signal that ended it, or
      None while it runs.
    largest_file: the bytes beyond which it can write no file, if any.
  """

  def __init__(
    self,
    work: Callable[[], int | None],
    errors: pathlib.Path,
    environment: Mapping[str, str],
    largest_file: int | None = None,
  ):
    """Starts the process.

    Args:
      work: what it does; returns its exit code.
      errors: the file for what it prints on stderr.
      environment: variables that it has beside this process's.
      largest_file: the bytes beyond which it can write no file, as on a full
        disk.
    """
    self._errors, self.largest_file = errors, largest_file
    self.returncode: int | None = None
    sys.stdout.flush()
    self.pid = os.fork()
    if not self.pid:
      _become(work, errors, environment, largest_file)

  def poll(self) -> int | None:
    """Returns the exit code, None while it runs."""
    if self.returncode is None:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        self.returncode = os.waitstatus_to_exitcode(status)
    return self.returncode

  def wait(self, timeout: float) -> int:
    """Returns the exit code once it has ended.

    Raises:
      TimeoutError: it runs for more than `timeout` seconds; it is killed.
    """
    end = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > end:
        self.send_signal(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.returncode = -signal.SIGKILL
        raise TimeoutError(f"it did not end within {timeout:.0f} s")
      time.sleep(_SECONDS_BETWEEN)
    assert self.returncode is not None, "it has ended"
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal, unless the process has ended."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def take_errors(self) -> str:
    """Returns what it has printed on stderr, and removes the file."""
    text = self._errors.read_text(errors="replace")
    self._errors.unlink()
    return text


def _become(
  work: Callable[[], int | None],
  errors: pathlib.Path,
  environment: Mapping[str, str],
  largest_file: int | None,
) -> None:
  """Does the work of a child, and ends."""
  code = 1
  try:
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(environment)
    if largest_file is not None:
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      bounds = (largest_file, largest_file)
      resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    code = work() or 0
  except BaseException:
    traceback.print_exc()
  finally:
    # Not the way out of the campaign, which would remove its folder.
    sys.stderr.flush()
    os._exit(code)
