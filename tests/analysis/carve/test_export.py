"""A cut model against the masked one it comes from."""

import json
import os

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import config, config_files, main
from edl_jax.analysis.carve import curve, export, runs
from edl_jax.checkpoint import Checkpointer, load
from edl_jax.config import UserError
from edl_jax.model.transformer import parameter_counts
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state
from tests.analysis.carve.run_cases import overrides_of

KEPT_LE = np.array([[0, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0, 0, 1]], bool)


@pytest.fixture(scope="module")
def exported(carve_workdir, tmp_path_factory):
  (run,) = runs.find_runs([carve_workdir])
  folder = str(tmp_path_factory.mktemp("export") / "cut")
  mesh = runs.choose_mesh(run.experiment)
  export.export(run, KEPT_LE, folder, {"domains": ["low"]}, mesh)
  return run, folder


def test_the_exported_loss_is_the_masked_one(exported):
  run, folder = exported
  rows = runs.choose_rows(run, runs.read_corpus(run), [0], 1)
  mesh = runs.choose_mesh(run.experiment)
  with jax.set_mesh(mesh):
    batches = {
      d: runs.to_batches(own, 8, run.experiment, mesh)
      for d, own in enumerate(rows.held_out)
    }
    step = curve.make_loss_step()
    whole = curve.HeldOut(step, runs.load_model(run, mesh), batches)
    cut = curve.HeldOut(step, load(folder, mesh=mesh).model, batches)
    for domain in batches:
      masked = whole.loss(domain, KEPT_LE)
      assert cut.loss(domain, np.ones((2, 3), bool)) == pytest.approx(
        masked, rel=1e-6
      )
      assert whole.loss(domain, np.ones((2, 8), bool)) != pytest.approx(
        masked, rel=1e-4
      )


def test_load_gives_a_model_of_the_kept_experts(exported):
  run, folder = exported
  before, after = edl_jax.load(run.workdir), edl_jax.load(folder)
  assert after.step == before.step and after.taxonomy == before.taxonomy
  expected = config.flatten(before.experiment) | {"model.num_experts": 3}
  assert config.flatten(after.experiment) == expected
  # Biases, 3 in both layers, are no parameters.
  total, _ = parameter_counts(after.experiment.model)
  assert total + 6 == sum(leaf.size for leaf in jax.tree.leaves(after.model))
  for layer, kept_E in enumerate(KEPT_LE):
    whole, cut = before.model.blocks.moe, after.model.blocks.moe
    for new, expert in enumerate(np.flatnonzero(kept_E)):
      for name in ("gate_up_EM2F", "down_EFM"):
        np.testing.assert_array_equal(
          getattr(cut, name)[layer, new], getattr(whole, name)[layer, expert]
        )
      np.testing.assert_array_equal(
        cut.router_ME[layer, :, new], whole.router_ME[layer, :, expert]
      )
      assert cut.bias_E[layer, new] == whole.bias_E[layer, expert]
  assert np.any(after.model.blocks.moe.bias_E[...])
  np.testing.assert_array_equal(after.model.head_MV, before.model.head_MV)


def state_of(folder, experiment, mesh):
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  checkpointer = Checkpointer(folder, 2)
  state, data = checkpointer.restore(
    4, abstract_state(experiment, optimizer, mesh)
  )
  checkpointer.close()
  return state, data


def test_the_optimizer_is_cut_with_the_parameters(exported):
  run, folder = exported
  mesh = runs.choose_mesh(run.experiment)
  before, data = state_of(run.workdir, run.experiment, mesh)
  cut_experiment = edl_jax.load(folder).experiment
  after, data_after = state_of(folder, cut_experiment, mesh)
  assert data_after == data
  checked = 0
  for old, new in zip(
    jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer)
  ):
    if old.shape == new.shape:
      np.testing.assert_array_equal(old, new)
    elif old.shape[1] == 8:
      for layer, kept_E in enumerate(KEPT_LE):
        np.testing.assert_array_equal(old[layer][kept_E], new[layer])
      checked += 1
    else:
      for layer, kept_E in enumerate(KEPT_LE):
        np.testing.assert_array_equal(old[layer][:, kept_E], new[layer])
      checked += 1
  # Two moments of router, first and second matrix.
  assert checked == 6


def test_the_record_says_where_it_comes_from(exported):
  run, folder = exported
  with open(os.path.join(folder, "cut.json")) as file:
    record = json.load(file)
  assert record == {
    "from": os.path.abspath(run.workdir),
    "step": 4,
    "num_experts": 8,
    "keep": 3,
    "experts": [[1, 4, 6], [0, 3, 7]],
    "domains": ["low"],
  }


def test_evaluation_and_training_take_it(exported, carve_files, tmp_path):
  _, folder = exported
  settings = overrides_of(carve_files) | {"model.num_experts": "3"}
  experiment = config_files.load("experiments/tiny.py", settings)
  evaluated = main.prepare(experiment, folder, "eval")
  assert main.execute(evaluated, main._make_mesh(experiment)) == 0
  with open(os.path.join(folder, "eval.json")) as file:
    assert json.load(file)["step"] == 4
  adapted = config_files.load(
    "experiments/tiny.py",
    settings
    | {"train.initial_checkpoint": folder, "train.num_steps": "1"}
    | {"train.checkpoint_every": "1", "train.eval_every": "1"},
  )
  trained = main.prepare(adapted, str(tmp_path / "adapted"), "train")
  assert main.execute(trained, main._make_mesh(adapted)) == 0
  assert edl_jax.load(str(tmp_path / "adapted")).step == 1


def test_a_folder_that_exists_is_refused(tmp_path):
  with pytest.raises(UserError, match="exists; choose another folder"):
    export.check_export(str(tmp_path))
  export.check_export(str(tmp_path / "new"))
