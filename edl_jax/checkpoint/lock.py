"""The lock of a run's folder: two runs must not write the same files.

The kernel holds it and lets go when its owner ends, however it ends, so that
the next run takes over what a killed one left. Where the file system has no
locks, the file alone decides: a process of this host that lives owns it. A
bucket has no locks at all, and runs in one are not kept apart.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from edl_jax import storage
from edl_jax.config import UserError

_NAME = ".lock"
# Whoever looks at a lock holds it for an instant.
_TRIALS, _PAUSE_SECONDS = 5, 0.1


def check_unlocked(workdir: str) -> None:
  """Raises UserError if a run that lives is writing `workdir`."""
  path = os.path.join(workdir, _NAME)
  if storage.in_bucket(workdir) or not os.path.isfile(path):
    return
  with contextlib.suppress(OSError), open(path, "r+") as file:
    _acquire(file, workdir, fcntl.LOCK_SH)


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Holds the lock of `workdir` for the block; all processes must call it.

  The first process of the run is the owner.

  Raises:
    UserError: another run holds it; names its process and host.
    OSError: the folder cannot be written.
  """
  with contextlib.ExitStack() as stack:
    problem = None
    if jax.process_index() == 0 and not storage.in_bucket(workdir):
      try:
        stack.enter_context(_locked(workdir))
      except (UserError, OSError) as error:
        # Raise it below: the other processes wait there for this one.
        problem = error
    if any_process(problem is not None):
      raise problem or UserError(f"--workdir={workdir}: another run writes it")
    yield


def any_process(value: bool) -> bool:
  """Returns whether `value` holds in any process; all must call it."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.array(value)).any())


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
  storage.make_folder(workdir)
  path = os.path.join(workdir, _NAME)
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    file = os.fdopen(descriptor, "r+")
    try:
      _acquire(file, workdir, fcntl.LOCK_EX)
    except UserError:
      file.close()
      raise
    # The owner before may have removed the file since it was opened.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        break
    file.close()
  with file:
    file.truncate()
    json.dump(
      {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
      },
      file,
    )
    file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        os.unlink(path)


def _acquire(file: IO[str], workdir: str, kind: int) -> None:
  """Takes a lock of a kind of `fcntl.flock`, or raises UserError."""
  for trial in range(_TRIALS):
    try:
      fcntl.flock(file, kind | fcntl.LOCK_NB)
      return
    except BlockingIOError:
      if trial < _TRIALS - 1:
        time.sleep(_PAUSE_SECONDS)
    except OSError:
      # This file system has no locks.
      if not _lives(_owner(file)):
        return
      break
  owner = _owner(file)
  raise UserError(
    f"--workdir={workdir} is in use by process {owner['pid']} on"
    f" {owner['host']}, which began {owner['since']}; wait for it, or choose"
    " another --workdir"
  )


def _owner(file: IO[str]) -> dict[str, object]:
  unknown: dict[str, object] = {
    "pid": "?",
    "host": "a host unknown",
    "since": "at a time unknown",
  }
  file.seek(0)
  with contextlib.suppress(ValueError, OSError):
    found = json.loads(file.read())
    file.seek(0)
    if isinstance(found, dict):
      return unknown | found
  return unknown


def _lives(
  owner: dict[str, object], kill: Callable[[int, int], None] = os.kill
) -> bool:
  """Returns whether the owner is another process of this host that lives."""
  pid = owner["pid"]
  if owner["host"] != socket.gethostname() or not isinstance(pid, int):
    return False
  try:
    kill(pid, 0)
  except PermissionError:
    return True  # It lives, and belongs to somebody else.
  except (OSError, OverflowError):
    return False
  return pid != os.getpid()
