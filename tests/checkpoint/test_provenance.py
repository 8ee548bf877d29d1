"""What a run is made from, to JSON and back."""

import dataclasses
import json

import numpy as np
import pytest

from edl_jax.checkpoint import Provenance
from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  OptimizerConfig,
  TrainConfig,
  UserError,
)
from edl_jax.losses.objective import weight_factors
from edl_jax.optim import make_schedule
from tests.checkpoint.small_run import PROVENANCE


def test_to_json_and_back():
  saved = json.loads(json.dumps(PROVENANCE.to_dict()))
  again = Provenance.from_dict(saved | {"digests": {}})
  assert again.to_dict() == PROVENANCE.to_dict()
  PROVENANCE.check_continues(saved, "here")


def test_other_text_and_other_settings_are_named():
  other = dataclasses.replace(PROVENANCE, content_hash="other")
  with pytest.raises(UserError, match=r"here was made from other text"):
    other.check_continues(PROVENANCE.to_dict(), "here")
  experiment = dataclasses.replace(PROVENANCE.experiment, seed=7)
  other = dataclasses.replace(PROVENANCE, experiment=experiment)
  with pytest.raises(UserError, match=r"seed: 0 -> 7"):
    other.check_continues(PROVENANCE.to_dict(), "here")


def of(num_steps, phases=(), **optimizer):
  return dataclasses.replace(
    PROVENANCE,
    experiment=Experiment(
      train=TrainConfig(num_steps=num_steps),
      optimizer=OptimizerConfig(warmup_steps=10, **optimizer),
      data=DataConfig(weight_phases=phases),
    ),
  )


WSD = {"schedule": "wsd", "decay_fraction": 0.2}
CONSTANT = {"final_fraction": 1.0}
PHASES = ((0.5, 1.0, 2.0),)


@pytest.mark.parametrize(
  ("step", "phases", "optimizer", "allowed"),
  [
    (80, (), WSD, True),
    (81, (), WSD, False),
    (100, (), CONSTANT, True),
    (100, (), WSD, False),
    (10, (), {}, True),
    (11, (), {}, False),
    (0, (), WSD, False),
    (50, PHASES, WSD, True),
    (51, PHASES, WSD, False),
  ],
)
def test_the_number_of_steps_may_change_while_it_had_no_part(
  step, phases, optimizer, allowed
):
  saved = of(100, phases, **optimizer)
  longer = of(200, phases, **optimizer)
  if allowed:
    # The definition: the same rates, and the same rows, in all steps taken.
    rates = [
      make_schedule(run.experiment.optimizer, run.experiment.train.num_steps)(
        np.arange(step)
      )
      for run in (saved, longer)
    ]
    np.testing.assert_array_equal(*rates)
  for before, now in ((saved, longer), (longer, saved)):
    content = json.loads(json.dumps(before.to_dict()))
    if allowed:
      now.check_continues(content, "w", step)
    else:
      with pytest.raises(UserError, match=r"num_steps: .* may become longer"):
        now.check_continues(content, "w", step)
  with pytest.raises(UserError, match=r"num_steps: 100 -> 40;"):
    of(40, phases, **optimizer).check_continues(
      json.loads(json.dumps(saved.to_dict())), "w", 41
    )


@pytest.mark.parametrize(
  ("step", "schedule", "allowed"),
  [
    (100, "constant", True),
    (80, "decay", True),
    (81, "decay", False),
    (1, "warmup", False),
  ],
)
def test_and_while_the_weight_of_divergence_was_the_same(
  step, schedule, allowed
):
  losses = LossesConfig(divergence_weight=0.1, divergence_schedule=schedule)
  saved, longer = (
    dataclasses.replace(
      run, experiment=dataclasses.replace(run.experiment, losses=losses)
    )
    for run in (of(100, **CONSTANT), of(200, **CONSTANT))
  )
  if allowed:
    factors = [
      [weight_factors(losses, count, taken) for taken in range(step)]
      for count in (100, 200)
    ]
    assert factors[0] == factors[1]
  for before, now in ((saved, longer), (longer, saved)):
    content = json.loads(json.dumps(before.to_dict()))
    if allowed:
      now.check_continues(content, "w", step)
    else:
      with pytest.raises(UserError, match=r"num_steps: "):
        now.check_continues(content, "w", step)
