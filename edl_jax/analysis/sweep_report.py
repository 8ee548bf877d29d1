"""Reports on sweeps: tables over seeds and groups of runs, and plots.

It reads the runs' folders alone. The swept keys are those in which the
experiments of their result.json differ. This module imports no JAX.
"""

import csv
import io
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from edl_jax import metrics, storage, tables
from edl_jax.analysis import comparison, report, task_comparison
from edl_jax.config import Experiment, UserError, flatten


class Run(NamedTuple):
  """A finished run: the name of its folder and the content of result.json."""

  name: str
  result: Mapping[str, Any]


class Group(NamedTuple):
  """Runs that differ in the seed alone."""

  label: str
  # Value by swept key, without the seed.
  values: Mapping[str, Any]
  runs: list[Run]


# Columns of the main table: heading, key of `figures`, format. A column that
# some run lacks, such as one of an older version, is left out.
_COLUMNS = (
  ("LM loss (nats/token)", "lm_loss", ".4f"),
  ("bits per byte", "bits_per_byte", ".4f"),
  ("diversity", "diversity", ".4f"),
  ("D_inter/D_total", "inter_fraction", ".4f"),
  ("MaxVio", "max_violation", ".3f"),
  ("purity", "purity", ".3f"),
  ("NMI", "normalized_mutual_information", ".3f"),
  ("token NMI", "token_mutual_information", ".3f"),
  ("routing variance", "routing_variance", ".4f"),
  ("expert overlap", "expert_overlap", ".3f"),
  ("output similarity", "output_similarity", ".4f"),
  ("silhouette", "silhouette", ".3f"),
  ("tokens/s", "tokens_per_second", ",.0f"),
)


def read_runs(workdir: str) -> list[Run]:
  """Reads result.json of every folder in `workdir` that has one.

  Returns:
    The finished runs, ordered by the values of their swept keys.

  Raises:
    UserError: no run is finished, or a result.json is damaged.
  """
  runs = []
  for name in sorted(os.listdir(workdir)) if os.path.isdir(workdir) else []:
    result = read_result(os.path.join(workdir, name))
    if result is not None:
      runs.append(Run(name, result))
  if not runs:
    raise UserError(f"{workdir}: no folder in it has a result.json yet")
  keys = swept_keys(runs)
  return sorted(runs, key=lambda run: _order(_values(run, keys).values()))


def read_result(folder: str) -> dict[str, Any] | None:
  """Reads `folder`/result.json; None without one.

  Settings that an older version did not have take their defaults.

  Raises:
    UserError: a run did not write this file.
  """
  path = os.path.join(folder, "result.json")
  if not os.path.exists(path):
    return None
  try:
    with open(path) as file:
      result = json.load(file)
    result["experiment"]["seed"]
    defaults = json.loads(json.dumps(flatten(Experiment())))
    result["experiment"] = defaults | result["experiment"]
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path}: not the result of a run; delete that file to run it again"
    ) from error
  return result


def swept_keys(runs: Sequence[Run]) -> list[str]:
  """Returns the keys, `name` apart, in which the experiments differ.

  They have the order of the experiment's fields; the seed is last.
  """
  experiments = [run.result["experiment"] for run in runs]
  known = list(flatten(Experiment()))
  keys = dict.fromkeys([*known, *(key for e in experiments for key in e)])
  swept = [
    key
    for key in keys
    if key != "name"
    and any(e.get(key) != experiments[0].get(key) for e in experiments)
  ]
  return sorted(swept, key="seed".__eq__)


def short_names(keys: Iterable[str]) -> dict[str, str]:
  """Returns every key's last part, or the whole key if last parts coincide."""
  keys = list(keys)
  last = [key.rsplit(".", 1)[-1] for key in keys]
  return {
    key: name if last.count(name) == 1 else key for key, name in zip(keys, last)
  }


def format_value(value: Any) -> str:
  """Formats a value of an experiment: 0.0 as 0, a list as a+b."""
  if isinstance(value, (list, tuple)):
    return "+".join(map(format_value, value))
  return (
    repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
  )


def _values(run: Run, keys: Sequence[str]) -> dict[str, Any]:
  return {key: run.result["experiment"].get(key) for key in keys}


