"""Measures the error of three ways to compute a small JS divergence.

  python -m benchmarks.divergence_accuracy

Domains that still route alike have divergences of 1e-11 to 1e-5 nats, where the
loss -log(JSD) has its steepest gradient. Two textbook forms in float32 are
compared with the one of `edl_jax.losses.divergence` by their largest relative
errors against 50-digit arithmetic, over pairs of distributions on 64 experts:
the entropy form, H((p+q)/2) - (H(p) + H(q))/2, and the Kullback-Leibler form,
(KL(p||m) + KL(q||m))/2 with m = (p+q)/2. An error of 1 is a wrong result.
"""

import decimal
import math
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from edl_jax import tables
from edl_jax.command import Command
from edl_jax.losses.divergence import jensen_shannon

COMMAND = Command(__doc__)

TARGETS = (1e-11, 1e-10, 1e-9, 1e-8, 1.4e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)


def exact_jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
  """Returns the JSD in nats by its definition, in 50-digit arithmetic."""
  with decimal.localcontext() as context:
    context.prec = 50
    total = decimal.Decimal(0)
    for a, b in zip(map(float, p), map(float, q)):
      a, b = decimal.Decimal(a), decimal.Decimal(b)
      m = (a + b) / 2
      total += a * (a / m).ln() / 2 if a else 0
      total += b * (b / m).ln() / 2 if b else 0
    return float(total)


def near_pair(
  divergence: float, num_experts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 distributions whose JSD is about `divergence` nats."""
  random = np.random.default_rng(seed)
  p = random.dirichlet(np.full(num_experts, 2.0))
  direction = random.standard_normal(num_experts)
  direction -= direction.mean()
  # For a small difference d, the JSD is about sum d^2 / (8 p).
  scale = math.sqrt(8 * divergence / np.sum(direction**2 / p))
  q = np.abs(p + scale * direction)
  return p.astype(np.float32), (q / q.sum()).astype(np.float32)


def entropy_form(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns the entropy of the mean less the mean of the entropies."""

  def entropy(x):
    return -jnp.sum(x * jnp.log(x))

  return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def kl_form(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns the mean of the two Kullback-Leibler divergences."""
  m = (p + q) / 2
  return jnp.sum(p * jnp.log(p / m) + q * jnp.log(q / m)) / 2


FORMS = {
  "entropy": jax.jit(entropy_form),
  "Kullback-Leibler": jax.jit(kl_form),
  "edl_jax": jax.jit(jensen_shannon),
}


def largest_errors(
  divergence: float, num_experts: int = 64, num_pairs: int = 10
) -> dict[str, float]:
  """Returns the largest relative error of each form near a divergence."""
  errors = dict.fromkeys(FORMS, 0.0)
  for seed in range(num_pairs):
    p, q = near_pair(divergence, num_experts, seed)
    want = exact_jensen_shannon(p, q)
    for name, form in FORMS.items():
      error = abs(float(form(p, q)) - want) / want
      errors[name] = max(errors[name], error)
  return errors


@COMMAND.main
def main() -> None:
  """Prints a row for each divergence and a column for each form."""
  rows = [("JSD", *FORMS)]
  for target in TARGETS:
    errors = largest_errors(target).values()
    rows.append(tuple(f"{figure:.1e}" for figure in (target, *errors)))
  print("\n".join(tables.aligned(rows)))


if __name__ == "__main__":
  sys.exit(main())
