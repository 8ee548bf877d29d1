"""What a run is made from: each of its checkpoints says so."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from edl_jax import config
from edl_jax.config import Experiment, UserError
from edl_jax.optim import steps_at_peak
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import Tokenizer


def is_import(saved: Mapping[str, Any]) -> bool:
  """Says whether the saved provenance is of weights that were imported."""
  return not saved["content_hash"]


@dataclasses.dataclass(frozen=True)
class Provenance:
  """What a run is made from. A run resumes only one of equal provenance."""

  experiment: Experiment
  taxonomy: Taxonomy
  tokenizer: Tokenizer
  content_hash: str
  # Of weights that came from elsewhere: what they were imported from, and the
  # settings of their tokenizer. Runs that start from them keep it.
  source: Mapping[str, Any] | None = None

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON object."""
    content = {
      "experiment": config.flatten(self.experiment),
      "taxonomy": self.taxonomy.to_dict(),
      "tokenizer": self.tokenizer.to_json(),
      "content_hash": self.content_hash,
    }
    # Checkpoints without it are as they were before it existed.
    return content | ({"source": dict(self.source)} if self.source else {})

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Self:
    """Inverse of `to_dict`."""
    return cls(
      experiment=config.unflatten(saved["experiment"]),
      taxonomy=Taxonomy.from_dict(saved["taxonomy"]),
      tokenizer=Tokenizer.from_json(saved["tokenizer"]),
      content_hash=saved["content_hash"],
      source=saved.get("source"),
    )

  def check_continues(
    self, saved: Mapping[str, Any], where: str, step: int = 0
  ) -> None:
    """Checks that this run may resume the one that `saved` describes.

    `train.num_steps` may differ if the steps taken would have been the same:
    while neither the learning rate nor the weight of divergence of either run
    changes with its length, and in the same phase of weights.

    Args:
      saved: a `to_dict`.
      where: the folder of that run, for messages.
      step: steps taken; 0 without a checkpoint.

    Raises:
      UserError: the two differ; names what differs.
    """
    current = self.to_dict()
    way_out = "choose another --workdir, or undo the difference"
    before, now = saved["experiment"], current["experiment"]
    if step and _same_so_far(before, self.experiment, step):
      before = before | {"train.num_steps": now["train.num_steps"]}
    keys = config.differing_keys(before, now)
    if len(keys) == 1 and keys[0].startswith("train.num_steps:"):
      way_out += (
        "; a run may become longer before its learning rate decays, with"
        " optimizer.schedule=wsd or optimizer.final_fraction=1"
      )
    if keys:
      raise UserError(
        f"{where} belongs to another experiment: {'; '.join(keys)}; {way_out}"
      )
    for name, what in (
      ("content_hash", "was made from other text (content hash differs)"),
      ("taxonomy", "has other domains"),
      ("tokenizer", "has another tokenizer"),
    ):
      if json.dumps(saved[name]) != json.dumps(current[name]):
        raise UserError(f"{where} {what}; {way_out}")


def _same_so_far(
  saved: Mapping[str, Any], experiment: Experiment, step: int
) -> bool:
  """Returns whether `step` steps are the same for both numbers of steps."""
  counts: tuple[Any, int] = (
    saved.get("train.num_steps"),
    experiment.train.num_steps,
  )
  for count in counts:
    if not isinstance(count, int) or step > count:
      return False
    constant = steps_at_peak(experiment.optimizer, count)
    if constant is not None and step > constant:
      return False
    losses = experiment.losses
    if losses.divergence_weight and losses.divergence_schedule != "constant":
      # A rise goes by the number of steps from the first one on.
      rises = losses.divergence_schedule == "warmup"
      if step > (0 if rises else (1 - losses.divergence_fraction) * count):
        return False
  starts = [
    [round(phase[0] * count) for phase in experiment.data.weight_phases]
    for count in counts
  ]
  return all(
    before == now or min(before, now) >= step for before, now in zip(*starts)
  )
