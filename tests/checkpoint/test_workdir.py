"""The tokenizer of a run that starts from another checkpoint."""

import dataclasses
import os
import pathlib

import pytest

from edl_jax.checkpoint import (
  check_workdir,
  initial_provenance,
)
from edl_jax.config import (
  TrainConfig,
  UserError,
)
from tests.checkpoint.small_run import (
  EXPERIMENT,
  PROVENANCE,
  write,
)

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("run"))
  write(workdir)
  return workdir


def test_tokenizer_of_the_checkpoint_to_start_from(workdir, tmp_path):
  def starting_from(path, **sizes):
    return dataclasses.replace(
      EXPERIMENT,
      model=dataclasses.replace(EXPERIMENT.model, **sizes),
      train=TrainConfig(initial_checkpoint=str(path)),
    )

  new = str(tmp_path / "new")
  assert initial_provenance(EXPERIMENT, new) is None
  found = initial_provenance(starting_from(workdir, dtype="bfloat16"), new)
  assert found.tokenizer.to_json() == PROVENANCE.tokenizer.to_json()
  found = initial_provenance(
    starting_from(workdir, pool_min=2, pool_max=4), new
  )
  assert found.tokenizer.to_json() == PROVENANCE.tokenizer.to_json()
  with pytest.raises(UserError, match=r"initial_checkpoint: no checkpoint"):
    initial_provenance(starting_from(tmp_path), new)
  with pytest.raises(UserError, match=r"num_experts: 4 -> 8; set"):
    initial_provenance(starting_from(workdir, num_experts=8), new)
  # A run with a checkpoint of its own no longer needs the initial one.
  found = initial_provenance(starting_from(tmp_path), workdir)
  assert found.tokenizer.to_json() == PROVENANCE.tokenizer.to_json()


@pytest.mark.parametrize("name", ["exp[1]", "a*/run", "what?"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
  with pytest.raises(UserError, match="takes for a pattern; choose another"):
    check_workdir(str(tmp_path / name), PROVENANCE, 0)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "is_folder"),
  [
    ("checkpoints", False),
    ("tensorboard", False),
    ("report", False),
    ("metrics.jsonl", True),
    ("run.json", True),
  ],
)
def test_what_is_in_the_way_is_named(tmp_path, name, is_folder):
  place = tmp_path / name
  place.mkdir() if is_folder else place.write_text("")
  with pytest.raises(UserError, match=f"{name} is no fil|{name} is no fold"):
    check_workdir(str(tmp_path), PROVENANCE, 0)


def test_a_folder_of_another_user_is_named(tmp_path, monkeypatch):
  (tmp_path / "checkpoints").mkdir()
  # Root may write everywhere, so the system's answer stands in.
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with pytest.raises(UserError, match="checkpoints belongs to another user or"):
    check_workdir(str(tmp_path), PROVENANCE, 0)


def test_a_name_that_is_too_long_is_one_line(tmp_path):
  with pytest.raises(UserError, match=r"cannot write to --workdir=.*too long"):
    check_workdir(str(tmp_path / ("x" * 300)), PROVENANCE, 0)
