"""Pools and fixed experts of domains are the same wherever sums form.

As in `test_invariance`: on any mesh, in any micro-batches, for any order of
rows.
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
  take,
)

POOLS = dataclasses.replace(MODEL, pool_min=3, pool_max=6)
BY_DOMAIN = dataclasses.replace(MODEL, router="domain")


@pytest.fixture(scope="module")
def pools_on_one_device():
  return compute(random_batch(), config=POOLS)


@pytest.fixture(scope="module")
def by_domain_on_one_device():
  return compute(random_batch(), config=BY_DOMAIN)


def test_pools_and_fixed_experts_change_the_numbers(
  pools_on_one_device, by_domain_on_one_device
):
  free = compute(random_batch())
  for other in (pools_on_one_device, by_domain_on_one_device):
    found = differences(other, free)
    assert found["terms/lm_loss"] > 1e-4
    assert found["sums/routing/assignments_LE"] > 0.01


CHOICE_CASES = [
  ((1, 2, 1, 2, 2), 2),
  *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      ((1, 1, 1, 1), 4),
      ((8, 1, 1, 1), 1),
      ((1, 2, 2, 2), 2),
      ((1, 1, 8, 1), 1),
      ((1, 1, 1, 1, 8), 1),
    )
  ),
]


@pytest.mark.parametrize(("mesh_sizes", "accumulation_steps"), CHOICE_CASES)
def test_same_pools_on_any_mesh_in_micro_batches(
  pools_on_one_device, mesh_sizes, accumulation_steps
):
  batch = shuffled(random_batch())
  got = compute(batch, mesh_sizes, accumulation_steps, config=POOLS)
  assert_same(got, pools_on_one_device)


@pytest.mark.parametrize(("mesh_sizes", "accumulation_steps"), CHOICE_CASES)
def test_same_fixed_experts_on_any_mesh_in_micro_batches(
  by_domain_on_one_device, mesh_sizes, accumulation_steps
):
  batch = shuffled(random_batch())
  got = compute(batch, mesh_sizes, accumulation_steps, config=BY_DOMAIN)
  assert_same(got, by_domain_on_one_device)


def test_padding_rows_change_no_pool(pools_on_one_device):
  batch = random_batch()
  got = compute(take(batch, batch.weights_BT.any(1)), config=POOLS)
  assert_same(got, pools_on_one_device)
