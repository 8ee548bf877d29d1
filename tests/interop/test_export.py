"""The command: what it writes, and what it refuses."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import checkpoint, storage
from edl_jax.interop import export, folders
from edl_jax.interop.architectures import QWEN3_MOE
from edl_jax.interop.tensors import tensors
from tests.interop.test_safetensors import read


def run_export(*flags):
  return export.main([f"--{flag}" for flag in flags])


def refused(capsys, *flags):
  """Returns the one line that the command answers with."""
  capsys.readouterr()
  assert run_export(*flags) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  return line


# The run that all of them export takes a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory):
  out = tmp_path_factory.mktemp("hub") / "new" / "tiny"
  assert run_export(f"workdir={run_folder}", f"out={out}") == 0
  return out


def test_folder_is_complete(exported, run_folder):
  assert sorted(os.listdir(exported)) == [
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  assert os.listdir(exported.parent) == ["tiny"]
  config = json.loads((exported / "config.json").read_text())
  assert (config["vocab_size"], config["mlp_only_layers"]) == (272, [0])
  assert config["bos_token_id"] == 256


def test_tensors_are_those_of_the_newest_checkpoint(exported, run_folder):
  wanted = tensors(QWEN3_MOE, edl_jax.load(str(run_folder), step=4).model)
  found = read(exported / "model-00001-of-00001.safetensors")
  assert list(found) == list(wanted)
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_card_tells_the_figures_of_the_run(exported, run_folder):
  card = (exported / "README.md").read_text()
  result = json.loads((run_folder / "result.json").read_text())
  assert f"| overall       | {result['eval']['lm_loss']:24.4f} |" in card
  assert "--workdir=tiny --out=tiny --dtype=float32" in card
  assert str(exported.parent) not in card


def test_an_older_checkpoint_has_no_figures(run_folder, tmp_path):
  out = tmp_path / "out"
  older = run_folder / "checkpoints" / "2"
  flags = (f"out={out}", "max_shard_size=50KB", "dtype=bfloat16")
  assert run_export(f"workdir={older}", *flags) == 0
  assert "Held-out" not in (out / "README.md").read_text()
  shards = sorted(out.glob("*.safetensors"))
  assert len(shards) > 2
  # The embedding is larger than a shard may be only if it stands alone.
  assert all(len(read(s)) == 1 or s.stat().st_size < 60_000 for s in shards)
  found = {name: x for shard in shards for name, x in read(shard).items()}
  wanted = tensors(QWEN3_MOE, edl_jax.load(str(older)).model)
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(
      found[name], tensor.astype(jax.numpy.bfloat16)
    )


def test_refusals(run_folder, exported, tmp_path, capsys):
  """Each in one line, and without a trace in the target's folder."""
  run, out = f"workdir={run_folder}", f"out={tmp_path / 'out'}"
  said = refused(capsys, run, f"out={exported}")
  assert said == f"error: --out={exported} exists; remove it or choose another"
  said = refused(capsys, f"workdir={tmp_path}", out)
  assert said == f"error: no checkpoint in {tmp_path}"
  said = refused(capsys, run, out, "max_shard_size=5 gallons")
  assert said.startswith("error: --max_shard_size=5 gallons: must be a number")
  assert "--max_shard_size=0GB" in refused(
    capsys, run, out, "max_shard_size=0GB"
  )
  assert "--out=gs://b/x" in refused(capsys, run, "out=gs://b/x")
  assert "'int3' is none of" in refused(capsys, run, out, "dtype=int3")
  assert "--out is missing" in refused(capsys, run)
  (tmp_path / "file").touch()
  said = refused(capsys, run, f"out={tmp_path / 'file' / 'out'}")
  assert re.fullmatch(r"error: --out=.* \(File exists: .*/file\)", said)
  assert os.listdir(tmp_path) == ["file"]


def test_shared_experts_are_refused_before_tensors_are_read(
  run_folder, tmp_path, capsys, monkeypatch
):
  provenance = checkpoint.checkpoint_provenance(str(run_folder))
  experiment = provenance.experiment
  model = dataclasses.replace(experiment.model, num_shared_experts=1)
  folder = tmp_path / "checkpoints" / "7"
  (folder / "parameters").mkdir(parents=True)
  (folder / "provenance").mkdir()
  storage.write_json(
    folder / "provenance" / "metadata",
    dataclasses.replace(
      provenance, experiment=dataclasses.replace(experiment, model=model)
    ).to_dict(),
  )
  for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
    content = (run_folder / "checkpoints" / "4" / name).read_bytes()
    (folder / name).write_bytes(content)
  said = refused(capsys, f"workdir={tmp_path}", f"out={tmp_path / 'out'}")
  assert "model.num_shared_experts=1: Qwen3-MoE has no shared experts" in said


def test_a_full_disk_leaves_nothing(run_folder, tmp_path, capsys, monkeypatch):
  run, out = f"workdir={run_folder}", f"out={tmp_path / 'deep' / 'out'}"
  usage = folders.shutil.disk_usage(tmp_path)
  little = usage._replace(free=100_000)
  monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: little)
  said = refused(capsys, run, out)
  assert said.startswith(f"error: --{out} needs 0 MB, but 0 MB are free")
  assert os.listdir(tmp_path) == []
