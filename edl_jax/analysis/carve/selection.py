"""Which experts of each layer to keep, chosen on training text."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from edl_jax.losses import routing
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch

# The score of an expert is the number of tokens sent to it, its mean router
# probability, or the norms of its outputs, each times its routing weight.
SCORES = ("assignments", "probability", "output_norm")

ScoreStep = Callable[[Model, Batch, np.ndarray], jax.Array]


# Runs of one shape share the compiled program.
@functools.cache
def make_score_step(score: str) -> ScoreStep:
  """Returns the jitted function that scores the experts on one batch.

  It takes a model, a batch, and the mask kept_LE of the experts to choose from,
  and returns float32 sums over counted tokens, (L, E).

  Args:
    score: one of `SCORES`.

  Raises:
    ValueError: there is no such score.
  """
  if score not in SCORES:
    raise ValueError(f"score={score!r}: must be one of {', '.join(SCORES)}")
  outputs = routing.output_stats if score == "output_norm" else None

  @jax.jit
  def score_step(model: Model, batch: Batch, kept_LE: jax.Array) -> jax.Array:
    # Sums by domain are not used: a batch has one domain.
    sums, _ = model.batch_sums(
      batch, 1, routing.Summaries(outputs=outputs), kept_LE=kept_LE
    )
    if score == "assignments":
      return sums.routing.assignments_LE
    if score == "probability":
      return sums.routing.token_probability_LE
    return sums.routing.output_sums().gated_norm_E

  return score_step


class Selector:
  """Chooses the experts that domains use most."""

  def __init__(
    self,
    score_step: ScoreStep,
    model: Model,
    batches: Mapping[int, Sequence[Batch]],
    *,
    greedy: bool = False,
  ):
    """Takes what the choice depends on.

    Args:
      score_step: from `make_score_step`.
      model: laid out on the mesh in use.
      batches: calibration text by domain.
      greedy: whether each layer is scored with the layers below already cut.
        Otherwise all layers are scored in the whole model.
    """
    self._score_step, self._model = score_step, model
    self._batches, self._greedy = batches, greedy
    config = model.config
    num_layers = config.num_layers - config.num_dense_layers
    self._shape = (num_layers, config.num_experts)
    # Shares by domain and mask: the same ones serve every number of experts.
    self._known: dict[tuple[int, bytes], np.ndarray] = {}

  def select(self, domains: Sequence[int], keep: int) -> np.ndarray:
    """Returns kept_LE, bool, with `keep` experts of every layer.

    Of several domains each has the same say, whatever its text's size.

    Args:
      domains: labels, keys of the batches.
      keep: from 1 to E.
    """
    kept_LE = np.ones(self._shape, bool)
    if not self._greedy:
      return most(self.shares(domains, kept_LE), keep)
    for layer in range(len(kept_LE)):
      # Cut this layer alone: those above it are still whole.
      kept_LE[layer] = most(self.shares(domains, kept_LE)[layer], keep)
    return kept_LE

  def shares(self, domains: Sequence[int], kept_LE: np.ndarray) -> np.ndarray:
    """Returns each expert's share of its layer's score, float64 (L, E).

    It is the mean of the shares of the domains.
    """
    return np.mean([self._share(d, kept_LE) for d in domains], axis=0)

  def _share(self, domain: int, kept_LE: np.ndarray) -> np.ndarray:
    key = (domain, kept_LE.tobytes())
    if key not in self._known:
      score_LE = np.zeros(self._shape)
      for batch in self._batches[domain]:
        score_LE += np.asarray(self._score_step(self._model, batch, kept_LE))
      self._known[key] = score_LE / score_LE.sum(-1, keepdims=True)
    return self._known[key]


def most(score_E: np.ndarray, keep: int) -> np.ndarray:
  """Returns a mask of the `keep` largest scores along the last axis.

  Of equal scores the one of the lower number is kept.
  """
  order_E = np.argsort(-score_E, axis=-1, kind="stable")
  kept_E = np.zeros(score_E.shape, bool)
  np.put_along_axis(kept_E, order_E[..., :keep], True, axis=-1)
  return kept_E


def random_experts(shape: tuple[int, int], keep: int, draw: int) -> np.ndarray:
  """Returns kept_LE of random experts, the same for every run of that shape."""
  score_LE = np.random.default_rng((draw, keep)).random(shape)
  return most(score_LE, keep)


def expert_numbers(kept_LE: np.ndarray) -> list[list[int]]:
  """Returns the numbers of the kept experts of every layer, rising."""
  return [np.flatnonzero(kept_E).tolist() for kept_E in kept_LE]
