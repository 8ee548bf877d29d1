"""Meetings in a window, counted pair by pair."""

import numpy as np

from edl_jax.aot import windows


def test_meetings_of_any_window():
  random = np.random.default_rng(0)
  for _ in range(300):
    sizes, steps = random.integers(1, 9, 3), random.integers(1, 7, 3)
    lines = [(int(n), int(step)) for n, step in zip(sizes, steps)]
    pad = int(random.integers(-9, 20))
    places = [set(range(0, n * step, step)) for n, step in lines]
    met = sum(o + k - pad in places[2] for o in places[0] for k in places[1])
    assert windows.meetings(*lines, pad) == met
  # As wide as a vocabulary: pair by pair this would take an hour.
  wide = (100_000, 1)
  assert windows.meetings(wide, wide, (1, 1), 99_999) == 100_000
