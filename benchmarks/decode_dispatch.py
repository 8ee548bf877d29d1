"""How a decode step's few tokens reach their experts: two ways, timed.

  python -m benchmarks.decode_dispatch

runs the experts of all layers on a few tokens, with the dispatch of generation
(few) and with that of training (gather).
"""

import functools
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from edl_jax.command import Command
from edl_jax.model.expert_parallel import few_mixed_outputs, mixed_outputs
from edl_jax.model.moe import GATHER

COMMAND = Command(__doc__)
_ROUNDS = COMMAND.flag("rounds", 10, "Rounds of timing.", minimum=1)

# Layers, experts, active experts, width and expert width: those of demo.py and
# bench.py, and more.
_SIZES = {
  "demo": (4, 16, 2, 128, 128),
  "bench": (4, 8, 2, 256, 512),
  "64 experts": (4, 64, 4, 512, 256),
}


def _layers(is_few: bool):
  """Returns the function that runs all layers' experts."""

  def run(x_PM, expert_LPA, gate_PA, gate_up_LEM2F, down_LEFM):
    def layer(x_PM, inputs):
      expert_PA, gate_up_EM2F, down_EFM, index = inputs
      if is_few:
        y_PM = few_mixed_outputs(
          x_PM, expert_PA, gate_PA, gate_up_LEM2F, down_LEFM, index
        )
      else:
        y_PM = mixed_outputs(
          x_PM, expert_PA, gate_PA, gate_up_EM2F, down_EFM, GATHER
        )
      return x_PM + y_PM, None

    indices = jnp.arange(len(expert_LPA))
    layers = (expert_LPA, gate_up_LEM2F, down_LEFM, indices)
    return jax.lax.scan(layer, x_PM, layers)[0]

  return jax.jit(run)


def _shapes(sizes, tokens, dtype):
  layers, experts, active, width, hidden = sizes
  return (
    ((tokens, width), dtype),
    ((layers, tokens, active), jnp.int32),
    ((tokens, active), jnp.float32),
    ((layers, experts, width, 2, hidden), dtype),
    ((layers, experts, hidden, width), dtype),
  )


def _time(rounds: int) -> None:
  random = np.random.default_rng(0)
  for name, sizes in _SIZES.items():
    for tokens in (1, 4, 16):
      x, expert, gate, *weights = (
        random.standard_normal(shape, np.float32) * 0.05
        for shape, _ in _shapes(sizes, tokens, jnp.float32)
      )
      chosen = random.random((*expert.shape[:2], sizes[1])).argsort(-1)
      arrays = jax.device_put(
        (x, chosen[..., : sizes[2]].astype(np.int32), gate, *weights)
      )
      ways = {}
      for way in ("few", "gather"):
        compiled = _layers(way == "few").lower(*arrays).compile()
        ways[way] = functools.partial(
          measure.seconds, functools.partial(compiled, *arrays)
        )
      measure.take_turns(ways, 2)
      taken = measure.take_turns(ways, rounds)
      ratio = statistics.median(
        many / few
        for few, many in zip(taken["few"], taken["gather"], strict=True)
      )
      few, many = (1e3 * statistics.median(each) for each in taken.values())
      print(
        f"{name}, {tokens} tokens: few {few:.2f} ms, gather {many:.2f} ms,"
        f" ratio {ratio:.1f}"
      )


@COMMAND.main
def main() -> None:
  """Times both ways."""
  _time(_ROUNDS.value)


if __name__ == "__main__":
  sys.exit(main())
