"""The tokenizer of a run that starts from another checkpoint."""

import dataclasses
import pathlib

import pytest

from edl_jax.checkpoint import (
  initial_tokenizer,
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
  assert initial_tokenizer(EXPERIMENT, new) is None
  found = initial_tokenizer(starting_from(workdir, dtype="bfloat16"), new)
  assert found.to_json() == PROVENANCE.tokenizer.to_json()
  found = initial_tokenizer(starting_from(workdir, pool_min=2, pool_max=4), new)
  assert found.to_json() == PROVENANCE.tokenizer.to_json()
  with pytest.raises(UserError, match=r"initial_checkpoint: no checkpoint"):
    initial_tokenizer(starting_from(tmp_path), new)
  with pytest.raises(UserError, match=r"num_experts: 4 -> 8; set"):
    initial_tokenizer(starting_from(workdir, num_experts=8), new)
  # A run with a checkpoint of its own no longer needs the initial one.
  found = initial_tokenizer(starting_from(tmp_path), workdir)
  assert found.to_json() == PROVENANCE.tokenizer.to_json()
