"""Processes side by side: shares of the cores, exit codes, output."""

import os
import sys

import pytest

from edl_jax.config import UserError
from edl_jax.launcher import Launcher, core_shares, locked

needs_two_cores = pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
  reason="needs two cores that can be set",
)


def python(code):
  return [sys.executable, "-c", code]


@needs_two_cores
def test_shares_are_disjoint_and_use_all_cores():
  cores = os.sched_getaffinity(0)
  assert core_shares(1) == [set()]
  first, second = core_shares(2)
  assert first and second and not first & second
  assert first | second == cores
  with pytest.raises(UserError, match="cores"):
    core_shares(len(cores) + 1)


@needs_two_cores
def test_two_commands_wait_for_each_other(tmp_path):
  """Each ends only after the other has begun."""
  code = """
import pathlib, sys, time
folder, own, other = sys.argv[1:]
pathlib.Path(folder, own).touch()
for _ in range(2000):
  if pathlib.Path(folder, other).exists():
    print(own)
    sys.exit(3 if own == "a" else 0)
  time.sleep(0.01)
sys.exit(9)
"""
  with Launcher() as launcher, locked(str(tmp_path)) as lock:
    commands = [
      (own, [*python(code), str(tmp_path), own, other], f"{tmp_path}/{own}.txt")
      for own, other in ("ab", "ba")
    ]
    ended = dict(launcher.run(commands, lock, jobs=2))
  assert ended == {"a": 3, "b": 0}
  assert (tmp_path / "a.txt").read_text() == "a\n"


def test_one_command_at_a_time_in_order(tmp_path, capfd):
  with Launcher() as launcher, locked(str(tmp_path)) as lock:
    commands = [(n, python(f"print({n})"), "") for n in range(3)]
    assert list(launcher.run(commands, lock)) == [(0, 0), (1, 0), (2, 0)]
    # It can be used again.
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert list(launcher.run([("x", python(kill), "")], lock)) == [("x", -9)]
  assert capfd.readouterr().out == "0\n1\n2\n"
