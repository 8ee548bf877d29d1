"""Steps whose gradient is far larger than those before it are skipped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The running median is that of so many gradient norms, and there is none before
# so many steps.
_WINDOW, _FEWEST = 128, 8


class Spikes(NamedTuple):
  """What a run remembers of its gradient norms."""

  # The last norms of steps that were taken; NaN where there is none yet.
  norms_I: jax.Array
  # Steps taken, steps skipped, and those skipped since the last one taken;
  # int32 scalars.
  taken: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def no_spikes() -> Spikes:
  """Returns what a run remembers before its first step."""
  # One array each: the training step donates them.
  return Spikes(jnp.full(_WINDOW, jnp.nan), *(jnp.int32(0) for _ in range(3)))


def judge(
  spikes: Spikes, norm: jax.Array, times: float, at_most: int
) -> tuple[jax.Array, jax.Array, Spikes]:
  """Says whether to skip a step.

  A step is skipped if its norm is not finite, or exceeds `times` the median of
  the last 128 steps taken, once there are 8; but not after `at_most` skipped
  steps in a row, as the gradient has then changed for good.

  Args:
    spikes: of the steps before.
    norm: global norm of the step's gradient, float32 scalar.
    times: how far above the median a spike is.
    at_most: largest number of steps to skip in a row.

  Returns:
    Whether to skip, a bool scalar; the median, before the first step `norm`
    itself; and what to remember.
  """
  median = jnp.where(spikes.taken > 0, jnp.nanmedian(spikes.norms_I), norm)
  is_far = (norm > times * median) & (spikes.taken >= _FEWEST)
  skip = (is_far | ~jnp.isfinite(norm)) & (spikes.in_a_row < at_most)
  place = spikes.taken % _WINDOW
  one = jnp.int32(1)
  return (
    skip,
    median,
    Spikes(
      jnp.where(skip, spikes.norms_I, spikes.norms_I.at[place].set(norm)),
      spikes.taken + jnp.where(skip, 0, one),
      spikes.skipped + jnp.where(skip, one, 0),
      jnp.where(skip, spikes.in_a_row + one, 0),
    ),
  )
