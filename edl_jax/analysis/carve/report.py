"""Tables and a plot of carve curves.

This module reads what `curve.carve_run` returns and uses no device.
"""

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edl_jax import storage, tables
from edl_jax.analysis import report, sweep_report

Result = Mapping[str, Any]
Point = Mapping[str, Any]

# With more domains than this, the plot has the mean over domains alone.
_MAX_PANELS = 15


class Group(NamedTuple):
  """Runs that differ in the seed alone."""

  label: str
  results: list[Result]


class Curve(NamedTuple):
  """A line of the plot and a row of the main table."""

  name: str
  # The loss minus that of the whole model, from both records of a domain.
  rise: Callable[[Point, Mapping[str, Any]], float | None]


def _random_rise(point: Point, whole: Mapping[str, Any]) -> float | None:
  if not point["random_losses"]:
    return None
  return statistics.fmean(point["random_losses"]) - whole["loss"]


def _others_rise(point: Point, whole: Mapping[str, Any]) -> float | None:
  if point["others_loss"] is None:
    return None
  return point["others_loss"] - whole["others_loss"]


OWN = Curve(
  "its own experts", lambda point, whole: point["loss"] - whole["loss"]
)
CURVES = (
  OWN,
  Curve(
    "most used over all domains",
    lambda point, whole: point["most_used_loss"] - whole["loss"],
  ),
  Curve("random experts", _random_rise),
  Curve("its own experts, other domains' text", _others_rise),
)


def write(results: Sequence[Result], folder: str) -> str:
  """Writes carve.json, carve.md and carve.png; returns the text of carve.md."""
  storage.make_folder(folder)
  text = tables_of(results)
  path = os.path.join(folder, "carve")
  storage.write_json(f"{path}.json", results)
  storage.write_bytes(f"{path}.md", f"{text}\n".encode())
  report.save_figure(draw(results), f"{path}.png")
  return text


def group(results: Sequence[Result]) -> list[Group]:
  """Groups runs that differ in the seed alone; keeps their order."""
  runs = [
    sweep_report.Run(str(index), {"experiment": result["experiment"]})
    for index, result in enumerate(results)
  ]
  groups = sweep_report.group_runs(runs)
  if len(groups) == 1:
    name = os.path.basename(storage.absolute(results[0]["workdir"]))
    return [Group(name if len(results) == 1 else "all runs", list(results))]
  return [
    Group(each.label, [results[int(run.name)] for run in each.runs])
    for each in groups
  ]


def mean_rises(result: Result, curve: Curve) -> dict[int, float]:
  """Returns the rise in loss by experts kept, the mean over domains."""
  rises: dict[int, list[float]] = {}
  for point in result["points"]:
    rise = curve.rise(point, result["whole"][point["domain"]])
    if rise is not None:
      rises.setdefault(point["keep"], []).append(rise)
  return {keep: statistics.fmean(each) for keep, each in rises.items()}


def area(rises: Mapping[int, float], num_experts: int) -> float:
  """Returns the mean rise over the share of experts kept.

  It is the area under the curve of straight lines from the fewest experts to
  all, where the rise is 0, over the length of that interval. If the curve has
  no length, it is 0.
  """
  curve = sorted({**rises, num_experts: 0.0}.items())
  keep_I, rise_I = np.array(curve, np.float64).T
  length = keep_I[-1] - keep_I[0]
  return float(np.trapezoid(rise_I, keep_I) / length) if length else 0.0


def _summary(values: Iterable[float], number: str = "+.3f") -> str:
  """Formats the mean, with the sample standard deviation of several values."""
  values = list(values)
  if not values:
    return "-"
  mean, spread = sweep_report.mean_and_spread(values)
  text = format(mean, number)
  return text if spread is None else f"{text} ± {spread:.3f}"


def _keeps(results: Sequence[Result]) -> list[int]:
  """Returns the numbers of experts kept, falling."""
  keeps = {point["keep"] for result in results for point in result["points"]}
  return sorted(keeps, reverse=True)


def _whole(result: Result) -> float:
  """Returns the loss with all experts, the mean over domains."""
  return statistics.fmean(each["loss"] for each in result["whole"].values())


