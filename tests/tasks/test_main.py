"""The command that evaluates a run on tasks."""

import json

import jax
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import Experiment, TrainConfig
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.tasks.__main__ import main
from edl_jax.tasks.scoring import score
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer
from tests.tasks.naive import CONFIG, LENGTH

EXPERIMENT = Experiment(model=CONFIG, train=TrainConfig(sequence_length=LENGTH))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Returns the folder of an untrained run."""
  folder = tmp_path_factory.mktemp("run")
  mesh = sharding.make_mesh(EXPERIMENT.mesh, jax.devices()[:1])
  provenance = Provenance(
    EXPERIMENT, Taxonomy.from_names(["a", "b"]), byte_tokenizer(), "hash"
  )
  checkpointer = Checkpointer(str(folder), keep=1)
  with jax.set_mesh(mesh):
    state = init_state(
      EXPERIMENT, make_optimizer(EXPERIMENT.optimizer, 1), mesh
    )
    checkpointer.save(1, state, {}, provenance)
  checkpointer.close()
  report = {"domains": ["a", "b"], "probabilities": [[[0.25] * 4] * 2]}
  (folder / "eval.json").write_text(json.dumps({"step": 1, "report": report}))
  return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  lines = [
    {"context": f"{i} +", "continuations": [" 1", " 2"], "gold": i % 2}
    for i in range(6)
  ]
  content = "\n".join(map(json.dumps, lines))
  for name in ("sums", "more"):
    (folder / f"{name}.jsonl").write_text(content + "\n")
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
  mesh = sharding.make_mesh(EXPERIMENT.mesh, jax.devices()[:1])
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
    (["--mesh=data=2,sequence=4", "--max_length=6"], "mesh.sequence=4"),
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
