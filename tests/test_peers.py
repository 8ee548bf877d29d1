"""A process that has lost another one ends; one that is alone does not."""

import os

import jax
import pytest

from edl_jax import peers

# What Gloo and the coordination service said where a process was killed.
GLOO = (
  "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc"
  ":538] Read error [127.0.0.1]:34991: Connection reset by peer"
)
BARRIER = (
  "DEADLINE_EXCEEDED: Barrier timed out. Id: x::0. This usually happens because"
  " a task triggered the barrier unexpectedly early.\n# of tasks: 1/2"
)


# Where a step fails, and where its result is read.
KINDS = pytest.mark.parametrize(
  "kind", [jax.errors.JaxRuntimeError, ValueError]
)


@KINDS
@pytest.mark.parametrize("message", [GLOO, BARRIER])
def test_a_lost_process_is_told_in_one_line(message, kind, monkeypatch, capfd):
  def end(code):
    raise SystemExit(code)

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(os, "_exit", end)
  with pytest.raises(SystemExit) as caught, peers.needed():
    raise kind(message)
  assert caught.value.code == 1
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith("error: another process of the run has ended")
  assert message[:30] in line


@KINDS
@pytest.mark.parametrize(
  ("message", "processes"),
  [(GLOO, 1), ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", 2)],
)
def test_other_errors_are_raised(message, processes, kind, monkeypatch, capfd):
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  with pytest.raises(kind), peers.needed():
    raise kind(message)
  assert capfd.readouterr().err == ""


def test_what_goes_well_goes_on():
  with peers.needed():
    done = 1
  assert done == 1
