"""The flat form of experiments, and their keys."""

import json
import pathlib

import pytest

from edl_jax import config, config_files
from edl_jax.config import Experiment, UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


def error(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_flatten_and_unflatten_are_inverse():
  experiment = config_files.load(
    TINY, {"data.domains": "('a/b', 'c')", "seed": 3}
  )
  flat = config.flatten(experiment)
  assert flat["model.num_experts"] == 4
  assert flat["data.domains"] == ("a/b", "c")
  assert flat["seed"] == 3
  assert config.unflatten(flat) == experiment
  assert hash(config.unflatten(flat)) == hash(experiment)
  # As JSON gives it, and as an older version wrote it.
  assert config.unflatten(flat | {"data.domains": ["a/b", "c"]}) == experiment
  assert config.unflatten({"train.num_steps": 7}) == config.unflatten(
    config.flatten(Experiment()) | {"train.num_steps": 7}
  )
  assert "experiment.model.layers" in error(
    config.unflatten, {"model.layers": 1}
  )


def test_nested_values_survive_flags_and_json():
  text = "((0.5, 1.0, 2.0), (0.75, 0.0, 1.0))"
  experiment = config_files.load(TINY, {"data.weight_phases": text})
  assert experiment.data.weight_phases == ((0.5, 1.0, 2.0), (0.75, 0.0, 1.0))
  flat = config.flatten(experiment)
  saved = json.loads(json.dumps(flat))
  assert config.unflatten(saved) == experiment
  assert config.differing_keys(saved, flat) == []


def test_weights_are_numbers_or_targets():
  for given, want in (("0.5", 0.5), (2, 2), ("auto:1e-4", "auto:1e-4")):
    experiment = config_files.load(TINY, {"losses.variance_weight": given})
    assert experiment.losses.variance_weight == want
    assert config.unflatten(config.flatten(experiment)) == experiment


def test_differing_keys_ignores_what_may_change():
  saved = config.flatten(config_files.load(TINY))
  current = config.flatten(
    config_files.load(
      TINY,
      {
        "seed": 1,
        "losses.divergence_weight": 0.5,
        "train.log_every": 1,
        "mesh.fsdp": 2,
        "name": "new",
      },
    )
  )
  assert config.differing_keys(saved, saved) == []
  # JSON knows no tuples.
  assert config.differing_keys(saved | {"data.weights": []}, saved) == []
  assert config.differing_keys(saved, current) == [
    "seed: 0 -> 1",
    "losses.divergence_weight: 0.01 -> 0.5",
  ]
  assert config.differing_keys(saved | {"model.gone": 2}, saved) == [
    "model.gone: 2 -> None"
  ]


def test_choose_variant():
  assert config.choose_variant("", ("a", "b")) == "a"
  assert config.choose_variant("b", ("a", "b")) == "b"
  assert config.choose_variant("") == ""
  message = error(config.choose_variant, "c", ("a", "b"))
  assert message == "variant 'c': must be one of a, b"
  assert error(config.choose_variant, "c") == "variant 'c': leave it out"
