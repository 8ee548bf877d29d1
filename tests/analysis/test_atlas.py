"""The command that writes the atlas, on checkpoints of untrained runs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from edl_jax import config_files
from edl_jax.analysis import atlas
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.model.transformer import Model
from edl_jax.step import TrainState
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import byte_tokenizer

ROOT = pathlib.Path(__file__).parent.parent.parent
OVERRIDES = {
  "train.eval_rows": 1,
  "data.max_characters_per_domain": 20_000,
}


def write_run(
  workdir: pathlib.Path, domains: tuple[str, ...] = (), **overrides: float
) -> str:
  """Writes what a run of the tests' experiment would leave."""
  experiment = config_files.load(
    str(ROOT / "experiments" / "tiny.py"), OVERRIDES | overrides
  )
  data = dataclasses.replace(experiment.data, domains=domains)
  experiment = dataclasses.replace(experiment, data=data)
  corpus = load_corpus(data)
  provenance = Provenance(
    experiment, corpus.taxonomy, byte_tokenizer(), corpus.content_hash
  )
  state = TrainState(
    step=jnp.int32(3),
    model=jax.jit(Model, static_argnums=0)(experiment.model, jax.random.key(0)),
    optimizer={"count": jnp.int32(3)},
    auto_weights={},
  )
  checkpointer = Checkpointer(str(workdir), keep=1)
  checkpointer.save(3, state, {}, provenance)
  checkpointer.close()
  return str(workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs of the same domains, and one of others."""
  folder = tmp_path_factory.mktemp("runs")
  return [
    write_run(folder / "first"),
    write_run(folder / "second", **{"losses.divergence_weight": 0.0}),
    write_run(folder / "other", ("legal", "unicode")),
  ]


def error_of(capsys, *arguments: str) -> str:
  """Runs the command, which must fail, and returns its one line."""
  assert atlas.main(list(arguments)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_writes_one_page_for_two_runs(runs, tmp_path, capsys):
  out = tmp_path / "new folder" / "page.html"
  arguments = [f"--workdir={path}" for path in runs[:2]]
  assert atlas.main([*arguments, f"--out={out}"]) == 0
  assert capsys.readouterr().out.startswith(f"{out}: 0.")
  text = out.read_text()
  start = text.index('type="application/json">') + len(
    'type="application/json">'
  )
  data = json.loads(text[start : text.index("</script>", start)])
  first, second = data["runs"]
  assert (first["name"], second["name"]) == ("first", "second")
  assert first["facts"]["divergence weight"] == 0.01
  assert second["facts"]["divergence weight"] == 0.0
  # One row of each domain.
  assert len(first["tokens"]) == 6
  assert max(first["tokens"]) == 64
  assert [len(load) for load in first["load"]] == [4, 4]


def test_page_lies_in_the_report_by_default(runs):
  assert atlas.main([f"--workdir={runs[2]}"]) == 0
  assert pathlib.Path(runs[2], "report", "atlas.html").is_file()


def test_runs_that_cannot_be_compared(runs, capsys):
  line = error_of(capsys, f"--workdir={runs[0]}", f"--workdir={runs[2]}")
  assert "have different domains (only one has code/c_headers, " in line
  assert "compare runs of one taxonomy" in line
  line = error_of(capsys, *(f"--workdir={path}" for path in runs))
  assert line == "error: --workdir: at most two runs, not 3"


def test_folders_without_a_run(capsys, tmp_path):
  assert "--workdir is missing" in error_of(capsys)
  line = error_of(capsys, f"--workdir={tmp_path}")
  assert line == f"error: no checkpoint in {tmp_path}"


def test_pages_that_cannot_be_written(runs, capsys, tmp_path):
  line = error_of(capsys, f"--workdir={runs[0]}", f"--out={tmp_path}")
  assert line == f"error: --out={tmp_path} is a folder; name a file in it"
  file = tmp_path / "file"
  file.write_text("")
  line = error_of(capsys, f"--workdir={runs[0]}", f"--out={file}/atlas.html")
  assert line.startswith(f"error: cannot write --out={file}/atlas.html: ")


def test_folders_of_one_name_are_told_apart_by_their_paths():
  assert atlas._names(["a/run", "b/run"]) == ["a/run", "b/run"]
  assert atlas._names(["a/run", "b/other/"]) == ["run", "other"]
