"""Tasks of a run in training: when, what is logged, what is written."""

import json
import statistics

import jax
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, TrainConfig
from edl_jax.tasks.evaluation import encode_tasks, evaluate_tasks
from edl_jax.tasks.training import TrainingTasks
from edl_jax.text.tokenizer import byte_tokenizer
from tests.tasks.naive import LENGTH, make_model
from tests.tasks.test_evaluation import DOMAINS, SELECTED

TRAIN = TrainConfig(
  num_steps=10, batch_size=4, sequence_length=LENGTH, task_every=4
)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.fixture(scope="module")
def model(mesh):
  shardings = sharding.parameter_shardings(make_model(), mesh)
  return jax.device_put(make_model(), shardings)


@pytest.fixture(scope="module")
def encoded():
  return encode_tasks(SELECTED, byte_tokenizer(), LENGTH)


def test_tasks_are_due_regularly_and_at_the_end(encoded, mesh):
  tasks = TrainingTasks(encoded, TRAIN, mesh)
  assert [step for step in range(1, 11) if tasks.is_due(step)] == [4, 8, 10]


def test_what_is_logged_and_written(encoded, model, mesh, tmp_path):
  want = evaluate_tasks(model, encoded, mesh, 4 * LENGTH, DOMAINS)
  tasks, said = TrainingTasks(encoded, TRAIN, mesh), []
  report = {
    "domains": DOMAINS.names,
    "probabilities": DOMAINS.probability_LDE.tolist(),
  }
  figures = tasks.evaluate(model, report, said.append)
  assert figures == {
    f"eval/task/{name}/bpb": task["figures"]["bits_per_byte"]["mean"]
    for name, task in want["tasks"].items()
  }
  mean = statistics.fmean(figures.values())
  assert said == [f"tasks: {mean:.4f} bits/byte, mean of 3"]
  tasks.write(str(tmp_path), 10)
  path = tmp_path / "tasks.json"
  assert json.loads(path.read_text()) == {"step": 10, **want}
  # A file of this step may be of more documents: it stays.
  path.write_text('{"step": 10, "more": 1}')
  tasks.write(str(tmp_path), 10)
  assert json.loads(path.read_text()) == {"step": 10, "more": 1}
  tasks.write(str(tmp_path), 11)
  assert json.loads(path.read_text()) == {"step": 11, **want}
