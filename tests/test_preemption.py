"""Signals that a run notes, so that it can end after a checkpoint."""

import os
import signal

import pytest

from edl_jax.preemption import requests_to_end


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_once(name):
  number = signal.Signals[name]
  caught = []
  before = signal.signal(number, lambda *_: caught.append(number))
  try:
    with requests_to_end() as asked_to_end:
      assert asked_to_end(1) is None
      os.kill(os.getpid(), number)
      assert asked_to_end(2) == number and not caught
      # The second one ends the process as it would have.
      os.kill(os.getpid(), number)
      assert caught == [number]
    os.kill(os.getpid(), number)
    assert caught == [number] * 2
  finally:
    signal.signal(number, before)


def test_a_terminal_that_nohup_ignores_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with requests_to_end() as asked_to_end:
      os.kill(os.getpid(), signal.SIGHUP)
      assert asked_to_end(1) is None
  finally:
    signal.signal(signal.SIGHUP, before)
