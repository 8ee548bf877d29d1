"""The command that evaluates a run on tasks."""

import json

import jax
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.config import MeshConfig
from edl_jax.tasks.__main__ import main
from edl_jax.tasks.scoring import score
from tests.tasks.naive import LENGTH
from tests.tasks.small_run import write_files, write_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Returns the folder of an untrained run."""
  folder = tmp_path_factory.mktemp("run")
  write_run(folder)
  return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  write_files(folder)
  return folder


def test_the_command_writes_what_it_prints(workdir, files, capsys):
  arguments = [f"--workdir={workdir}", f"--files={files}", "--tasks=sums"]
  assert main([*arguments, "--mesh=data=2,fsdp=4", "--documents=4"]) == 0
  printed = capsys.readouterr().out
  assert "step 1: 4 documents of 1 files, 8 texts of at most 16 tok" in printed
  result = json.loads((workdir / "tasks.json").read_text())
  assert (result["step"], result["max_length"]) == (1, LENGTH)
  (task,) = result["tasks"].values()
  assert task["by_document"]["id"] == ["1", "2", "4", "5"]
  assert f"{task['figures']['bits_per_byte']['mean']:.4f} ± " in printed
  assert result["routing"]["domains"] == ["a", "b"]
  run = edl_jax.load(str(workdir))
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  (alone,) = score(run.model, run.tokenizer, [("0 +", " 1")], LENGTH, mesh)
  bits = -alone.log_likelihood / 0.6931471805599453 / 2
  found = task["by_document"]["bits_per_byte"][0]
  assert found == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--tasks=sumz"], "did you mean sums?"),
    (["--documents=-1"], "documents"),
    (["--mesh=rows=2"], "--mesh: rows=2 is no AXIS=SIZE"),
    (["--mesh=data=3"], "does not divide 8 devices"),
    (["--mesh=tensor=8"], "does not divide the model"),
    (["--workdir=none"], "no checkpoint in"),
    (["--files=none"], "none: no task files"),
  ],
)
def test_bad_usage_is_one_line_and_writes_nothing(
  workdir, files, capsys, arguments, words
):
  (workdir / "tasks.json").unlink(missing_ok=True)
  code = main([f"--workdir={workdir}", f"--files={files}", *arguments])
  output = capsys.readouterr()
  assert (code, output.out) == (2, "")
  assert output.err.startswith("error: ") and output.err.count("\n") == 1
  assert words in output.err
  assert not (workdir / "tasks.json").exists()
