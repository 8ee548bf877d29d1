"""Trains cut models on, each on the text that it was cut for.

  python -m docs.study.adapt --sweep=runs/study/labels_pools

For each run of the sweep and each of its coarse domains, the command cuts the
model to the 4 experts of a layer that serve the domain's sources best, and
trains this model and the whole one for 20 steps on these sources, without
divergence and without pools, which a model of 4 experts cannot have. Started
again, it skips what is done. It writes to adapted/RUN.json in the sweep's
folder, for each coarse domain, the held-out losses "whole" and "cut" before
this training and "whole_adapted" and "cut_adapted" after it: means over the
domain's sources in nats per token.
"""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edl_jax import storage
from edl_jax.analysis import sweep_report
from edl_jax.checkpoint import checkpoint_provenance
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.launcher import Launcher, StoppedError, locked
from edl_jax.text.taxonomy import Taxonomy

COMMAND = Command(__doc__)
_SWEEP = COMMAND.flag("sweep", "", "Folder of a sweep.", required=True)
_RUN = COMMAND.flag(
  "run", [], "A run's folder in it; may be repeated. By default all finished."
)
_KEEP = COMMAND.flag("keep", 4, "Experts that a layer keeps.", minimum=1)
_STEPS = COMMAND.flag("steps", 20, "Steps of training.", minimum=1)
_EXPERIMENT = COMMAND.flag(
  "experiment", "experiments/study.py:fine", "Experiment to train on with."
)

FOLDER = "adapted"
# Settings of a run that its further training keeps.
_KEPT = (
  "seed",
  "losses.balance_scope",
  "model.balancing",
  "optimizer.bias_rate",
  "optimizer.bias_schedule",
)


def _settings() -> dict[str, Any]:
  """Returns what the figures depend on, beside the run."""
  flags = {"keep": _KEEP, "steps": _STEPS, "experiment": _EXPERIMENT}
  return {name: flag.value for name, flag in flags.items()}


def _members(taxonomy: Taxonomy) -> Iterator[tuple[str, list[int]]]:
  """Yields each coarse domain, and for each fine one 1 if it is part of it."""
  for index, coarse in enumerate(taxonomy.coarse):
    yield coarse, [int(parent == index) for parent in taxonomy.parent]


def _training(
  result: Mapping[str, Any],
  members: Sequence[int],
  num_experts: int,
  start: str,
  workdir: Path,
) -> list[str]:
  """Returns the command that trains on from the checkpoint in `start`."""
  steps = _STEPS.value
  settings = {key: result["experiment"][key] for key in _KEPT} | {
    "name": "study_adapted",
    "model.num_experts": num_experts,
    "losses.divergence_weight": 0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": steps // 4,
    "train.initial_checkpoint": start,
    "train.num_steps": steps,
    "train.eval_every": steps,
    "train.checkpoint_every": steps,
    "data.weights": ",".join(map(str, members)),
  }
  return [
    "edl_jax.main",
    f"--experiment={_EXPERIMENT.value}",
    f"--workdir={workdir}",
    *(f"--experiment.{key}={value}" for key, value in settings.items()),
  ]


def commands(
  workdir: str, result: Mapping[str, Any], taxonomy: Taxonomy, folder: Path
) -> Iterator[list[str]]:
  """Yields the commands that are left to run, each to end before the next.

  Args:
    workdir: of a finished run.
    result: the content of its result.json.
    taxonomy: of its text.
    folder: for what the commands write.
  """
  num_experts = result["experiment"]["model.num_experts"]
  for coarse, members in _members(taxonomy):
    sources = [name for name, own in zip(taxonomy.fine, members) if own]
    cut = folder / coarse / "cut"
    if not cut.exists():
      part = folder / coarse / "part"
      shutil.rmtree(part, ignore_errors=True)
      yield [
        "edl_jax.analysis.carve",
        f"--workdir={workdir}",
        f"--domain={','.join(sources)}",
        f"--keep={_KEEP.value}",
        f"--export={part}",
      ]
      part.rename(cut)
    for which, experts, start in (
      ("whole", num_experts, workdir),
      ("cut", _KEEP.value, str(cut)),
    ):
      place = folder / coarse / f"{which}_adapted"
      if not (place / "result.json").exists():
        yield _training(result, members, experts, start, place)


def losses(taxonomy: Taxonomy, folder: Path) -> dict[str, dict[str, float]]:
  """Returns the losses by coarse domain, once all commands have run."""
  found = {}
  for coarse, members in _members(taxonomy):
    sources = [name for name, own in zip(taxonomy.fine, members) if own]
    cut = json.loads((folder / coarse / "cut" / "cut.json").read_text())
    own = {
      which: statistics.fmean(cut["losses"][name][which] for name in sources)
      for which in ("whole", "cut")
    }
    for which in ("whole_adapted", "cut_adapted"):
      result = json.loads((folder / coarse / which / "result.json").read_text())
      domains = result["eval"]["domains"]
      own[which] = statistics.fmean(domains[n]["lm_loss"] for n in sources)
    found[coarse] = own
  return found


def adapt(run: sweep_report.Run, launcher: Launcher, lock: Any) -> None:
  """Writes the file of a run, if it is not there.

  Raises:
    UserError: a command fails, or the file is of other settings.
  """
  path = Path(_SWEEP.value, FOLDER, f"{run.name}.json")
  settings = _settings()
  if path.exists():
    known = json.loads(path.read_text())
    if any(known[name] != value for name, value in settings.items()):
      raise UserError(f"{path} is of other flags; delete it, or give its own")
    return
  workdir = os.path.join(_SWEEP.value, run.name)
  name = ",".join(f"{name}={settings[name]}" for name in ("keep", "steps"))
  folder = path.parent / f"{run.name},{name}"
  folder.mkdir(parents=True, exist_ok=True)
  output = folder / "output.txt"
  taxonomy = checkpoint_provenance(workdir).taxonomy
  found = launcher.run(
    (
      (command[0], [sys.executable, "-m", *command], str(output))
      for command in commands(workdir, run.result, taxonomy, folder)
    ),
    lock,
  )
  for module, code in found:
    if code:
      said = output.read_text().strip().splitlines()[-1:]
      raise UserError(f"{module} ended with {code}: {''.join(said)} ({output})")
  storage.write_json(str(path), settings | {"losses": losses(taxonomy, folder)})
  # Half a gigabyte for each run of the study.
  for checkpoints in [*folder.rglob("checkpoints")]:
    shutil.rmtree(checkpoints)


@COMMAND.main
def main() -> int:
  """Writes a file for each run; returns the exit code.

  Raises:
    UserError: no run is finished, or a command fails.
  """
  runs = sweep_report.read_runs(_SWEEP.value)
  wanted = _RUN.value or [run.name for run in runs]
  if missing := sorted(set(wanted) - {run.name for run in runs}):
    raise UserError(f"--run={missing[0]}: no finished run of {_SWEEP.value}")
  try:
    with Launcher() as launcher, locked(_SWEEP.value) as lock:
      for run in runs:
        if run.name in wanted:
          adapt(run, launcher, lock)
          print(f"{run.name}: done", flush=True)
  except StoppedError as error:
    return 128 + error.number
  return 0


if __name__ == "__main__":
  sys.exit(main())
