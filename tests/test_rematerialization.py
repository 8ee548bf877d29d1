"""The choice of what the backward pass computes again, by real compiles."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

from edl_jax import rematerialization, runtime, sharding, step
from edl_jax.config import (
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
)
from edl_jax.optim import make_optimizer
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.tracing import trace_step

TAXONOMY = Taxonomy(fine=("a", "b"), coarse=("x",), parent=(0, 0))
EXPERIMENT = Experiment(
  model=ModelConfig(
    vocabulary_size=32,
    num_layers=6,
    width=32,
    num_heads=2,
    num_kv_heads=1,
    head_width=16,
    num_experts=4,
    expert_width=64,
    remat="auto",
  ),
  losses=LossesConfig(divergence_weight=0.01),
  train=TrainConfig(batch_size=8, sequence_length=64),
)


@pytest.fixture
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def compiled(monkeypatch, tmp_path):
  """Returns a list of the steps that `resolve` compiles from now on."""
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path))
  # A program that was compiled before is read again.
  setting = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, setting)
  jax.config.update(setting, 0)
  made = []

  def compile_program(lowered, device):
    made.append(runtime.compile_program(lowered, device))
    return made[-1]

  monkeypatch.setattr(rematerialization, "compile_program", compile_program)
  yield made
  jax.config.update(setting, before)


def lower(experiment, mesh):
  traced, _ = trace_step(experiment, TAXONOMY, mesh)
  with jax.set_mesh(mesh):
    return traced.lower()


def needed(experiment, mesh):
  """Returns the bytes that a step needs, by XLA."""
  program = lower(experiment, mesh).compile()
  memory = program.memory_analysis()
  # The new state lies where the old one was.
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def test_the_first_that_fits_is_chosen(mesh, compiled, monkeypatch, capsys):
  sizes = [
    needed(choice, mesh) for choice in rematerialization.choices(EXPERIMENT)
  ]
  # Each choice needs less than the one before.
  assert sizes == sorted(set(sizes), reverse=True)

  def resolve(limit):
    monkeypatch.setattr(runtime, "memory_limit", lambda _: limit)
    chosen, step = rematerialization.resolve(EXPERIMENT, TAXONOMY, mesh)
    assert step is compiled[-1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"model.remat={chosen.model.remat} fits"
    return chosen.model.remat, [line.split()[0] for line in lines[:-1]]

  attention = ["model.remat=none", "model.remat=experts"]
  assert resolve(sizes[2]) == ("attention", attention)
  # The next start begins there.
  assert resolve(sizes[2]) == ("attention", [])
  # What was noted need not fit any more.
  assert resolve(sizes[3]) == ("full", ["model.remat=attention"])
  with pytest.raises(runtime.DoesNotFit, match="along mesh") as raised:
    resolve(sizes[3] - 1)
  assert raised.value.needed == pytest.approx(sizes[3])


def test_a_choice_is_noted_for_each_program(mesh, compiled):
  first, _ = rematerialization.resolve(EXPERIMENT, TAXONOMY, mesh)
  # The memory of a CPU is no limit.
  assert first.model.remat == "none" and len(compiled) == 1
  notes = set(pathlib.Path(os.environ["EDL_JAX_CACHE"]).iterdir())
  longer = dataclasses.replace(
    EXPERIMENT, train=dataclasses.replace(EXPERIMENT.train, batch_size=16)
  )
  rematerialization.resolve(longer, TAXONOMY, mesh)
  both = set(pathlib.Path(os.environ["EDL_JAX_CACHE"]).iterdir())
  assert len(notes) == 1 and len(both) == 2


def test_processes_begin_where_the_first_of_them_does(
  mesh, compiled, monkeypatch
):
  """As where another process has noted nothing, or another choice."""
  full = rematerialization.ORDER.index("full")
  noted = []

  def from_all(values):
    # Another process, which has noted "full".
    noted.append(values)
    return np.array([values, [full] * len(values)], np.float32)

  monkeypatch.setattr(rematerialization, "_from_all", from_all)
  monkeypatch.setattr(rematerialization, "read_cache", lambda _: b"attention")
  with pytest.raises(runtime.DoesNotFit) as raised:
    rematerialization.resolve(EXPERIMENT, TAXONOMY, mesh)
  # It began with "attention", and the other process could not hold a step.
  assert noted[0] == (rematerialization.ORDER.index("attention"),)
  assert len(compiled) == 2 and raised.value.needed == full


def test_other_values_stay_and_compile_nothing(mesh, compiled):
  for chosen in rematerialization.choices(EXPERIMENT):
    found, step = rematerialization.resolve(chosen, TAXONOMY, mesh)
    assert found is chosen and step is None
  assert not compiled


def test_a_step_does_not_resolve_the_choice_itself(mesh):
  optimizer = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.num_steps)
  with pytest.raises(ValueError, match="resolve first"):
    step.make_train_step(EXPERIMENT, optimizer, TAXONOMY, mesh)
