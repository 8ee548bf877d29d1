"""Seconds by what took them, and goodput, computed by hand."""

import time

import numpy as np
import pytest

from edl_jax.clock import (
  Clock,
  goodput,
  read_records,
  step_seconds,
  write_record,
)


def test_excluded_time_is_no_step():
  clock = Clock(tokens_per_step=100, step=3, peak_rate=10.0)
  started = time.monotonic()
  time.sleep(0.2)
  clock.exclude(started, "checkpoint")
  for _ in range(2):
    time.sleep(0.05)
    clock.end_step()
  clock.add_wait(0.01)
  figures = clock.read(5)
  assert 0.1 <= 200 / figures["train/tokens_per_second"] < 0.2
  assert 0.05 <= figures["time/step_median"] <= figures["time/step_max"] < 0.2
  assert figures["train/mfu"] == pytest.approx(
    figures["train/tokens_per_second"] / 100 / 10
  )
  record = clock.record(5)
  assert record["seconds"]["checkpoint"] >= 0.2
  assert 0.1 <= record["seconds"]["steps"] < 0.2
  assert record["seconds"]["input"] == 0.01
  assert (record["first_step"], record["step"]) == (3, 5)
  assert record["wall"] >= 0.3
  # Nothing has been measured since.
  assert "time/step_median" not in clock.read(5)


def test_compilation_before_the_start_counts():
  clock = Clock(tokens_per_step=10, step=0, compiled=25.0)
  assert clock.seconds["compile"] == 25
  assert 25 <= clock.record(0)["wall"] < 30
  # But not in the rate of steps.
  assert clock.read(1)["train/tokens_per_second"] > 10


def test_percentiles_of_steps():
  steps = list(np.random.default_rng(0).random(101))
  ordered = sorted(steps)
  assert step_seconds(steps) == pytest.approx(
    {
      "time/step_median": ordered[50],
      "time/step_90": ordered[90],
      "time/step_max": ordered[100],
    }
  )
  assert step_seconds([]) == {}


def record(first, last, wall, steps, **others):
  return {
    "first_step": first,
    "step": last,
    "wall": wall,
    "cpu": wall / 2,
    "seconds": {"steps": steps, **others},
  }


def test_goodput_leaves_out_steps_that_were_taken_again(tmp_path):
  # Killed at step 14 with a checkpoint at 10, and again at 12, before the next.
  records = [
    record(0, 14, 20.0, 14.0, compile=5.0),
    record(10, 12, 10.0, 3.0, compile=6.0),
    record(10, 20, 30.0, 20.0, compile=6.0, checkpoint=1.0),
  ]
  for number, each in enumerate(records):
    # A process writes its record again and again.
    write_record(str(tmp_path), str(number), {"step": -1})
    write_record(str(tmp_path), str(number), each)
  assert list(read_records(str(tmp_path))) == records
  found = goodput(records)
  assert found["processes"] == 3 and found["wall_seconds"] == 60.0
  assert found["cpu_seconds"] == 30.0
  del records[0]["cpu"]  # As an older version left it.
  assert goodput(records)["cpu_seconds"] == 20.0
  assert found["seconds"] == {"steps": 37.0, "compile": 17.0, "checkpoint": 1.0}
  # 10 of 14 steps of one second, none, and all.
  assert found["goodput"] == pytest.approx((10.0 + 0.0 + 20.0) / 60.0)
  assert list(read_records(str(tmp_path / "missing"))) == []