def _order(values: Iterable[Any]) -> list[tuple[int, float, str]]:
  """Returns a sort key: numbers by size, then texts."""
  return [
    (0, value, "")
    if isinstance(value, (int, float))
    else (1, 0.0, format_value(value))
    for value in values
  ]


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Groups runs that share all swept keys but the seed; keeps their order."""
  keys = [key for key in swept_keys(runs) if key != "seed"]
  names = short_names(keys)
  groups: dict[str, Group] = {}
  for run in runs:
    values = _values(run, keys)
    label = ", ".join(
      f"{names[key]}={format_value(value)}" for key, value in values.items()
    )
    label = label or "all runs"
    groups.setdefault(label, Group(label, values, [])).runs.append(run)
  return list(groups.values())


def figures(result: Mapping[str, Any]) -> dict[str, float]:
  """Returns every figure of a result.json by a flat name."""
  evaluation, routing = result["eval"], result["routing"]
  flat = {
    "step": result["step"],
    "tokens_per_second": result["tokens_per_second"],
    "parameters/total": result["parameters"]["total"],
    "parameters/active": result["parameters"]["active"],
    "lm_loss": evaluation["lm_loss"],
    "bits_per_byte": evaluation["bits_per_byte"],
  }
  for key in ("lm_loss", "bits_per_byte"):
    for domain, values in evaluation["domains"].items():
      flat[f"{key}/{domain}"] = values[key]
  names = [name for name in routing if name != "layers"]
  flat |= {name: routing[name] for name in names}
  for layer, values in comparison.layers(result):
    flat |= {f"{name}/layer_{layer}": values[name] for name in names}
  return flat


@report.drawing()
def write_report(workdir: str, more: Sequence[str] = ()) -> str:
  """Writes report.md, report.csv and plots of the finished runs.

  Args:
    workdir: folder of the sweep.
    more: further sections of report.md.

  Returns:
    The text of report.md.

  Raises:
    UserError: no run is finished, or a file of a run is damaged.
  """
  runs = read_runs(workdir)
  groups = group_runs(runs)
  text = "\n\n".join(
    [_tables(runs, groups), *task_sections(workdir, groups), *more]
  )
  storage.write_bytes(os.path.join(workdir, "report.md"), f"{text}\n".encode())
  _write_csv(workdir, runs)
  names = short_names(swept_keys(runs))
  for key, name in names.items():
    values = [group.values.get(key) for group in groups if key != "seed"]
    if not all(isinstance(value, (int, float)) for value in values):
      continue
    if len(set(values)) < 2:
      continue
    for figure, title, label in (
      ("lm_loss", "loss", "held-out LM loss (nats per token)"),
      ("diversity", "diversity", "routing diversity (0 to 1)"),
    ):
      path = os.path.join(workdir, f"{title}_by_{name}.png")
      report.save_figure(_draw_by(key, names, groups, figure, label), path)
  report.save_figure(
    _draw_over_steps(workdir, groups),
    os.path.join(workdir, "loss_by_step.png"),
  )
  return text


def task_sections(workdir: str, groups: Sequence[Group]) -> list[str]:
  """Returns the report's sections on tasks, of runs that have a tasks.json.

  Raises:
    UserError: a tasks.json is damaged.
  """
  return task_comparison.sections(
    [
      task_comparison.RunsOfGroup(
        group.label,
        {
          run.result["experiment"]["seed"]: found
          for run in group.runs
          if (found := _tasks(workdir, run))
        },
      )
      for group in groups
    ]
  )


def _tasks(workdir: str, run: Run) -> Mapping[str, Any] | None:
  """Returns the tasks.json of a run's last step, if there is one."""
  folder = os.path.join(workdir, run.name)
  return task_comparison.read_tasks(folder, run.result["step"])


def _write_csv(workdir: str, runs: Sequence[Run]) -> None:
  """Writes a row for each run: its folder, its swept keys, all its figures."""
  keys = swept_keys(runs)
  path = os.path.join(workdir, "report.csv")
  rows = [
    {
      "run": run.name,
      **{k: format_value(v) for k, v in _values(run, keys).items()},
      **figures(run.result),
      **task_comparison.flat_figures(
        _tasks(workdir, run) or {"tasks": {}, "groups": {}}
      ),
    }
    for run in runs
  ]
  columns = list(dict.fromkeys(name for row in rows for name in row))
  file = io.StringIO(newline="")
  writer = csv.DictWriter(file, columns)
  writer.writeheader()
  writer.writerows(rows)
  storage.write_bytes(path, file.getvalue().encode())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
  """Returns the mean and the sample standard deviation (None for one value)."""
  spread = statistics.stdev(values) if len(values) > 1 else None
  return statistics.fmean(values), spread


def paired_differences(base: Group, other: Group, figure: str) -> list[float]:
  """Returns `other` minus `base` for every seed that both have, by seed."""

  def by_seed(group: Group) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for run in group.runs:
      seed = run.result["experiment"]["seed"]
      values.setdefault(seed, []).append(figures(run.result)[figure])
    return {seed: statistics.fmean(each) for seed, each in values.items()}

  first, second = by_seed(base), by_seed(other)
  return [second[seed] - first[seed] for seed in sorted(first.keys() & second)]


