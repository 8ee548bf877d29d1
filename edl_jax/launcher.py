"""Runs commands as processes, side by side on shares of the cores."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Self, TypeVar

from edl_jax.config import UserError

T = TypeVar("T")


class StoppedError(Exception):
  """A signal arrived, and all processes have ended."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


class Launcher:
  """Runs processes side by side and forwards signals to them."""

  _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  # Time between two looks at the processes.
  _SECONDS = 0.05

  def __init__(self) -> None:
    self._before: dict[signal.Signals, Any] = {}
    self._running = False
    # The running processes by the number of their share of the cores.
    self._processes: dict[int, subprocess.Popen[bytes]] = {}
    self._received: int | None = None

  def __enter__(self) -> Self:
    self._before = {
      number: signal.getsignal(number) for number in self._SIGNALS
    }
    for number, handler in self._before.items():
      # nohup has SIGHUP ignored; keep it so.
      if number != signal.SIGHUP or handler != signal.SIG_IGN:
        signal.signal(number, self._receive)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame: Any) -> None:
    del frame
    self._received = number
    if not self._running:
      raise StoppedError(number)
    for process in self._processes.values():
      process.send_signal(number)

  def run(
    self,
    commands: Iterable[tuple[T, Sequence[str], str]],
    lock: IO[str],
    jobs: int = 1,
  ) -> Iterator[tuple[T, int]]:
    """Runs commands, each to its end, `jobs` at a time.

    A command gets a process group of its own, so that Ctrl-C reaches it only
    once, through this process.

    Args:
      commands: what names it, its arguments, and the file that takes its
        output, "" for this process's own.
      lock: what each process holds while it lives.
      jobs: how many run side by side, each on its own share of the cores.

    Yields:
      The name of each command that has ended, and its exit code, or minus the
      signal that ended it.

    Raises:
      StoppedError: a signal arrived, and all commands have ended.
      UserError: there are fewer cores than jobs.
    """
    shares = core_shares(jobs)
    self._running = True
    waiting = iter(commands)
    names: dict[int, T] = {}
    while True:
      free = [s for s in range(jobs) if s not in self._processes]
      while free and self._received is None:
        following = next(waiting, None)
        if following is None:
          break
        name, arguments, output = following
        names[free[0]] = name
        share = free.pop(0)
        self._start(share, shares[share], arguments, output, lock)
      if not self._processes:
        break
      time.sleep(self._SECONDS)
      for share, process in list(self._processes.items()):
        code = process.poll()
        if code is not None:
          del self._processes[share]
          if self._received is None:
            yield names[share], code
    self._running = False
    if self._received is not None:
      raise StoppedError(self._received)

  def _start(
    self,
    share: int,
    cores: set[int],
    arguments: Sequence[str],
    output: str,
    lock: IO[str],
  ) -> None:
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(open(output, "ab")) if output else None
      process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file and subprocess.STDOUT,
        process_group=0,
        pass_fds=[lock.fileno()],
      )
    self._processes[share] = process
    # Its threads start later and inherit this.
    if cores and hasattr(os, "sched_setaffinity"):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, cores)
    # Forward a signal that arrived while the process was starting.
    if self._received is not None:
      process.send_signal(self._received)


def core_shares(jobs: int) -> list[set[int]]:
  """Divides the cores that this process may use among `jobs` processes.

  Returns:
    A set of cores for each, none of which overlap; empty sets, which mean no
    restriction, for one process and where the system cannot restrict.

  Raises:
    UserError: there are fewer cores than processes.
  """
  if not hasattr(os, "sched_getaffinity") or jobs == 1:
    return [set() for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  if jobs > len(cores):
    raise UserError(f"--jobs={jobs}: there are only {len(cores)} cores")
  return [set(cores[share::jobs]) for share in range(jobs)]


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[IO[str]]:
  """Locks `workdir`; waits for other sweeps and for runs that they left."""
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, ".lock"), "w")  # noqa: SIM115
  except OSError as error:
    raise UserError(
      f"cannot write to {workdir}: {error.strerror}; choose another --workdir"
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for a run that is still active in {workdir}", flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield file
