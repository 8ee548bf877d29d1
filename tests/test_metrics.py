"""Metrics: files that a resumed run continues exactly."""

import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from edl_jax import metric_writers, metrics
from edl_jax.config import UserError


def write_steps(workdir, steps, first_step=0):
  with metrics.MetricsWriter(str(workdir), first_step=first_step) as writer:
    for step in steps:
      writer.write(step, {"train/loss": 1 / step, "train/z_loss": step})
      if step % 4 == 0:
        writer.write(step, {"eval/lm_loss": np.float32(step) / 3})


def test_written_values_are_read_back_exactly(tmp_path):
  value = np.float32(0.1)
  with metrics.MetricsWriter(str(tmp_path)) as writer:
    writer.write(np.int64(3), {"a": value, "b": 0.1, "c": np.float64(1e-300)})
    # Readable while the writer is open.
    (line,) = metrics.read_metrics(str(tmp_path))
  assert line == {"step": 3, "a": 0.10000000149011612, "b": 0.1, "c": 1e-300}
  assert np.float32(line["a"]) == value


@pytest.mark.parametrize(
  "torn", [b"", b'{"step": 9, "train/lo', b'{"step": 4}', b"\0\0\0\n"]
)
def test_resumed_file_equals_uninterrupted(tmp_path, torn):
  write_steps(tmp_path / "whole", range(1, 13))
  write_steps(tmp_path / "killed", range(1, 9))
  file = tmp_path / "killed" / "metrics.jsonl"
  file.write_bytes(file.read_bytes() + torn)
  write_steps(tmp_path / "killed", range(5, 13), first_step=4)
  whole = tmp_path / "whole" / "metrics.jsonl"
  assert file.read_bytes() == whole.read_bytes()
  assert [line["step"] for line in metrics.read_metrics(str(file.parent))] == (
    [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
  )
  assert not list(file.parent.glob("*.tmp"))


def test_new_run_starts_with_an_empty_file(tmp_path):
  write_steps(tmp_path, range(1, 4))
  metrics.MetricsWriter(str(tmp_path)).close()
  assert metrics.read_metrics(str(tmp_path)) == []


def test_read_metrics_without_file_and_with_torn_end(tmp_path):
  assert metrics.read_metrics(str(tmp_path)) == []
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n{"step"')
  assert metrics.read_metrics(str(tmp_path)) == [{"step": 1, "a": 2.0}]


@pytest.mark.parametrize(
  "bad", ["nonsense", "[1]", '{"a": 1}', '{"step": "1"}']
)
def test_damaged_line_is_named(tmp_path, bad):
  (tmp_path / "metrics.jsonl").write_text(
    f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
  )
  with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
    metrics.read_metrics(str(tmp_path))


def test_synced_lines_are_on_the_disk(tmp_path, monkeypatch):
  on_disk, fsync = {}, os.fsync

  def recorded(descriptor):
    fsync(descriptor)
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if os.path.isfile(path):
      on_disk[os.path.basename(path)] = os.path.getsize(path)

  monkeypatch.setattr(os, "fsync", recorded)
  file = tmp_path / "metrics.jsonl"
  with metrics.MetricsWriter(str(tmp_path)) as writer:
    writer.write(1, {"train/loss": 1.0})
    assert on_disk.get("metrics.jsonl") == 0
    writer.sync()
    assert on_disk["metrics.jsonl"] == file.stat().st_size > 0

  def failing(descriptor):
    raise OSError(30, "Read-only file system")

  with metrics.MetricsWriter(str(tmp_path), first_step=1) as writer:
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=r"Read-only file system; make room"):
      writer.sync()


def test_unwritable_workdir_is_a_user_error(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match=r"cannot write to .*file"):
    metrics.MetricsWriter(str(tmp_path / "file"))


def test_full_disk_is_a_user_error(tmp_path):
  # A limit on the size of files stands for a full disk; in a process of its
  # own, since a lowered limit cannot be raised again.
  code = """
import resource, signal
from edl_jax import config, metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
  with metrics.MetricsWriter("run") as writer:
    for step in range(1, 1000):
      writer.write(step, {"train/loss": 1.0})
except config.UserError as error:
  print(error)
"""
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert re.fullmatch(r"cannot write metrics to run: .*\n", result.stdout)
  assert result.returncode == 0 and result.stderr == ""
  metrics.MetricsWriter(str(tmp_path / "run"), first_step=5).close()
  steps = [line["step"] for line in metrics.read_metrics(str(tmp_path / "run"))]
  assert steps == [1, 2, 3, 4, 5]


def read_tensorboard(folder):
  """Decodes event files (TFRecord framing) with the protobuf classes."""
  from tensorboardX.proto import event_pb2

  scalars, starts = [], []
  for path in sorted(folder.glob("events*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField("session_log"):
        starts.append(event.step)
      for value in event.summary.value:
        scalars.append((event.step, value.tag, value.simple_value))
  return scalars, starts


def test_tensorboard_has_the_same_scalars(tmp_path):
  with metrics.MetricsWriter(str(tmp_path), first_step=6) as writer:
    writer.write(7, {"train/loss": 0.5, "eval/lm_loss/c": 2.25})
    writer.write(8, {"train/loss": 0.25})
  scalars, starts = read_tensorboard(tmp_path / "tensorboard")
  assert scalars == [
    (7, "train/loss", 0.5),
    (7, "eval/lm_loss/c", 2.25),
    (8, "train/loss", 0.25),
  ]
  assert starts == [7]


def test_importing_loads_neither_jax_nor_tensorboard():
  code = (
    "import sys, edl_jax.metrics;"
    "print([m for m in ('jax', 'tensorboardX') if m in sys.modules])"
  )
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  assert output.strip() == "[]"


def test_event_files_stay_in_order_when_the_clock_goes_back(
  tmp_path, monkeypatch
):
  # TensorBoard reads them in the order of their names.
  for step, clock in enumerate((2_000_000_000.0, 1_000_000_000.0, 3.0)):
    monkeypatch.setattr(metric_writers.time, "time", lambda now=clock: now)
    with metrics.MetricsWriter(str(tmp_path), first_step=step) as writer:
      writer.write(step + 1, {"train/loss": 0.5})
  scalars, starts = read_tensorboard(tmp_path / "tensorboard")
  assert starts == [1, 2, 3]
  assert [step for step, _, _ in scalars] == [1, 2, 3]
