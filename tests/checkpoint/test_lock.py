"""One run in a folder: the second is refused, a dead one is no obstacle."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from edl_jax.checkpoint import check_unlocked, locked
from edl_jax.checkpoint.lock import any_process
from edl_jax.config import UserError

HOLDER = """
import sys, time
from edl_jax.checkpoint import locked
with locked(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


@contextlib.contextmanager
def held_by_another(workdir):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, workdir],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_a_dead_one_is_not(tmp_path):
  workdir = str(tmp_path / "run")
  with held_by_another(workdir) as process:
    where = rf"in use by process {process.pid} on {socket.gethostname()}, which"
    for refused in (lambda: check_unlocked(workdir), locked(workdir).__enter__):
      with pytest.raises(UserError, match=where):
        refused()
    # A process that stands still still owns its folder.
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=where):
      check_unlocked(workdir)
    process.kill()
    process.wait()
    assert os.path.exists(f"{workdir}/.lock")
    check_unlocked(workdir)
    with locked(workdir):
      owner = json.loads((tmp_path / "run" / ".lock").read_text())
      assert owner["pid"] == os.getpid()
  assert os.listdir(workdir) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00"])
def test_a_lock_file_that_means_nothing_is_taken(tmp_path, content):
  (tmp_path / ".lock").write_text(content)
  check_unlocked(str(tmp_path))
  with locked(str(tmp_path)):
    pass


def test_without_locks_in_the_file_system_the_file_decides(
  tmp_path, monkeypatch
):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)

  def owner(pid, host=None):
    content = {"pid": pid, "host": host or socket.gethostname(), "since": "t"}
    (tmp_path / ".lock").write_text(json.dumps(content))

  owner(os.getppid())
  with pytest.raises(UserError, match=f"by process {os.getppid()} on"):
    check_unlocked(str(tmp_path))
  for pid, host in (
    (2**22 + 1, None),
    (os.getppid(), "elsewhere"),
    ("x", None),
  ):
    owner(pid, host)
    with locked(str(tmp_path)):
      pass


def test_buckets_have_no_lock():
  check_unlocked("gs://bucket/run")
  with locked("gs://bucket/run"):
    pass


def test_one_process_speaks_for_itself():
  assert any_process(True) and not any_process(False)
