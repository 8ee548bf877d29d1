"""What a run is made from, to JSON and back."""

import dataclasses
import json

import pytest

from edl_jax.checkpoint import Provenance
from edl_jax.config import UserError
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
