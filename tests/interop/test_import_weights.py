"""The command: what it makes, and what it refuses, without Transformers."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import checkpoint, config_files, main
from edl_jax.checkpoint import stream
from edl_jax.config import Experiment, ModelConfig
from edl_jax.interop import import_weights, safetensors
from edl_jax.interop.architectures import OLMOE, hub_config
from edl_jax.interop.tensors import parameters, tensors
from edl_jax.model.transformer import Model
from edl_jax.text.tokenizer import byte_tokenizer

MODEL = ModelConfig(
  vocabulary_size=300,
  num_layers=2,
  width=16,
  head_width=4,
  num_experts=4,
  expert_width=8,
  gates="raw",
  qk_norm="full",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A small OLMoE as a checkpoint on the hub, with a byte tokenizer."""
  folder = tmp_path_factory.mktemp("hub") / "olmoe-small"
  folder.mkdir()
  model = Model(MODEL, jax.random.key(0))
  content = hub_config(OLMOE, Experiment(model=MODEL), 256, "float32")
  (folder / "config.json").write_text(json.dumps(content))
  (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
  safetensors.write_sharded(
    str(folder), tensors(OLMOE, model), "float32", 50_000
  )
  return folder


@pytest.fixture
def copied(source, tmp_path):
  """A copy to damage."""
  folder = tmp_path / "copied"
  shutil.copytree(source, folder)
  return folder


@pytest.fixture(scope="module")
def run_folder(source, tmp_path_factory):
  out = tmp_path_factory.mktemp("runs") / "olmoe"
  assert import_weights.main([f"--source={source}", f"--out={out}"]) == 0
  return out


def refused(capsys, tmp_path, source, *flags):
  """Returns the one line of the refusal, which leaves nothing behind."""
  before = sorted(os.listdir(tmp_path))
  out = tmp_path / "out"
  capsys.readouterr()
  code = import_weights.main([f"--source={source}", f"--out={out}", *flags])
  assert code == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  assert sorted(os.listdir(tmp_path)) == before
  return line


def change_config(folder, **values):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_run_folder(run_folder):
  assert sorted(os.listdir(run_folder)) == ["checkpoints", "experiment.py"]
  loaded = edl_jax.load(str(run_folder))
  wanted = parameters(Model(MODEL, jax.random.key(0)))
  found = parameters(loaded.model)
  assert found.keys() == wanted.keys()
  for path, array in wanted.items():
    np.testing.assert_array_equal(found[path], array)
  provenance = checkpoint.checkpoint_provenance(str(run_folder))
  assert provenance.source["name"] == "olmoe-small"
  assert provenance.source["config"] == {
    "bos_token_id": 256,
    "eos_token_id": 256,
  }


def test_blocks_smaller_than_a_layer(source, tmp_path, monkeypatch):
  """Three experts of four in a block, and 48 rows of the embedding."""
  monkeypatch.setattr(stream, "_CHUNK_BYTES", 3100)
  out = tmp_path / "out"
  import_weights.import_weights(str(source), str(out))
  wanted = parameters(Model(MODEL, jax.random.key(0)))
  # Digests are compared too.
  found = parameters(edl_jax.load(str(out)).model)
  for path, array in wanted.items():
    np.testing.assert_array_equal(found[path], array)


def test_the_experiment_is_that_of_the_checkpoint(run_folder):
  experiment = config_files.load(str(run_folder / "experiment.py"))
  assert experiment.model == edl_jax.load(str(run_folder)).experiment.model
  assert experiment.train.initial_checkpoint == str(run_folder)


def test_settings_alone_need_config_json_alone(
  source, run_folder, tmp_path, capsys
):
  folder = tmp_path / source.name
  folder.mkdir()
  shutil.copy(source / "config.json", folder)
  out = tmp_path / "settings"
  flags = [f"--source={folder}", f"--out={out}", "--settings_only"]
  assert import_weights.main(flags) == 0
  total = sum(
    array.size
    for array in parameters(edl_jax.load(str(run_folder)).model).values()
  )
  assert f"settings of {total:,} parameters of OLMoE" in capsys.readouterr().out
  assert os.listdir(out) == ["experiment.py"]
  text = (out / "experiment.py").read_text()
  assert text == (run_folder / "experiment.py").read_text()
  # A run from the missing weights is refused, instead of one from random ones.
  flags = [f"--experiment={out}/experiment.py", f"--workdir={tmp_path}/run"]
  assert main.main(flags) == 2
  assert f"no checkpoint in {out}" in capsys.readouterr().err


def test_refusals_of_settings_alone(copied, tmp_path, capsys):
  said = refused(
    capsys, tmp_path, copied, "--settings_only", "--tokenizer=byte"
  )
  assert "--tokenizer=byte has no use with --settings_only" in said
  change_config(copied, clip_qkv=4.0)
  said = refused(capsys, tmp_path, copied, "--settings_only")
  assert "clip_qkv=4.0 of OLMoE" in said
  (copied / "config.json").unlink()
  said = refused(capsys, tmp_path, copied, "--settings_only")
  assert "config.json cannot be read (No such file or directory)" in said


def test_padded_rows_are_explained(source, tmp_path, capsys):
  out = tmp_path / "out"
  assert import_weights.main([f"--source={source}", f"--out={out}"]) == 0
  said = capsys.readouterr().out
  assert "parameters of OLMoE" in said
  assert "the embedding has 300 rows and the tokenizer 257 tokens" in said


def test_refusals_of_folders(source, run_folder, tmp_path, capsys):
  said = refused(capsys, tmp_path, tmp_path / "none")
  assert "none: there is no such folder" in said
  (tmp_path / "empty").mkdir()
  said = refused(capsys, tmp_path, tmp_path / "empty")
  assert "config.json cannot be read (No such file or directory)" in said
  flags = [f"--source={source}", f"--out={run_folder}"]
  assert import_weights.main(flags) == 2
  assert "exists; remove it or choose" in capsys.readouterr().err


def test_refusals_of_tensors(copied, tmp_path, capsys):
  change_config(copied, num_hidden_layers=3)
  said = refused(capsys, tmp_path, copied)
  assert (
    "model.layers.2.input_layernorm.weight (and 20 more) is missing" in said
  )
  change_config(copied, num_hidden_layers=1)
  said = refused(capsys, tmp_path, copied)
  assert "tensor model.layers.1." in said and "has no place in" in said
  change_config(copied, num_hidden_layers=2, vocab_size=290)
  said = refused(capsys, tmp_path, copied)
  assert "model.embed_tokens.weight has shape [300, 16], but" in said
  assert "[290, 16]" in said
  change_config(copied, vocab_size=300, clip_qkv=4.0)
  assert "clip_qkv=4.0 of OLMoE" in refused(capsys, tmp_path, copied)


def test_refusals_of_files(copied, tmp_path, capsys):
  shard = sorted(copied.glob("*.safetensors"))[-1]
  shard.write_bytes(shard.read_bytes()[:-4])
  assert f"{shard.name} is truncated" in refused(capsys, tmp_path, copied)
  shard.unlink()
  assert f"{shard.name} of model" in refused(capsys, tmp_path, copied)
  (copied / "tokenizer.json").unlink()
  assert "name a tokenizer by --tokenizer" in refused(capsys, tmp_path, copied)


def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, monkeypatch):
  folders = import_weights.folders
  usage = folders.shutil.disk_usage(tmp_path)
  little = usage._replace(free=10_000)
  monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: little)
  assert "needs 0 MB, but 0 MB are free" in refused(capsys, tmp_path, source)


