"""Which steps are skipped, against plain Python."""

import math
import statistics

import jax
import jax.numpy as jnp
import pytest

from edl_jax.spikes import judge, no_spikes


def naive(norms, times, at_most):
  """Yields whether each step is skipped, and the median."""
  taken, in_a_row = [], 0
  for norm in norms:
    median = statistics.median(taken[-128:]) if taken else norm
    far = len(taken) >= 8 and norm > times * median
    skip = (far or not math.isfinite(norm)) and in_a_row < at_most
    yield skip, median
    in_a_row = in_a_row + 1 if skip else 0
    if not skip:
      taken.append(norm)


def run(norms, times, at_most):
  step = jax.jit(judge, static_argnums=(2, 3))
  spikes, found = no_spikes(), []
  for norm in norms:
    skip, median, spikes = step(spikes, jnp.float32(norm), times, at_most)
    found.append((bool(skip), float(median)))
  return found, spikes


NORMS = [
  # Spikes before there is a median to go by, and after; two in a row; a change
  # for good; more than the window.
  *(9.0, *[1.0] * 8, 8.0, 1.5, 9.0, 1e9, 1.25, *[40.0] * 6, 50.0),
  *(1.0 + 0.01 * i for i in range(140)),
  *(4.0, 1.0),
]


@pytest.mark.parametrize(("times", "at_most"), [(3.0, 3), (1.0, 1), (7.0, 10)])
def test_against_plain_python(times, at_most):
  found, spikes = run(NORMS, times, at_most)
  want = list(naive(NORMS, times, at_most))
  assert [skip for skip, _ in found] == [skip for skip, _ in want]
  medians = [median for _, median in want]
  assert [median for _, median in found] == pytest.approx(medians, rel=1e-6)
  skipped = sum(skip for skip, _ in want)
  assert int(spikes.skipped) == skipped > 0
  assert int(spikes.taken) == len(NORMS) - skipped


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norms_that_are_not_finite_are_skipped_from_the_first_step(bad):
  found, spikes = run([bad, bad, 1.0, bad], 5.0, 10)
  assert [skip for skip, _ in found] == [True, True, False, True]
  assert int(spikes.in_a_row) == 1 and int(spikes.taken) == 1
  found, _ = run([bad] * 4, 5.0, 3)
  assert [skip for skip, _ in found] == [True, True, True, False]
