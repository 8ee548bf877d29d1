"""Which experts tasks use, and how far that is from each training domain."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from etils import epath

from edl_jax.config import UserError
from edl_jax.losses.divergence import jensen_shannon
from edl_jax.tasks.scoring import TaskRouting


class DomainRouting(NamedTuple):
  """How an evaluation of held-out text saw the training domains routed."""

  # Fine names of the domains that had text.
  names: list[str]
  # Mean router probabilities of each domain, (L, D, E).
  probability_LDE: np.ndarray

  @classmethod
  def from_report(cls, report: Mapping[str, Any]) -> Self:
    """Returns what a routing report says, the content of routing.json."""
    probability_LDE = np.array(report["probabilities"], np.float64)
    # Domains without text have zeros.
    present_D = probability_LDE.sum((0, 2)) > 0
    names = [d for d, present in zip(report["domains"], present_D) if present]
    return cls(names, probability_LDE[:, present_D])


def read_domain_routing(workdir: str, step: int) -> DomainRouting | None:
  """Reads the routing report of a run's evaluation at `step`, if there is one.

  `python -m edl_jax.main --mode=eval` writes it to eval.json. A run writes that
  of its last step to routing.json.

  Raises:
    UserError: one of these files is damaged.
  """

  def read(name: str) -> dict[str, Any]:
    path = epath.Path(workdir, name)
    try:
      return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
      raise UserError(f"{path}: damaged; delete it") from error

  if (evaluation := read("eval.json")).get("step") == step:
    return DomainRouting.from_report(evaluation["report"])
  report = read("routing.json")
  if report and read("result.json").get("step") == step:
    return DomainRouting.from_report(report)
  return None


def routing_by_task(
  names: Sequence[str],
  routing: TaskRouting,
  domains: DomainRouting | None,
  first_layer: int = 0,
) -> dict[str, Any]:
  """Returns what tasks.json says about routing.

  Args:
    names: of the tasks, the labels of `routing`.
    routing: sums over the documents of each task.
    domains: the training domains, as the same parameters route them.
    first_layer: number of the first mixture-of-experts layer.

  Returns:
    "layers", their numbers in the model; "domains", their names, or None; and
    "tasks", by name, each a list of lists, by layer:
      probabilities: mean router probability of each expert.
      assignments: share of the assignments that go to each expert.
      divergence: JSD to the mean router probabilities of each domain, in nats,
        as in the divergence loss; without `domains`, there is none.
  """
  # Every task has a document, and every document tokens.
  p_LDE = routing.probability_LDE / routing.sequences_LD[..., None]
  share_LDE = routing.assignments_LDE / routing.assignments_LDE.sum(
    -1, keepdims=True
  )
  tasks: dict[str, Any] = {}
  for d, name in enumerate(names):
    tasks[name] = {
      "probabilities": p_LDE[:, d].tolist(),
      "assignments": share_LDE[:, d].tolist(),
    }
    if domains is not None:
      divergence_LD = jensen_shannon(
        jnp.asarray(p_LDE[:, d, None]), jnp.asarray(domains.probability_LDE)
      )
      tasks[name]["divergence"] = np.asarray(divergence_LD).tolist()
  return {
    "layers": [first_layer + layer for layer in range(len(p_LDE))],
    "domains": None if domains is None else domains.names,
    "tasks": tasks,
  }


def nearest_domain(routing: Mapping[str, Any], task: str) -> str:
  """Returns the domain of least divergence, mean over layers; "" if unknown."""
  if not routing["domains"]:
    return ""
  divergence_D = np.mean(routing["tasks"][task]["divergence"], axis=0)
  return routing["domains"][int(divergence_D.argmin())]
