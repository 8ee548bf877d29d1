"""Runs every point of a grid of experiments, then writes a report.

  python -m edl_jax.sweep --experiment=experiments/demo.py \\
    --grid=losses.divergence_weight=0,0.003,0.01 --grid=seed=0,1,2 \\
    --workdir=runs/sweep

Each point is an ordinary run in its own folder of --workdir. Started again, the
same command skips finished points and resumes the one that was stopped. Fields
common to all points are set as for edl_jax.main:

  --experiment.train.num_steps=500

Then measure what each domain loses with 4 experts in each layer:

  --carve=4

Separate values that contain commas by semicolons:

  --grid='data.weights=0.5,0.5;0.9,0.1'

Print one command a line, for xpk, Slurm arrays or GNU parallel, or write the
report alone:

  python -m edl_jax.sweep --experiment=... --grid=... --workdir=... --dry_run
  python -m edl_jax.sweep --workdir=runs/sweep --report
"""

import dataclasses
import hashlib
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from edl_jax import config, config_files, storage
from edl_jax.analysis import comparison, sweep_report
from edl_jax.analysis.carve import report as carve_report
from edl_jax.analysis.carve import swept
from edl_jax.analysis.carve.keep import check_router, parse_keep
from edl_jax.command import Command, print_error
from edl_jax.config import Experiment, UserError
from edl_jax.launcher import Launcher, StoppedError, core_shares, locked

