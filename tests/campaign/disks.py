"""Faults of file systems: full, read-only and slow ones.

Those of a file system of their own need a user who may mount.
"""

import contextlib
import os
import pathlib
import random
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from tests.campaign.bench import Bench, FaultError, Outcome, SkippedError

_THROTTLES = pathlib.Path("/sys/fs/cgroup/blkio")


def _command(*words: str) -> str:
  """Runs a command of the system; returns what it prints.

  Raises:
    SkippedError: it does not exist, or failed.
  """
  try:
    done = subprocess.run(words, capture_output=True, text=True)
  except OSError as error:
    raise SkippedError(f"{words[0]} cannot be run here") from error
  if done.returncode:
    reason = " ".join(done.stderr.split())[:100]
    raise SkippedError(f"{words[0]} failed: {reason}")
  return done.stdout.strip()


class _Disk(NamedTuple):
  """A mounted file system that lies in a file."""

  place: pathlib.Path
  # Such as "loop3".
  device: str
  options: str

  def mount(self) -> None:
    _command("mount", "-o", self.options, self._path, str(self.place))

  def mend(self) -> None:
    """Repairs it after an error, and mounts it again."""
    _command("umount", str(self.place))
    # Exit code 1: errors were corrected.
    subprocess.run(["e2fsck", "-fy", self._path], capture_output=True)
    self.mount()

  @property
  def _path(self) -> str:
    return f"/dev/{self.device}"


@contextlib.contextmanager
def _disk(bench: Bench, name: str, options: str) -> Iterator[_Disk]:
  """Makes an ext4 file system of 64 MiB, and unmounts it at the end."""
  image, place = bench.folder / f"{name}.image", bench.folder / name
  with open(image, "wb") as file:
    file.truncate(64 * 2**20)
  place.mkdir()
  _command("mkfs.ext4", "-q", "-F", str(image))
  path = _command("losetup", "--find", "--show", str(image))
  disk = _Disk(place, os.path.basename(path), options)
  try:
    disk.mount()
    try:
      yield disk
    finally:
      _command("umount", str(place))
  finally:
    _command("losetup", "--detach", path)
    image.unlink()


def full_disk(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """No file may grow beyond a random size, as on a full disk; then it may."""
  workdir = bench.folder / name
  limit = int(2 ** draw.uniform(6, 21))
  line = bench.end(bench.start(workdir, largest_file=limit), 0, 2)
  bench.finish(workdir)
  bench.compare(workdir)
  told = "refused" if "error" in line else "unharmed"
  return Outcome(f"at {limit:,} bytes: {told}")


def full_tmpfs(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """A small file system of its own, which fills up; then it is enlarged."""
  place = bench.folder / name
  place.mkdir()
  size = draw.randint(64, 2400)
  options = f"size={size}k"
  _command("mount", "-t", "tmpfs", "-o", options, "none", str(place))
  try:
    line = bench.end(bench.start(place / "run"), 0, 2)
    _command("mount", "-o", "remount,size=64m", str(place))
    bench.finish(place / "run")
    bench.compare(place / "run")
  finally:
    subprocess.run(["umount", str(place)], check=True)
  return Outcome(f"of {size} KiB: {line[:60]}")


def read_only(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """The kernel remounts a disk read-only at a random moment; then it is mended.

  ext4 does so by itself when it finds an error, with files open for writing.
  """
  with _disk(bench, name, "errors=remount-ro") as disk:
    trigger = pathlib.Path("/sys/fs/ext4", disk.device, "trigger_fs_error")
    if not trigger.exists():
      raise SkippedError("this kernel triggers no error of ext4")
    workdir = disk.place / "run"
    child = bench.start(workdir)
    moment = bench.wait_for_moment(child, workdir, draw)
    trigger.write_text("1")
    line = bench.end(child, 0, 2)
    # A run that starts on the disk while it is read-only.
    again = bench.end(bench.start(workdir), 0, 2)
    ended = (workdir / "result.json").exists()
    if not ended and "ead-only" not in again:
      raise FaultError(f"refused for another reason: {again}")
    disk.mend()
    bench.finish(workdir)
    bench.compare(workdir)
  return Outcome(f"after {moment}: {line[:60]}")


def slow_disk(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """A disk that takes few writes and bytes a second, which all wait for it.

  The kernel throttles the run's control group. The file system writes at once
  ("sync"), as this kind of group does not see what is written back later.
  """
  speed, writes = int(2 ** draw.uniform(17, 20)), draw.randint(60, 300)
  group = _THROTTLES / f"campaign-{os.getpid()}"
  try:
    group.mkdir()
  except OSError as error:
    raise SkippedError("no control group of blkio can be made") from error
  try:
    with _disk(bench, name, "sync") as disk:
      numbers = pathlib.Path("/sys/class/block", disk.device, "dev").read_text()
      for what, value in (("bps", speed), ("iops", writes)):
        for way in ("read", "write"):
          path = group / f"blkio.throttle.{way}_{what}_device"
          path.write_text(f"{numbers.strip()} {value}")

      def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

      bench.end(bench.start(disk.place / "run", join=join), 0)
      bench.compare(disk.place / "run")
  finally:
    group.rmdir()
  return Outcome(f"{speed:,} bytes and {writes} requests a second")
