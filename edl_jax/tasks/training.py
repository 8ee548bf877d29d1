"""Evaluates tasks while a run trains."""

import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from edl_jax import storage
from edl_jax.config import TrainConfig
from edl_jax.model.transformer import Model
from edl_jax.tasks.evaluation import EncodedTasks, evaluate_tasks
from edl_jax.tasks.routing import DomainRouting


class TrainingTasks:
  """The tasks of a run, evaluated on every `train.task_every` steps."""

  def __init__(self, encoded: EncodedTasks, train: TrainConfig, mesh: Mesh):
    self._encoded, self._train, self._mesh = encoded, train, mesh
    self._result: dict[str, Any] | None = None

  def is_due(self, step: int) -> bool:
    """Returns whether the tasks are evaluated after a step."""
    return step % self._train.task_every == 0 or step == self._train.num_steps

  def evaluate(
    self,
    model: Model,
    report: Mapping[str, Any] | None,
    say: Callable[[str], object],
  ) -> dict[str, float]:
    """Evaluates the model, and keeps the result for `write`.

    Args:
      model: laid out on the mesh.
      report: the model's routing report, the content of routing.json; None if
        it is unknown.
      say: is told in one line of the mean, and if memory does not suffice.

    Returns:
      Bits per byte by the names in `metrics.jsonl`.
    """
    train = self._train
    micro_batch = train.batch_size // train.accumulation_steps
    self._result = evaluate_tasks(
      model,
      self._encoded,
      self._mesh,
      # A training step has memory for as many.
      micro_batch * train.sequence_length,
      None if report is None else DomainRouting.from_report(report),
      say,
    )
    figures = {
      f"eval/task/{name}/bpb": task["figures"]["bits_per_byte"]["mean"]
      for name, task in self._result["tasks"].items()
    }
    mean = statistics.fmean(figures.values())
    say(f"tasks: {mean:.4f} bits/byte, mean of {len(figures)}")
    return figures

  def write(self, workdir: str, step: int) -> None:
    """Writes the last result to tasks.json, unless there is one of this step.

    That one may be of more documents, by `python -m edl_jax.tasks`.
    """
    path = os.path.join(workdir, "tasks.json")
    start = f'{{"step": {step},'
    if epath.Path(path).exists() and epath.Path(path).read_text().startswith(
      start
    ):
      return
    storage.write_json(path, {"step": step, **(self._result or {})})