def tables_of(results: Sequence[Result], heading: str = "#") -> str:
  """Returns every table as Markdown, under a heading of that level."""
  groups = group(results)
  first = results[0]
  how = ", layer by layer" if first["greedy"] else ""
  used = sorted({e["calibration_tokens"] for e in first["whole"].values()})
  tokens = " to ".join(f"{n:,}" for n in dict.fromkeys([used[0], used[-1]]))
  parts = [
    f"{heading} Carved: {len(results)} run(s), {len(first['whole'])} domain(s)",
    f"Experts are chosen by {first['score']}{how} on {tokens} tokens of each"
    " domain's training text. Losses are of held-out text, in nats per token."
    " Columns are the experts kept in each layer.",
    "Loss with all experts, and its rise with fewer: mean over domains",
    _main_table(results, groups),
  ]
  if len(groups) > 1:
    parts += [
      f"Loss with its own experts minus that of {groups[0].label}, paired by"
      " domain and seed: mean ± sample standard deviation over pairs",
      _paired_table(results, groups),
    ]
  parts += [
    "Loss with all experts, and its rise with its own experts, by domain",
    _domain_table(results, groups),
  ]
  if first["calibration"]:
    parts += [
      f"Rise with {first['calibration'][0]['keep']} experts by calibration"
      " tokens: mean over domains",
      _calibration_table(groups),
    ]
  parts += ["The cut model", _cost_table(groups)]
  return "\n\n".join(parts)


def _main_table(results: Sequence[Result], groups: Sequence[Group]) -> str:
  keeps, rows = _keeps(results), []
  for label, members in groups:
    for curve in CURVES:
      rises = [mean_rises(result, curve) for result in members]
      if not any(rises):
        continue
      areas = [
        area(each, result["experiment"]["model.num_experts"])
        for each, result in zip(rises, members)
      ]
      whole = map(_whole, members) if curve is OWN else []
      cells = [_summary(r[k] for r in rises if k in r) for k in keeps]
      if curve.name.startswith("random") and len(members) == 1:
        cells = [
          f"{cell} ± {_spread_of_draws(members[0], keep):.3f}"
          for cell, keep in zip(cells, keeps)
        ]
      rows.append(
        [
          label if curve is OWN else "",
          curve.name,
          _summary(whole, ".3f") if curve is OWN else "",
          *cells,
          _summary(areas),
        ]
      )
  headings = ["run", "experts", "all", *map(str, keeps), "mean rise"]
  return tables.markdown(headings, rows, left=(0, 1))


def _spread_of_draws(result: Result, keep: int) -> float:
  """Returns the sample standard deviation over draws of the mean over domains.

  It is 0 for a single draw.
  """
  losses = [p["random_losses"] for p in result["points"] if p["keep"] == keep]
  means = [statistics.fmean(draw) for draw in zip(*losses)]
  return statistics.stdev(means) if len(means) > 1 else 0.0


def _losses(group: Group) -> dict[tuple[str, int, int | None], float]:
  """Returns losses by domain, seed and experts kept; None for all experts."""
  losses: dict[tuple[str, int, int | None], float] = {}
  for result in group.results:
    seed = result["experiment"]["seed"]
    for point in result["points"]:
      losses[point["domain"], seed, point["keep"]] = point["loss"]
    for domain, whole in result["whole"].items():
      losses[domain, seed, None] = whole["loss"]
  return losses


def _paired_table(results: Sequence[Result], groups: Sequence[Group]) -> str:
  base, *others = groups
  before, keeps, rows = _losses(base), [None, *_keeps(results)], []
  for other in others:
    after = _losses(other)
    pairs = [key for key in after if key in before]
    count = sum(keep is None for _, _, keep in pairs)
    rows.append(
      [other.label, str(count)]
      + [
        _summary(after[k] - before[k] for k in pairs if k[2] == keep)
        for keep in keeps
      ]
    )
  headings = ["run", "pairs", "all", *map(str, keeps[1:])]
  return tables.markdown(headings, rows)


def _domain_table(results: Sequence[Result], groups: Sequence[Group]) -> str:
  keeps, rows = _keeps(results), []
  for domain in results[0]["whole"]:
    for index, (label, members) in enumerate(groups):
      wholes = [result["whole"][domain] for result in members]
      cells = [_summary((each["loss"] for each in wholes), ".3f")]
      for keep in keeps:
        cells.append(
          _summary(
            OWN.rise(point, whole) or 0.0
            for result, whole in zip(members, wholes)
            for point in result["points"]
            if (point["domain"], point["keep"]) == (domain, keep)
          )
        )
      rows.append(["" if index else domain, label, *cells])
  headings = ["domain", "run", "all", *map(str, keeps)]
  return tables.markdown(headings, rows, left=(0, 1))


