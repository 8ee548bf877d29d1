"""Streams that are closed, full, or lack characters; whole programs."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from edl_jax import output
from edl_jax.config import UserError

ROOT = pathlib.Path(__file__).parent.parent
LIST = f"{sys.executable} -m edl_jax.main --experiment=experiments/tiny.py"


def shell(command, **environment):
  return subprocess.run(
    ["bash", "-c", command],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_full_stdout_is_named():
  ended = shell(f"{LIST} --describe >/dev/full")
  assert ended.returncode == 2
  assert ended.stderr == (
    "error: stdout cannot be written: No space left on device\n"
  )


def test_a_full_stderr_leaves_the_exit_code():
  assert shell(f"{LIST} --nonsense 2>/dev/full").returncode == 2
  ended = shell(f"{LIST} --describe=seed 2>/dev/full")
  assert ended.returncode == 0 and "seed" in ended.stdout


def test_closed_streams_are_none():
  ended = shell(f"{LIST} --describe >&- <&-")
  assert (ended.returncode, ended.stderr) == (0, "")
  assert shell(f"{LIST} --nonsense 2>&-").returncode == 2


def test_a_reader_that_goes_ends_the_program():
  ended = shell(f"{LIST} --describe | head -1; exit ${{PIPESTATUS[0]}}")
  assert ended.returncode in (0, 141) and ended.stderr == ""


def test_characters_that_the_encoding_lacks_are_escaped():
  ended = shell(
    f"{LIST} --experiment.name=汉字 --describe=name", PYTHONIOENCODING="ascii"
  )
  assert (ended.returncode, ended.stderr) == (0, "")
  assert r"\u6c49\u5b57" in ended.stdout


def full():
  return open("/dev/full", "w", encoding="utf-8")


def test_a_lasting_stdout_falls_silent_once(capfd, monkeypatch):
  with full() as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    with output.named_stdout(lasting=True):
      for _ in range(3):
        print("x", flush=True)
    assert sys.stdout is stream
  _, errors = capfd.readouterr()
  assert errors == (
    "stdout cannot be written any more (No space left on device); going on"
    " without\n"
  )


def test_a_lasting_stdout_may_lie_inside_another(capfd, monkeypatch):
  with full() as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    with output.named_stdout(), output.named_stdout(lasting=True):
      print("x", flush=True)
      print("y", flush=True)
  assert capfd.readouterr().err.count("going on without") == 1


def test_errors_name_stdout(monkeypatch):
  with full() as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    with (
      pytest.raises(UserError, match="stdout cannot be written: No space"),
      output.named_stdout(),
    ):
      print("x", flush=True)


def test_other_errors_and_attributes_pass(monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(sys, "stdout", stream)
  with pytest.raises(OSError, match="unrelated"), output.named_stdout():
    assert not sys.stdout.isatty()
    print("x")
    raise OSError("unrelated")
  assert stream.getvalue() == "x\n"
