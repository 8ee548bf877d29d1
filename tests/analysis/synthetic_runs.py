"""Runs that were never trained: random routing of any size, for pages."""

import numpy as np

from edl_jax.analysis.atlas_data import (
  CONTEXT_TOKENS,
  TOP_CONTEXTS,
  TOP_TOKENS,
  Context,
  Example,
  RunRouting,
)
from edl_jax.config import Experiment, ModelConfig
from edl_jax.text.taxonomy import Taxonomy


def synthetic_run(
  num_layers: int,
  num_experts: int,
  names: list[str],
  active: int = 2,
  vocabulary: int = 40,
  example_tokens: int = 20,
  name: str = "run",
  seed: int = 0,
  texts: dict[int, str] | None = None,
) -> RunRouting:
  """Returns a run in which the last expert of the first layer is dead."""
  random = np.random.default_rng(seed)
  num_domains = len(names)
  count_LDE = random.integers(1, 10_000, (num_layers, num_domains, num_experts))
  count_LDE[0, :, -1] = 0
  together_LEE = random.integers(0, 500, (num_layers, num_experts, num_experts))
  together_LEE += together_LEE.swapaxes(1, 2)
  load_LE = count_LDE.sum(1)
  together_LEE[:, range(num_experts), range(num_experts)] = load_LE
  next_LEE = random.integers(0, 500, together_LEE[1:].shape)
  for pairs_EE in (together_LEE[0], together_LEE[0].T, next_LEE[0]):
    pairs_EE[-1] = 0
  divergence_LDD = random.uniform(
    0.001, 0.3, (num_layers, num_domains, num_domains)
  )
  divergence_LDD += divergence_LDD.swapaxes(1, 2)
  divergence_LDD[:, range(num_domains), range(num_domains)] = 0

  def each_expert(make):
    return [[make() for _ in range(num_experts)] for _ in range(num_layers)]

  def pairs():
    tokens = random.choice(vocabulary, TOP_TOKENS, replace=False)
    counts = random.integers(1, 100_000, TOP_TOKENS)
    return list(zip(tokens.tolist(), counts.tolist()))

  def contexts():
    length = 2 * CONTEXT_TOKENS + 1
    return [
      Context(
        float(random.uniform()),
        int(random.integers(num_domains)),
        tuple(random.integers(vocabulary, size=length).tolist()),
        CONTEXT_TOKENS,
      )
      for _ in range(TOP_CONTEXTS)
    ]

  def example():
    shape = num_layers, example_tokens, active
    expert_LTE = random.permuted(
      np.broadcast_to(np.arange(num_experts), (*shape[:2], num_experts)),
      axis=-1,
    )
    return Example(
      random.integers(vocabulary, size=example_tokens),
      expert_LTE[..., :active],
      -np.sort(-random.uniform(size=shape)),
    )

  metrics = (
    "diversity",
    "inter_fraction",
    "purity",
    "inter",
    "token_information",
  )
  metrics += ("normalized_mutual_information", "max_violation")
  return RunRouting(
    name=name,
    step=100,
    experiment=Experiment(
      model=ModelConfig(
        num_layers=num_layers,
        num_experts=num_experts,
        num_active_experts=active,
      )
    ),
    taxonomy=Taxonomy.from_names(names),
    tokens_D=count_LDE[-1].sum(-1) // active,
    assignments_LDE=count_LDE,
    divergence_LDD=divergence_LDD,
    metrics={key: random.uniform(size=num_layers) for key in metrics},
    together_LEE=together_LEE,
    next_LEE=next_LEE,
    frequent=each_expert(pairs),
    typical=each_expert(pairs),
    contexts=each_expert(contexts),
    examples=[example() for _ in names],
    token_texts={i: f" token{i}" for i in range(vocabulary)} | (texts or {}),
  )