def _calibration_table(groups: Sequence[Group]) -> str:
  sizes = dict.fromkeys(
    each["tokens"]
    for _, members in groups
    for result in members
    for each in result["calibration"]
  )
  rows = [
    [label]
    + [
      _summary(
        statistics.fmean(
          each["loss"] - result["whole"][each["domain"]]["loss"]
          for each in result["calibration"]
          if each["tokens"] == size
        )
        for result in members
        if any(each["tokens"] == size for each in result["calibration"])
      )
      for size in sizes
    ]
    for label, members in groups
  ]
  return tables.markdown(["run", *(f"{n:,}" for n in sizes)], rows)


def _cost_table(groups: Sequence[Group]) -> str:
  rows = []
  for label, members in groups:
    rows += [
      [
        label,
        str(cost["keep"]),
        f"{cost['parameters']:,}",
        f"{cost['share']:.0%}",
        f"{cost['bytes'] / 2**20:,.1f}",
        f"{cost['active_parameters']:,}",
      ]
      for cost in reversed(members[0]["costs"])
    ]
    if all(m[0]["costs"] == members[0]["costs"] for _, m in groups):
      # One model size: name no run.
      headings = ["experts", "parameters", "share", "MiB", "active parameters"]
      return tables.markdown(headings, [row[1:] for row in rows], left=())
  headings = ["run", "experts", "parameters", "share", "MiB", "active"]
  return tables.markdown(headings, rows)


def draw(results: Sequence[Result]) -> Figure:
  """Plots loss against experts kept: the mean over domains, then each domain.

  A group of runs has a colour. Solid lines are a domain's own experts, dashed
  ones those most used over all domains, dotted ones random experts, with a band
  of one sample standard deviation over draws.
  """
  groups, domains = group(results), list(results[0]["whole"])
  panels: list[tuple[str, list[str]]] = [("mean over domains", domains)]
  if 1 < len(domains) <= _MAX_PANELS:
    panels += [(domain, [domain]) for domain in domains]
  columns = min(4, len(panels))
  lines = -(-len(panels) // columns)
  figure = Figure(
    figsize=(3.6 * columns + 1, 3.1 * lines), layout="constrained"
  )
  grid = figure.subplots(lines, columns, squeeze=False).ravel()
  for axes, (title, members) in zip(grid, panels):
    for index, (label, runs) in enumerate(groups):
      _draw_group(axes, label, runs, members, index)
    report.style_axes(axes, title, "experts kept", "loss (nats per token)")
  for axes in grid[len(panels) :]:
    axes.remove()
  handles, names = grid[0].get_legend_handles_labels()
  figure.legend(
    handles,
    names,
    loc="outside lower center",
    ncols=2,
    fontsize=8,
    frameon=False,
  )
  return figure


def _draw_group(
  axes: Axes,
  label: str,
  runs: Sequence[Result],
  domains: Sequence[str],
  index: int,
) -> None:
  """Draws the curves of one group: means over its runs and `domains`."""
  color = report.line_style(index)["color"]
  points = [p for run in runs for p in run["points"] if p["domain"] in domains]
  whole = statistics.fmean(
    run["whole"][domain]["loss"] for run in runs for domain in domains
  )
  experts = runs[0]["experiment"]["model.num_experts"]
  keeps = sorted({point["keep"] for point in points} - {experts})

  def line(values: Callable[[Point], float], **style: Any) -> None:
    means = [
      statistics.fmean(values(p) for p in points if p["keep"] == keep)
      for keep in keeps
    ]
    axes.plot([*keeps, experts], [*means, whole], color=color, **style)

  line(lambda p: p["loss"], marker="o", markersize=4, label=label)
  line(
    lambda p: p["most_used_loss"],
    linestyle="--",
    linewidth=1,
    label=f"{label}, most used over all",
  )
  if not all(point["random_losses"] for point in points):
    return
  draws = np.array(
    [
      np.mean([p["random_losses"] for p in points if p["keep"] == keep], axis=0)
      for keep in keeps
    ]
  )
  style = {"color": color, "linestyle": ":", "linewidth": 1}
  mean_I = draws.mean(1)
  axes.plot(keeps, mean_I, label=f"{label}, random", **style)
  if draws.shape[1] > 1:
    spread_I = draws.std(1, ddof=1)
    axes.fill_between(
      keeps, mean_I - spread_I, mean_I + spread_I, color=color, alpha=0.12
    )
