"""What a run is made from: each of its checkpoints says so."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from edl_jax import config
from edl_jax.config import Experiment, UserError
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Provenance:
  """What a run is made from. A run resumes only one of equal provenance."""

  experiment: Experiment
  taxonomy: Taxonomy
  tokenizer: Tokenizer
  content_hash: str

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON object."""
    return {
      "experiment": config.flatten(self.experiment),
      "taxonomy": self.taxonomy.to_dict(),
      "tokenizer": self.tokenizer.to_json(),
      "content_hash": self.content_hash,
    }

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Self:
    """Inverse of `to_dict`."""
    return cls(
      experiment=config.unflatten(saved["experiment"]),
      taxonomy=Taxonomy.from_dict(saved["taxonomy"]),
      tokenizer=Tokenizer.from_json(saved["tokenizer"]),
      content_hash=saved["content_hash"],
    )

  def check_continues(self, saved: Mapping[str, Any], where: str) -> None:
    """Checks that this run may resume the one that `saved` describes.

    Args:
      saved: a `to_dict`.
      where: the folder of that run, for messages.

    Raises:
      UserError: the two differ; names what differs.
    """
    current = self.to_dict()
    way_out = "choose another --workdir, or undo the difference"
    keys = config.differing_keys(saved["experiment"], current["experiment"])
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
