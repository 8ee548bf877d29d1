"""The command that continues prompts, and `generate` of a loaded run."""

import io
import sys

import jax
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import Experiment, ModelConfig, TrainConfig
from edl_jax.generate import main
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

EXPERIMENT = Experiment(
  model=ModelConfig(
    vocabulary_size=257,
    num_layers=2,
    width=16,
    num_heads=2,
    head_width=8,
    num_experts=4,
    expert_width=8,
  ),
  train=TrainConfig(sequence_length=16),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Returns the folder of an untrained run."""
  folder = str(tmp_path_factory.mktemp("run"))
  mesh = sharding.make_mesh(EXPERIMENT.mesh, jax.devices()[:1])
  optimizer = make_optimizer(EXPERIMENT.optimizer, 1)
  provenance = Provenance(
    EXPERIMENT, Taxonomy.from_names(["a", "b"]), byte_tokenizer(), "hash"
  )
  checkpointer = Checkpointer(folder, keep=1)
  with jax.set_mesh(mesh):
    state = init_state(EXPERIMENT, optimizer, mesh)
    checkpointer.save(1, state, {}, provenance)
  checkpointer.close()
  return folder


def test_the_command_prints_what_the_run_generates(workdir, capsys):
  run = edl_jax.load(workdir)
  (result,) = run.generate(["hello"], num_tokens=8)
  common = [f"--workdir={workdir}", "--num_tokens=8"]
  assert main([*common, "--prompt=hello", "--experts"]) == 0
  text, _, table = capsys.readouterr().out.rpartition("token ")
  assert text == f"hello{result.text}\n"
  # The document start, the prompt, and all new tokens but the last.
  assert len(table.splitlines()) == 1 + 1 + 5 + 7


def test_prompts_come_from_flags_and_the_standard_input(
  workdir, capsys, monkeypatch
):
  monkeypatch.setattr(sys, "stdin", io.StringIO("two\nthree\n"))
  flags = ["--num_tokens=12", "--prompt=one", "--prompts=-", "--num_samples=2"]
  assert main([f"--workdir={workdir}", *flags, "--temperature=1"]) == 0
  captured = capsys.readouterr()
  assert captured.out.count("--- prompt") == 6
  assert "--- prompt 3, sample 2: length\nthree" in captured.out
  assert captured.err == (
    "warning: texts may reach 17 tokens; the model was trained on rows of 16\n"
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "there is no prompt"),
    (["--prompt=a", "--temperature=-1"], "temperature=-1.0 must be"),
    (["--prompt=a", "--top_p=0"], "top_p=0.0 must be"),
    (["--prompt=a", "--workdir=/nowhere"], "no checkpoint in /nowhere"),
    (["--prompts=/nowhere"], "--prompts=/nowhere cannot be read"),
    (["--prompt=a", "--mesh=rows=2"], "--mesh: rows=2 is no AXIS=SIZE"),
    (["--prompt=a", "--domain=c"], "domain='c' is none of the run's: a, b"),
    (["--prompt=\udcff"], "prompt 1 is no Unicode text"),
  ],
)
def test_bad_input_is_one_line(workdir, capsys, flags, message):
  assert main([f"--workdir={workdir}", *flags]) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert message in captured.err
  assert captured.err.count("\n") == 1
