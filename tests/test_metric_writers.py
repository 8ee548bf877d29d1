"""Each place of metrics has what was written."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from edl_jax.config import UserError
from edl_jax.metric_writers import (
  RunDescription,
  TensorBoard,
  writer_names,
)
from edl_jax.metrics import MetricsWriter, read_metrics

ROOT = pathlib.Path(__file__).parent.parent
# A Python that has wandb beside requirements.txt.
WANDB_PYTHON = os.environ.get("EDL_JAX_WANDB_PYTHON")

LOAD_E = np.array([0.0, 0.25, 0.5, 0.5, 3.75], np.float32)


def events(folder):
  """Yields the events of TensorBoard's files."""
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event()
      event.ParseFromString(data[12 : 12 + length])
      data = data[16 + length :]
      yield event


def test_histograms_in_tensorboard(tmp_path):
  writer = TensorBoard(str(tmp_path), 0, RunDescription())
  writer.write_histograms(4, {"load/layer_1": LOAD_E})
  writer.close()
  (found,) = (
    (event.step, value.tag, value.histo)
    for event in events(tmp_path / "tensorboard")
    for value in event.summary.value
  )
  step, tag, histogram = found
  assert (step, tag) == (4, "load/layer_1")
  assert (histogram.min, histogram.max, histogram.num) == (0, 3.75, 5)
  assert histogram.sum == 5 and histogram.sum_squares == 14.625
  assert sum(histogram.bucket) == 5
  # Right ends of buckets of 0.125: the counts up to each are those of a loop.
  for end, upto in zip(
    histogram.bucket_limit, np.cumsum(histogram.bucket), strict=True
  ):
    inside = (end > LOAD_E) | (end == 3.75)
    assert upto == inside.sum()


def test_only_the_places_that_were_asked_for(tmp_path):
  with MetricsWriter(str(tmp_path), writers=("jsonl",)) as writer:
    writer.write(1, {"train/loss": 0.5})
    writer.write_histograms(1, {"load": LOAD_E})
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert read_metrics(str(tmp_path)) == [{"step": 1, "train/loss": 0.5}]


def test_what_is_missing_is_named(monkeypatch):
  assert writer_names(" tensorboard ") == ["jsonl", "tensorboard"]
  assert writer_names("") == ["jsonl"]
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install -r requirements-wandb.txt"):
    writer_names("wandb")
  assert (ROOT / "requirements-wandb.txt").exists()


PROGRAM = """
import sys
import numpy as np
from edl_jax.metric_writers import RunDescription, writer_names
from edl_jax.metrics import MetricsWriter
run = RunDescription(
  name="tiny", project="tests", record={"losses.z_weight": 0.125}
)
for first_step in (0, 2):
  with MetricsWriter(
    sys.argv[1],
    first_step=first_step,
    writers=writer_names("wandb"),
    run=run,
  ) as writer:
    for step in range(first_step + 1, first_step + 3):
      writer.write(step, {"train/loss": step / 4})
      writer.write_histograms(step, {"load": np.arange(4.0)})
"""


@pytest.mark.skipif(not WANDB_PYTHON, reason="EDL_JAX_WANDB_PYTHON is not set")
def test_weights_and_biases_offline(tmp_path):
  assert WANDB_PYTHON
  subprocess.run(
    [WANDB_PYTHON, "-c", PROGRAM, str(tmp_path)],
    cwd=ROOT,
    env=os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)},
    check=True,
    timeout=300,
  )
  identity = (tmp_path / "wandb_run.txt").read_text()
  runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
  # Both processes wrote to one run.
  assert len(runs) == 2
  stored = b""
  for run in runs:
    (file,) = run.glob("*.wandb")
    assert file.name == f"run-{identity}.wandb"
    stored += file.read_bytes()
  for text in (b"train/loss", b"losses.z_weight", b"histogram", b"tests"):
    assert text in stored
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["train/loss"] for line in lines] == [
    *(0.25, 0.5, 0.75, 1.0)
  ]