def _tables(runs: Sequence[Run], groups: Sequence[Group]) -> str:
  """Returns report.md: figures by group, loss by domain, paired differences."""
  seeds = sorted({run.result["experiment"]["seed"] for run in runs})
  known = [figures(run.result).keys() for run in runs]
  columns = [c for c in _COLUMNS if all(c[1] in keys for keys in known)]
  headings = [heading for heading, _, _ in columns]
  rows = [
    [group.label, str(len(group.runs))]
    + [_summary(_collect(group, key), number) for _, key, number in columns]
    for group in groups
  ]
  parts = [
    f"# Sweep: {len(runs)} runs, seeds {', '.join(map(str, seeds))}",
    "Mean ± sample standard deviation over the n runs of a group; held-out"
    " text at the end of training.",
    tables.markdown(["group", "n", *headings], rows),
  ]
  domains = list(
    dict.fromkeys(d for run in runs for d in run.result["eval"]["domains"])
  )
  table = [["group", *domains]] + [
    [group.label]
    + [_summary(_collect(group, f"lm_loss/{d}"), ".4f") for d in domains]
    for group in groups
  ]
  if len(domains) > len(groups):
    # More domains than groups: domains become the rows.
    table = [list(column) for column in zip(*table)]
  parts += [
    "Held-out LM loss by domain (nats per token)",
    tables.markdown(table[0], table[1:]),
  ]
  base, *others = groups
  rows = []
  for group in others:
    count = len(paired_differences(base, group, "lm_loss"))
    if count:
      rows.append(
        [group.label, str(count)]
        + [
          _summary(paired_differences(base, group, key), f"+{number}")
          for _, key, number in columns
        ]
      )
  if rows:
    parts += [
      f"Difference from {base.label}, paired by seed",
      tables.markdown(["group", "pairs", *headings], rows),
    ]
  return "\n\n".join(parts)


def _collect(group: Group, figure: str) -> list[float]:
  every = [figures(run.result) for run in group.runs]
  return [values[figure] for values in every if figure in values]


def _summary(values: Sequence[float], number: str) -> str:
  if not values:
    return "-"
  mean, spread = mean_and_spread(values)
  text = format(mean, number)
  return (
    text
    if spread is None
    else (f"{text} ± {format(spread, number.lstrip('+'))}")
  )


def _draw_by(
  key: str,
  names: Mapping[str, str],
  groups: Sequence[Group],
  figure_name: str,
  label: str,
) -> Figure:
  """Plots a figure against a swept key, a line for each value of the others."""
  lines: dict[str, list[Group]] = {}
  for group in groups:
    others = ", ".join(
      f"{names[other]}={format_value(value)}"
      for other, value in group.values.items()
      if other != key
    )
    lines.setdefault(others, []).append(group)
  figure = Figure(figsize=(7, 4.6), layout="constrained")
  axes = figure.subplots()
  for index, (line, members) in enumerate(lines.items()):
    members = sorted(members, key=lambda group: group.values[key])
    summaries = [mean_and_spread(_collect(g, figure_name)) for g in members]
    axes.errorbar(
      [group.values[key] for group in members],
      [mean for mean, _ in summaries],
      yerr=[spread or 0.0 for _, spread in summaries],
      marker="o",
      markersize=5,
      capsize=3,
      label=line,
      **report.line_style(index),
    )
  points = sorted({group.values[key] for group in groups})
  _scale_like(axes.set_xscale, points)
  axes.set_xticks(points, [format_value(point) for point in points])
  axes.set_xticks([], minor=True)
  most = max(len(group.runs) for group in groups)
  title = f"{label} by {key}"
  if most > 1:
    title += "\nmean and sample standard deviation over seeds"
  report.style_axes(axes, title, key, label)
  if len(lines) > 1:
    axes.legend(fontsize=8, frameon=False)
  return figure


def _scale_like(
  set_scale: Callable[..., None], points: Sequence[float]
) -> None:
  """Makes an axis logarithmic if positive `points` span a factor above 20.

  Zero, the usual control, stays on the axis, one step below the others.
  """
  positive = [point for point in points if point > 0]
  if points[0] < 0 or not positive or positive[-1] / positive[0] <= 20:
    return
  if points[0] > 0:
    set_scale("log")
  else:
    set_scale("symlog", linthresh=positive[0], linscale=0.6)


def _draw_over_steps(workdir: str, groups: Sequence[Group]) -> Figure:
  """Plots training and held-out loss by step, in a colour for each group."""
  figure = Figure(figsize=(12, 5), layout="constrained")
  train, held_out = figure.subplots(1, 2)
  for index, group in enumerate(groups):
    for number, run in enumerate(group.runs):
      lines = metrics.read_metrics(os.path.join(workdir, run.name))
      style = report.line_style(index) | {"linewidth": 1.1}
      style |= {"label": group.label} if number == 0 else {}
      steps_I, loss_I = report.series(lines, "train/lm_loss")
      train.plot(steps_I, report.smooth(loss_I), **style)
      steps_I, loss_I = report.series(lines, "eval/lm_loss")
      held_out.plot(steps_I, loss_I, marker="o", markersize=3, **style)
  label = "LM loss (nats per token)"
  report.style_axes(train, "Training, smoothed", "step", label)
  report.style_axes(held_out, "Held-out", "step", label)
  held_out.legend(fontsize=8, frameon=False)
  return figure
