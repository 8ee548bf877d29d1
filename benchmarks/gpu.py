"""Checks the numbers of one accelerator, then times training steps on it.

  python -m benchmarks.gpu --json=gpu.json

Attention and the grouped product of experts are compared with the same in
float32 or float64. Then the step of `--experiment` is timed. Its model FLOPs
utilisation is given against the rate of a large bfloat16 product, measured in
the same run. On a machine without a GPU the CPU does all of it, at small sizes:
`--experiment=experiments/tiny.py`. `benchmarks/gpu.sh` makes the environment.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, steps
from edl_jax import config_files, sharding
from edl_jax.command import Command
from edl_jax.config import Experiment, MeshConfig, UserError
from edl_jax.model import cudnn
from edl_jax.model.attention import causal_attention
from edl_jax.model.grouped_matmul import grouped_matmul
from edl_jax.model.transformer import training_flops

COMMAND = Command(__doc__)
_EXPERIMENT = COMMAND.flag(
  "experiment", "experiments/edl.py:3b", "Experiment whose step to time."
)
_ROWS = COMMAND.flag("rows", 8, "Rows of a step.", minimum=1)
_LENGTH = COMMAND.flag("length", 2048, "Tokens of a row.", minimum=2)
_ROUNDS = COMMAND.flag("rounds", 10, "Steps to time.", minimum=1)
_PRODUCT = COMMAND.flag(
  "product", 8192, "Rows and columns of the measured product.", minimum=8
)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
NUM_DOMAINS = 49
# Largest difference, relative to the largest element, of bfloat16 from float32.
TOLERANCE = 2e-2


def difference(got: jax.Array, want: jax.Array) -> float:
  """Returns the largest difference, relative to the largest element."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return float(np.abs(got - want).max() / np.abs(want).max())


def attention_difference() -> float:
  """Compares values and gradients of attention in bfloat16 with float32."""
  random = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(random.standard_normal((2, 256, heads, 64)), jnp.bfloat16)
    for heads in (8, 2, 2)
  )
  segments_BT = jnp.asarray(np.repeat([[1, 2, 3, 3]], 2, 0).repeat(64, 1))
  on_gpu = jax.default_backend() == "gpu" and cudnn.fits(q, None)
  implementation = "cudnn" if on_gpu else "xla"

  def fused(q, k, v):
    scaled = q * q.shape[-1] ** -0.5
    return cudnn.attention(
      scaled, k, v, segments_BT, segments_BT, implementation
    )

  def plain(q, k, v):
    return causal_attention(q, k, v, segments_BT, backend="default")

  def both(function: Callable, *arrays: jax.Array):
    return jax.jit(
      jax.value_and_grad(
        lambda *x: jnp.sin(function(*x).astype(jnp.float32)).mean(), (0, 1, 2)
      )
    )(*arrays)[1]

  exact = both(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
  return max(map(difference, both(fused, q, k, v), exact))


def experts_difference() -> float:
  """Compares the grouped product in bfloat16 with a loop in float64."""
  random = np.random.default_rng(1)
  sizes = np.array([0, 100, 1, 155], np.int32)
  x = random.standard_normal((256, 128)).astype(np.float32)
  w = random.standard_normal((4, 128, 192)).astype(np.float32)
  x, w = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w))
  ends = np.cumsum(sizes)
  want = np.concatenate(
    [x[e - n : e] @ w[i] for i, (n, e) in enumerate(zip(sizes, ends))]
  )
  got = jax.jit(grouped_matmul)(
    *(jnp.asarray(a, jnp.bfloat16) for a in (x, w)), jnp.asarray(sizes)
  )
  return difference(got, jnp.asarray(want))


def product_rate(size: int) -> float:
  """Returns the FLOP/s of a square bfloat16 product."""
  x = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(jnp.dot)
  product(x, x).block_until_ready()
  times = [measure.seconds(functools.partial(product, x, x)) for _ in range(5)]
  return 2 * size**3 / statistics.median(times)


def load_experiment() -> Experiment:
  """Returns the experiment to time, on one device in bfloat16."""
  experiment = config_files.load(_EXPERIMENT.value)
  return dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, dtype="bfloat16"),
    mesh=MeshConfig(),
    train=dataclasses.replace(
      experiment.train,
      batch_size=_ROWS.value,
      sequence_length=_LENGTH.value,
      accumulation_steps=1,
    ),
  )


@COMMAND.main
def main() -> None:
  """Prints and writes the figures; fails if numbers are wrong."""
  device = jax.devices()[0]
  checks = {
    "attention": attention_difference(),
    "experts": experts_difference(),
  }
  for name, found in checks.items():
    print(f"{name}: differs by {found:.1e} from float32", flush=True)
    if not found <= TOLERANCE:
      raise UserError(f"{name}: differs by {found:.1e}, more than {TOLERANCE}")
  experiment = load_experiment()
  flops = sum(
    training_flops(experiment.model, _ROWS.value, _LENGTH.value).values()
  )
  mesh = sharding.make_mesh(experiment.mesh, [device])
  with jax.set_mesh(mesh):
    step = steps.TrainingStep(experiment, NUM_DOMAINS, mesh)
    step()
    times = measure.take_turns({"step": step}, _ROUNDS.value)["step"]
  loss = float(step.output.scalars["loss"])
  if not np.isfinite(loss):
    raise UserError(f"the loss of a step is {loss}")
  seconds, peak = statistics.median(times), product_rate(_PRODUCT.value)
  row = {
    "device": device.device_kind,
    "experiment": _EXPERIMENT.value,
    "rows x tokens": f"{_ROWS.value} x {_LENGTH.value}",
    "step, s": round(seconds, 4),
    "tokens/s": round(_ROWS.value * _LENGTH.value / seconds),
    "product, TFLOP/s": round(peak / 1e12, 3),
    "MFU of product": round(flops / seconds / peak, 4),
  }
  measure.report([row], _JSON.value, checks=checks)


if __name__ == "__main__":
  main()
