"""Faults of machines: clocks that step, and processes that lose another."""

import fcntl
import pathlib
import random
import signal
import socket
import time

from tests.campaign.bench import Bench, FaultError, Outcome, SkippedError

_DAY = 24 * 3600


def clock_steps(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """The clock steps by days, twice in a run that is killed and resumed.

  libfaketime shifts what the C library says of the time of day; clocks that
  only rise are left alone, as by a real step. Time stamps of files are not
  shifted.
  """
  libraries = sorted(pathlib.Path("/usr/lib").glob("**/libfaketimeMT.so.1"))
  if not libraries:
    raise SkippedError("libfaketime is not installed")
  offset, workdir = bench.folder / f"{name}.offset", bench.folder / name
  environment = {
    "LD_PRELOAD": str(libraries[0]),
    "FAKETIME_TIMESTAMP_FILE": str(offset),
    "FAKETIME_NO_CACHE": "1",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
  }
  shifts = [draw.randint(-400 * _DAY, 400 * _DAY) for _ in range(4)]
  codes = []
  for first, second in (shifts[:2], shifts[2:]):
    offset.write_text(f"{first:+d}")
    child = bench.start(workdir, fresh=True, environment=environment)
    bench.wait_for_moment(child, workdir, draw)
    offset.write_text(f"{second:+d}")
    bench.wait_for_moment(child, workdir, draw)
    child.send_signal(signal.SIGKILL)
    bench.end(child, -signal.SIGKILL, 0)
    codes.append(child.returncode)
  bench.finish(workdir)
  bench.compare(workdir)
  days = ", ".join(f"{shift / _DAY:+.1f}" for shift in shifts)
  return Outcome(f"by {days} days; exit codes {codes}", len(shifts))


def one_of_two(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """One process of two is killed: the other ends; then both resume.

  JAX's coordination service may abort the other before a collective fails.
  """
  reference = bench.folder / "pair"
  # Another fault of this kind may be at work.
  with open(f"{reference}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (reference / "result.json").exists():
      for child in _start_pair(bench, reference):
        bench.end(child, 0)
  workdir = bench.folder / name
  pair = _start_pair(bench, workdir)
  struck = draw.randrange(2)
  moment = bench.wait_for_moment(pair[struck], workdir, draw)
  pair[struck].send_signal(signal.SIGKILL)
  begun = time.monotonic()
  bench.end(pair[struck], -signal.SIGKILL, 0)
  if pair[struck].returncode:
    line = bench.end(pair[1 - struck], 1, -signal.SIGABRT)
    if pair[1 - struck].returncode == 1 and "process" not in line:
      raise FaultError(f"the other names no process: {line}")
  else:
    bench.end(pair[1 - struck], 0)
  seconds, code = time.monotonic() - begun, pair[1 - struck].returncode
  for child in _start_pair(bench, workdir):
    bench.end(child, 0)
  bench.compare_with(reference, workdir)
  return Outcome(f"process {struck} after {moment}, {seconds:.0f} s, {code}")


def _start_pair(bench: Bench, workdir: pathlib.Path) -> list:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    bench.start(
      workdir,
      "--distributed",
      fresh=True,
      environment={
        # A collective holds a thread while it waits for the other process.
        "NPROC": "32",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
      },
    )
    for index in range(2)
  ]
