"""Which numbers of experts may be kept."""

import subprocess
import sys

import pytest

from edl_jax.analysis.carve import keep
from edl_jax.config import ModelConfig, UserError


def model_of(num_experts=16, num_active=2, router="learned"):
  return ModelConfig(
    num_experts=num_experts, num_active_experts=num_active, router=router
  )


def refused(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_numbers_of_experts():
  one = {"runs/a": model_of()}
  assert keep.parse_keep(["8", "2", "8"], one, "keep") == [2, 8]
  assert keep.parse_keep([], one, "keep") == [2, 4, 6, 8, 12]
  # Never fewer than are active.
  assert keep.parse_keep([], {"runs/a": model_of(8, 4)}, "keep") == [4, 6]


def test_numbers_that_suit_no_model():
  models = {"runs/a": model_of(), "runs/b": model_of(8, 1)}
  few = refused(keep.parse_keep, ["1"], models, "keep")
  assert few.startswith("--keep=1: runs/a has model.num_active_experts=2")
  many = refused(keep.parse_keep, ["12"], models, "carve")
  assert many == "--carve=12: runs/b has only model.num_experts=8"
  text = refused(keep.parse_keep, ["two"], models, "keep")
  assert text == "--keep=two: must be a number of experts"


def test_fixed_experts_leave_no_choice():
  keep.check_router(model_of(), "--workdir=runs/a")
  fixed = model_of(router="domain")
  message = refused(keep.check_router, fixed, "--workdir=runs/a")
  assert message.startswith("--workdir=runs/a has model.router=domain, which")


def test_a_sweep_needs_no_jax():
  code = "import sys, edl_jax.sweep; sys.exit('jax' in sys.modules)"
  assert (
    subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
  )
