"""Settings of other model families give the same numbers on any mesh.

As in `test_invariance`.
"""

import dataclasses

import pytest

from tests.test_invariance import (
  MODEL,
  assert_same,
  compute,
  differences,
  random_batch,
  shuffled,
)

# Every parameter that the default model lacks, and a tied head.
FAMILY = dataclasses.replace(
  MODEL,
  qk_norm="full",
  attention_bias="all",
  gates="raw",
  gate_scale=2.0,
  shared_expert_gate=True,
  tied_embeddings=True,
)


@pytest.fixture(scope="module")
def on_one_device():
  return compute(random_batch(), config=FAMILY)


@pytest.mark.parametrize(
  ("mesh_sizes", "accumulation_steps"),
  [
    ((1, 2, 2, 2), 2),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ((1, 2, 1, 2, 2), 1),
        ((1, 1, 1, 8), 1),
        ((8, 1, 1, 1), 1),
        ((1, 1, 8, 1), 1),
      )
    ),
  ],
)
def test_same_numbers_on_any_mesh_in_micro_batches(
  on_one_device, mesh_sizes, accumulation_steps
):
  batch = shuffled(random_batch())
  got = compute(batch, mesh_sizes, accumulation_steps, config=FAMILY)
  assert_same(got, on_one_device)


def test_the_settings_change_the_numbers(on_one_device):
  other = dataclasses.replace(FAMILY, gate_scale=8.0)
  found = differences(compute(random_batch(), config=other), on_one_device)
  assert found["terms/lm_loss"] > 1e-4
