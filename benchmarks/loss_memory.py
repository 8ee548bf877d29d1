"""Measures the memory of the losses whose plain form would not fit.

  python -m benchmarks.loss_memory --json=memory.json

Compares the chunked cross-entropy with a form that holds all logits, and the
tiled expert divergence with one that holds all pairs of domains, each with its
gradient. "temporary MiB" is what XLA reserves besides arguments and results.
"measured MiB" is the growth of peak resident memory, arguments and results
included, while our form runs in a separate process.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from edl_jax.command import Command
from edl_jax.losses import divergence
from edl_jax.losses.cross_entropy import chunked_cross_entropy

COMMAND = Command(__doc__)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")
_RUN = COMMAND.flag(
  "run",
  -1,
  "Internal: number of the case whose peak memory to print; -1: all cases.",
)

TOKENS, WIDTH, EXPERTS = 4096, 256, 64
VOCABULARIES = (4096, 32768, 131072)
DOMAINS = (49, 1024, 4096)


def chunked(x_BTM: jax.Array, head_MV: jax.Array) -> jax.Array:
  """Returns the library's cross-entropy; every target is token 0."""
  shape = x_BTM.shape[:2]
  zeros, ones = jnp.zeros(shape, jnp.int32), jnp.ones(shape)
  return chunked_cross_entropy(x_BTM, head_MV, zeros, ones)[0]


def all_logits(x_BTM: jax.Array, head_MV: jax.Array) -> jax.Array:
  """Returns the same cross-entropy from all logits at once."""
  return -jax.nn.log_softmax(x_BTM @ head_MV)[..., 0].sum()


def tiled(p_DE: jax.Array) -> jax.Array:
  """Returns the library's expert divergence loss."""
  return divergence.expert_divergence_loss(p_DE, jnp.ones(len(p_DE)))


def all_pairs(p_DE: jax.Array) -> jax.Array:
  """Returns the same loss from all pairs at once, in the textbook form."""
  m_DDE = (p_DE[:, None] + p_DE[None]) / 2
  kl_DD = (p_DE[:, None] * jnp.log(p_DE[:, None] / m_DDE)).sum(-1)
  divergence_DD = (kl_DD + kl_DD.T) / 2
  other_DD = ~jnp.eye(len(p_DE), dtype=bool)
  loss_DD = -jnp.log(jnp.where(other_DD, divergence_DD + 1e-8, 1))
  return loss_DD.sum() / other_DD.sum()


def cases() -> list[tuple[str, Callable, Callable, tuple[Any, ...]]]:
  """Returns (name, ours, plain, shapes of the arguments)."""
  made = [
    (
      f"cross-entropy, {TOKENS} tokens, V={vocabulary}",
      *(chunked, all_logits),
      ((1, TOKENS, WIDTH), (WIDTH, vocabulary)),
    )
    for vocabulary in VOCABULARIES
  ]
  made += [
    (
      f"divergence, {domains} domains, E={EXPERTS}",
      *(tiled, all_pairs),
      ((domains, EXPERTS),),
    )
    for domains in DOMAINS
  ]
  return made


def temporary(function: Callable, shapes: tuple[Any, ...]) -> int:
  """Returns the bytes that XLA reserves for value and gradient."""
  gradient = jax.value_and_grad(function, tuple(range(len(shapes))))
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = jax.jit(gradient).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def run(case: int) -> None:
  """Prints the growth of peak memory in bytes while our form runs."""
  _, function, _, shapes = cases()[case]
  gradient = jax.jit(jax.value_and_grad(function, tuple(range(len(shapes)))))
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = gradient.lower(*abstract).compile()
  before = measure.peak_memory()
  keys = jax.random.split(jax.random.key(0), len(shapes))
  arguments = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes)]
  if function is tiled:
    arguments = [jax.nn.softmax(arguments[0])]
  jax.block_until_ready(compiled(*arguments))
  print(measure.peak_memory() - before)


def measured(case: int) -> int:
  """Runs a case in a separate process; returns its growth in bytes."""
  command = [sys.executable, "-m", "benchmarks.loss_memory", f"--run={case}"]
  ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
  return int(ended.stdout)


@COMMAND.main
def main() -> None:
  """Measures all cases and prints the table."""
  if _RUN.value >= 0:
    run(_RUN.value)
    return
  rows = []
  for case, (name, ours, plain, shapes) in enumerate(cases()):
    ours_bytes, plain_bytes = temporary(ours, shapes), temporary(plain, shapes)
    rows.append(
      {
        "value and gradient": name,
        "temporary MiB": ours_bytes / 2**20,
        "plain form MiB": plain_bytes / 2**20,
        "ratio": ours_bytes / plain_bytes,
        "measured MiB": measured(case) / 2**20,
      }
    )
  measure.report(rows, _JSON.value)


if __name__ == "__main__":
  sys.exit(main())