SMALL_RUN = {
  "train.num_steps": 1,
  "train.batch_size": 8,
  "train.sequence_length": 32,
  "train.eval_rows": 2,
  "optimizer.warmup_steps": 1,
}


@pytest.mark.slow
def test_runs_evaluate_and_continue_from_it(run_folder, tmp_path, capsys):
  for domain in ("a", "b"):
    for number in range(30):
      path = tmp_path / "text" / domain / f"{number}.txt"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f"{domain} {number} " * 40)
  settings = SMALL_RUN | {"data.files": f"{tmp_path}/text/*/*.txt"}

  def run(*flags):
    capsys.readouterr()
    code = main.main(
      [
        f"--experiment={run_folder}/experiment.py",
        *(f"--experiment.{key}={value}" for key, value in settings.items()),
        *flags,
      ]
    )
    return code, capsys.readouterr()

  code, _ = run("--mode=eval", f"--workdir={run_folder}")
  assert code == 0
  before = json.loads((run_folder / "eval.json").read_text())
  assert before["step"] == 0
  code, said = run(f"--workdir={run_folder}")
  assert code == 2
  assert "holds imported weights, which no run continues" in said.err
  workdir = tmp_path / "continued"
  frozen = "--experiment.optimizer.learning_rate=1e-12"
  assert run(frozen, f"--workdir={workdir}")[0] == 0
  after = json.loads((workdir / "result.json").read_text())
  assert after["eval"]["lm_loss"] == pytest.approx(
    before["eval"]["lm_loss"], abs=1e-5
  )
  provenance = checkpoint.checkpoint_provenance(str(workdir))
  assert provenance.source["name"] == "olmoe-small"
  (run_folder / "eval.json").unlink()