COMMAND = Command(__doc__)
_EXPERIMENT = COMMAND.experiment()
_GRID = COMMAND.flag("grid", [], "KEY=V1,V2,...; may be repeated.")
_WORKDIR = COMMAND.flag(
  "workdir",
  "",
  "Folder of the sweep, with a folder for each run.",
  required=True,
)
_JOBS = COMMAND.flag(
  "jobs",
  1,
  "Runs side by side, each on its own share of the cores; its output goes to"
  " output.txt in its folder.",
  minimum=1,
)
_CARVE = COMMAND.flag(
  "carve",
  (),
  "After the runs, measure each domain with this many experts in each layer;"
  " several numbers are separated by commas. See edl_jax.analysis.carve.",
  kind=tuple,
)
_DRY_RUN = COMMAND.flag(
  "dry_run", False, "Print the commands, one a line, and do nothing else."
)
_REPORT = COMMAND.flag(
  "report", False, "Report on the finished runs in --workdir; run nothing."
)


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep."""

  # Name of its folder in the sweep's.
  name: str
  # Values as text by dotted key: those that all points share, then the grid's.
  overrides: Mapping[str, str]
  experiment: Experiment


def parse_grid(grids: Sequence[str]) -> dict[str, list[str]]:
  """Parses KEY=V1,V2,... (or KEY=V1;V2;...) into texts by dotted key.

  Raises:
    UserError: there is no grid, or one has no value, an unknown key, or the key
      of another.
  """
  if not grids:
    raise UserError("--grid is missing: give a key and values, --grid=seed=0,1")
  parsed: dict[str, list[str]] = {}
  for grid in grids:
    key, _, text = grid.partition("=")
    values = text.split(";" if ";" in text else ",")
    config.check_key(key)
    if not all(value.strip() for value in values):
      raise UserError(
        f"--grid={grid}: empty value; write --grid={key}=VALUE,VALUE,..."
      )
    if key in parsed:
      raise UserError(f"--grid={grid}: {key} is in another --grid too")
    parsed[key] = values
  return parsed


def points(
  experiment: str, grids: Sequence[str], common: Mapping[str, str]
) -> list[Point]:
  """Returns the product of the grids; the last grid varies fastest.

  Args:
    experiment: experiment file, as for `config_files.load`.
    grids: KEY=V1,V2,... each.
    common: overrides that all points share, as text by dotted key.

  Raises:
    UserError: a point is not a valid experiment, or two points are equal.
  """
  config_files.check_experiment_file(experiment)
  grid = parse_grid(grids)
  for key in grid:
    if key in common:
      raise UserError(f"{key} is set by both --grid and --experiment.{key}")
  names = sweep_report.short_names(grid)
  made: list[Point] = []
  for values in itertools.product(*grid.values()):
    overrides = {**common, **dict(zip(grid, values))}
    loaded = config_files.load(experiment, overrides)
    flat = config.flatten(loaded)
    # Name the loaded values, so that 0.01 and 1e-2 are the same run.
    name = ",".join(
      f"{names[key]}={sweep_report.format_value(flat[key])}" for key in grid
    )
    # A name has no slash, and nothing that a shell would need quoted.
    name = _folder_name(re.sub(r"[^\w.,=+-]+", "_", name))
    if name in {point.name for point in made}:
      raise UserError(f"--grid gives the point {name} more than once")
    made.append(Point(name, overrides, loaded))
  return made


# Most bytes of a name, on every file system in use.
_LONGEST_NAME = 255


def _folder_name(name: str) -> str:
  """Returns a name that a folder can have: a long one ends with its hash."""
  content = name.encode()
  if len(content) <= _LONGEST_NAME:
    return name
  digest = hashlib.sha256(content).hexdigest()[:16]
  return f"{content[:100].decode(errors='ignore')}...{digest}"


def command(point: Point, experiment: str, workdir: str) -> list[str]:
  """Returns the command line that runs a point of the sweep in `workdir`."""
  return [
    sys.executable,
    "-m",
    "edl_jax.main",
    f"--experiment={experiment}",
    f"--workdir={os.path.join(workdir, point.name)}",
    *(f"--experiment.{key}={text}" for key, text in point.overrides.items()),
  ]


def is_finished(point: Point, workdir: str) -> bool:
  """Returns whether the point has a result in its folder of `workdir`.

  Raises:
    UserError: the result is of another experiment.
  """
  folder = os.path.join(workdir, point.name)
  result = sweep_report.read_result(folder)
  if result is None:
    return False
  differing = config.differing_keys(
    result["experiment"], config.flatten(point.experiment)
  )
  if differing:
    raise UserError(
      f"{folder} has the result of another experiment"
      f" ({'; '.join(differing)}); choose another --workdir"
    )
  return True


def run_points(
  made: Sequence[Point],
  experiment: str,
  workdir: str,
  keep: Sequence[int] = (),
  jobs: int = 1,
) -> int:
  """Runs the points that are not finished, then reports.

  Args:
    made: the points, which start in this order.
    experiment, workdir: as in `command`.
    keep: numbers of experts to carve the finished runs to; may be empty.
    jobs: how many points run side by side, each on its own cores. With more
      than one, each writes what it says to the file output.txt in its folder.

  Returns:
    Exit code: 0; 1 if a point or carving failed; 128 + number if a signal ended
    the sweep.

  Raises:
    UserError: a folder has the result of another experiment, `workdir` cannot
      be written, or there are fewer cores than jobs.
  """
  core_shares(jobs)
  for point in made:
    is_finished(point, workdir)
  failed, carved = [], True
  try:
    with Launcher() as launcher, locked(workdir) as lock:
      commands = _commands(made, experiment, workdir, jobs)
      for point, code in launcher.run(commands, lock, jobs):
        if code or not is_finished(point, workdir):
          reason = _reason(code)
          failed.append(f"{point.name} ({reason})")
          print_error(f"{point.name} {reason}; going on with the others")
        elif jobs > 1:
          print(f"{point.name}: finished", flush=True)
      finished = _finished(made, workdir)
      if keep and finished:
        carved = _carve(launcher, lock, workdir, finished, keep)
  except StoppedError as stopped:
    name = signal.Signals(stopped.number).name
    print_error(f"stopped by {name}; the same command resumes from here")
    return 128 + stopped.number
  if len(failed) < len(made):
    print_report(workdir)
  if failed:
    print_error(f"{len(failed)} of {len(made)} failed: {', '.join(failed)}")
  return 1 if failed or not carved else 0


def _commands(
  made: Sequence[Point], experiment: str, workdir: str, jobs: int
) -> Iterator[tuple[Point, list[str], str]]:
  """Announces each point and yields its command, unless it is finished."""
  for number, point in enumerate(made, start=1):
    title = f"[{number}/{len(made)}] {point.name}"
    if is_finished(point, workdir):
      print(f"{title}: already finished, skipped", flush=True)
      continue
    output = ""
    if jobs > 1:
      folder = os.path.join(workdir, point.name)
      os.makedirs(folder, exist_ok=True)
      output = os.path.join(folder, "output.txt")
      title = f"{title}: {output} has what it says"
    print(title, flush=True)
    yield point, command(point, experiment, workdir), output


def _finished(made: Sequence[Point], workdir: str) -> list[sweep_report.Run]:
  results = {
    point.name: sweep_report.read_result(os.path.join(workdir, point.name))
    for point in made
  }
  return [
    sweep_report.Run(name, result) for name, result in results.items() if result
  ]


def _carve(
  launcher: Launcher,
  lock: IO[str],
  workdir: str,
  runs: Sequence[sweep_report.Run],
  keep: Sequence[int],
) -> bool:
  """Carves runs of the sweep; returns whether that succeeded.

  Raises:
    StoppedError: a signal arrived, and the command has ended.
  """
  title = f"carving to {', '.join(map(str, keep))} experts in each layer"
  if swept.is_carved(workdir, runs, keep):
    print(f"{title}: already done, skipped", flush=True)
    return True
  print(title, flush=True)
  names = [run.name for run in runs]
  arguments = swept.command(workdir, names, keep)
  for _, code in launcher.run([(title, arguments, "")], lock):
    if code:
      print_error(f"carving {_reason(code)}; the report is without it")
      return False
  return True


def _reason(code: int) -> str:
  if code < 0:
    return f"was killed by {signal.Signals(-code).name}"
  return f"ended with exit code {code}" if code else "ended without result.json"


def print_report(workdir: str) -> None:
  """Writes the report on all finished runs in `workdir` and prints its table.

  Raises:
    UserError: no run is finished.
  """
  runs = sweep_report.read_runs(workdir)
  carved = swept.read(workdir, runs)
  sections = []
  if len(runs) == 2:
    sections += [
      "## Every figure",
      f"```\n{comparison.comparison_table(runs)}\n```",
    ]
  results = [each for each in carved if each]
  if results:
    sections.append(carve_report.tables_of(results, "##"))
  text = sweep_report.write_report(workdir, sections)
  if len(runs) == 2:
    groups = sweep_report.group_runs(runs)
    text = "\n\n".join(
      [
        comparison.comparison_table(runs, carved if results else ()),
        *sweep_report.task_sections(workdir, groups),
      ]
    )
  path = os.path.join(workdir, "report.md")
  print(
    f"\nwritten: {path}, with report.csv and plots beside it\n\n{text}",
    flush=True,
  )


def _parse_carve(made: Sequence[Point]) -> list[int]:
  """Returns the numbers of experts of --carve.

  Raises:
    UserError: a number does not suit a point, or a point has fixed experts.
  """
  if not _CARVE.value:
    return []
  models = {point.name: point.experiment.model for point in made}
  for name, model in models.items():
    check_router(model, f"--carve: {name}")
  return parse_keep(_CARVE.value, models, "carve")


@COMMAND.main
def main() -> int:
  """Runs or lists the points, or reports on the finished ones."""
  experiment, workdir = _EXPERIMENT.value, _WORKDIR.value
  if "://" in workdir:
    raise UserError(f"--workdir={workdir}: sweeps need a local folder")
  if _REPORT.value:
    others = (_GRID.value, experiment, _DRY_RUN.value, _CARVE.value)
    if COMMAND.overrides or any(others):
      raise UserError("--report takes --workdir alone: it runs nothing")
    print_report(workdir)
    return 0
  storage.check_name(workdir)
  made = points(experiment, _GRID.value, COMMAND.overrides)
  keep = _parse_carve(made)
  if _DRY_RUN.value:
    if keep:
      raise UserError("--carve starts after the runs: leave out --dry_run")
    for point in made:
      print(shlex.join(command(point, experiment, workdir)))
    return 0
  return run_points(made, experiment, workdir, keep, _JOBS.value)


if __name__ == "__main__":
  sys.exit(main())
