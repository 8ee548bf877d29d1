"""Compares the grouped matrix product with a dense one of equal FLOPs.

  python -m benchmarks.grouped_matmul --json=grouped_matmul.json

There are three loads of 8, 16 and 64 groups. "balanced" assigns rows to groups
at random; "skewed" gives half of the rows to one group and none to every fourth
group; "equal" gives all groups one size, as the dense product has. Forward is
one product, backward the two of the derivative. All take turns; the ratio is
the FLOP/s of the grouped product over the dense one's. --reference adds
`jax.lax.ragged_dot`, which is slow on a CPU.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from edl_jax import runtime
from edl_jax.command import Command
from edl_jax.model.grouped_matmul import grouped_matmul

COMMAND = Command(__doc__)
_ROUNDS = COMMAND.flag(
  "rounds", 15, "Turns that each contestant takes.", minimum=1
)
_REFERENCE = COMMAND.flag("reference", False, "Measure jax.lax.ragged_dot too.")
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")

# E, R, M, F: the products of experiments/bench.py, demo.py, and of many small
# experts.
SHAPES = (
  (8, 4096, 256, 1024),
  (8, 4096, 512, 256),
  (16, 6144, 128, 256),
  (64, 8192, 256, 512),
)


def group_sizes(load: str, num_groups: int, num_rows: int) -> np.ndarray:
  """Returns int32 sizes (E,) that sum to R."""
  random = np.random.default_rng(0)
  share = np.ones(num_groups)
  if load == "equal":
    return np.full(num_groups, num_rows // num_groups, np.int32)
  if load == "skewed":
    share[::4] = 0
    share[1] = share.sum() - 1
  groups = random.choice(num_groups, num_rows, p=share / share.sum())
  return np.bincount(groups, minlength=num_groups).astype(np.int32)


def dense(x_RM: jax.Array, w_EMF: jax.Array) -> jax.Array:
  """Multiplies E groups of R / E rows each, by a batched product."""
  x_ECM = x_RM.reshape(len(w_EMF), -1, x_RM.shape[1])
  y_ECF = jnp.einsum("ECM,EMF->ECF", x_ECM, w_EMF)
  return y_ECF.reshape(len(x_RM), -1)


def both_ways(
  product: Callable[..., jax.Array], *arrays: jax.Array
) -> tuple[Callable[[], float], Callable[[], float]]:
  """Returns functions that time the product and its derivative.

  Args:
    product: takes `arrays`; it is differentiated in the first two.
  """
  forward = jax.jit(product).lower(*arrays).compile()
  dy_RF = jnp.ones_like(forward(*arrays))

  def derivative(dy_RF, x_RM, w_EMF, *sizes):
    _, pull_back = jax.vjp(lambda x, w: product(x, w, *sizes), x_RM, w_EMF)
    return pull_back(dy_RF)

  backward = jax.jit(derivative).lower(dy_RF, *arrays).compile()
  return (
    lambda: measure.seconds(lambda: forward(*arrays)),
    lambda: measure.seconds(lambda: backward(dy_RF, *arrays)),
  )


def compare(
  num_groups: int, num_rows: int, width: int, hidden: int
) -> list[dict[str, str | float]]:
  """Measures all loads of one shape; returns a row for each."""
  random = np.random.default_rng(0)
  x_RM = jnp.asarray(random.standard_normal((num_rows, width), np.float32))
  w_EMF = jnp.asarray(
    random.standard_normal((num_groups, width, hidden), np.float32)
  )
  contestants: dict[tuple[str, str], Callable[[], float]] = {}

  def enter(name, product, *arrays):
    ways = both_ways(product, *arrays)
    contestants[name, "forward"], contestants[name, "backward"] = ways

  enter("dense", dense, x_RM, w_EMF)
  for load in ("equal", "balanced", "skewed"):
    sizes_E = jnp.asarray(group_sizes(load, num_groups, num_rows))
    enter(load, grouped_matmul, x_RM, w_EMF, sizes_E)
  if _REFERENCE.value:
    enter(
      "reference",
      lambda *arrays: grouped_matmul(*arrays, "reference"),
      *(x_RM, w_EMF, sizes_E),
    )
  measure.take_turns(contestants, 2)  # Warms caches and allocator.
  taken = measure.take_turns(contestants, _ROUNDS.value)
  flops = 2 * num_rows * width * hidden
  rows = []
  for name in dict.fromkeys(name for name, _ in contestants):
    row = {"E": num_groups, "R": num_rows, "M": width, "F": hidden}
    row = {**row, "load": name}
    for way, products in (("forward", 1), ("backward", 2)):
      seconds = float(np.median(taken[name, way]))
      row[f"{way} GFLOP/s"] = products * flops / seconds / 1e9
      row[f"{way} / dense"] = measure.median_ratio(
        taken["dense", way], taken[name, way]
      )
    rows.append(row)
  return rows


@COMMAND.main
def main() -> None:
  """Measures all shapes and prints the table."""
  runtime.configure()
  rows = [row for shape in SHAPES for row in compare(*shape)]
  measure.report(rows, _JSON.value)


if __name__ == "__main__":
  sys.exit(main())
