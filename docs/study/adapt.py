"""Trains cut models on, each on the text that it was cut for.

  python -m docs.study.adapt --sweep=runs/study/balance

For each finished run of the sweep and each of its coarse domains, the command
cuts the model to the 4 experts of a layer that serve the domain's sources best,
and trains this model and the whole one for 20 steps on these sources. Started
again, it skips what is done. It writes to adapted/RUN.json in the sweep's
folder, for each coarse domain, the held-out losses "whole" and "cut" before
this training and "whole_adapted" and "cut_adapted" after it: means over the
domain's sources in nats per token.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edl_jax import storage
from edl_jax.analysis import sweep_report
from edl_jax.checkpoint import checkpoint_provenance
from edl_jax.command import Command
from edl_jax.config import UserError

COMMAND = Command(__doc__)
_SWEEP = COMMAND.flag("sweep", "", "Folder of a sweep.", required=True)
_KEEP = COMMAND.flag("keep", 4, "Experts that a layer keeps.", minimum=1)
_EXPERIMENT = COMMAND.flag(
  "experiment", "experiments/study.py:fine", "Experiment to train on with."
)
_STEPS = COMMAND.flag("steps", 20, "Steps of training.", minimum=1)

FOLDER = "adapted"
# Settings of a run that its further training keeps.
_KEPT = (
  "losses.balance_scope",
  "model.balancing",
  "optimizer.bias_rate",
  "optimizer.bias_schedule",
)


def _start(*command: str) -> None:
  """Runs a command of this package, without what it prints.

  Raises:
    UserError: it fails; says what it said last.
  """
  found = subprocess.run(
    [sys.executable, "-m", *command],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if found.returncode:
    reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(f"python -m {' '.join(command)}: {reason}")


def _cut(workdir: str, sources: Sequence[str], folder: Path) -> dict[str, Any]:
  """Cuts a model for some sources; returns what cut.json says."""
  record = folder / "cut.json"
  if not record.exists():
    _start(
      "edl_jax.analysis.carve",
      f"--workdir={workdir}",
      f"--domain={','.join(sources)}",
      f"--keep={_KEEP.value}",
      f"--export={folder}",
    )
  return json.loads(record.read_text())


def _train(
  result: Mapping[str, Any],
  weights: Sequence[int],
  experts: int,
  start: str | Path,
  folder: Path,
) -> dict[str, float]:
  """Trains on from a checkpoint; returns the held-out loss of each source."""
  if not (folder / "result.json").exists():
    settings = {key: result["experiment"][key] for key in _KEPT} | {
      "name": "study_adapted",
      "seed": result["experiment"]["seed"],
      "model.num_experts": experts,
      "losses.divergence_weight": 0,
      "optimizer.learning_rate": 1e-3,
      "optimizer.warmup_steps": _STEPS.value // 4,
      "train.initial_checkpoint": start,
      "train.num_steps": _STEPS.value,
      "train.eval_every": _STEPS.value,
      "train.checkpoint_every": _STEPS.value,
      "data.weights": ",".join(map(str, weights)),
    }
    _start(
      "edl_jax.main",
      f"--experiment={_EXPERIMENT.value}",
      f"--workdir={folder}",
      *(f"--experiment.{key}={value}" for key, value in settings.items()),
    )
  losses = json.loads((folder / "result.json").read_text())["eval"]["domains"]
  return {name: each["lm_loss"] for name, each in losses.items()}


def adapt(workdir: str, result: Mapping[str, Any], folder: Path) -> Any:
  """Returns the losses of a run's coarse domains, as the module describes."""
  taxonomy = checkpoint_provenance(workdir).taxonomy
  every = result["experiment"]["model.num_experts"]
  found = {}
  for index, coarse in enumerate(taxonomy.coarse):
    weights = [int(parent == index) for parent in taxonomy.parent]
    sources = [name for name, own in zip(taxonomy.fine, weights) if own]
    place = folder / coarse
    cut = _cut(workdir, sources, place / "cut")["losses"]
    after = {
      "whole": _train(result, weights, every, workdir, place / "whole"),
      "cut": _train(
        result, weights, _KEEP.value, place / "cut", place / "cut_adapted"
      ),
    }
    found[coarse] = {
      **{
        which: statistics.fmean(cut[name][which] for name in sources)
        for which in ("whole", "cut")
      },
      **{
        f"{which}_adapted": statistics.fmean(losses[name] for name in sources)
        for which, losses in after.items()
      },
    }
  return found


@COMMAND.main
def main() -> None:
  """Writes a file for each finished run.

  Raises:
    UserError: no run is finished, or a command fails.
  """
  for run in sweep_report.read_runs(_SWEEP.value):
    folder = Path(_SWEEP.value, FOLDER)
    path = folder / f"{run.name}.json"
    if not path.exists():
      workdir = os.path.join(_SWEEP.value, run.name)
      found = adapt(workdir, run.result, folder / run.name)
      storage.write_json(str(path), found)
    print(f"{path}: done", flush=True)


if __name__ == "__main__":
  sys.exit(main())
