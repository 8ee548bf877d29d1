"""Reports on one run: plots of its losses and of its routing.

It reads metrics.jsonl and routing.json of the run's folder alone. This module
imports no JAX. `edl_jax.losses.routing_metrics` defines the routing metrics.
"""

import contextlib
import json
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from edl_jax import metrics, storage

# Okabe and Ito's palette for colour-blind readers, without black. Light and
# dark colours alternate, so that neighbours differ in grey too.
COLORS = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#CC79A7",
  "#D55E00",
  "#56B4E9",
  "#8A8A00",
)
DPI = 110
LINE_STYLES = ("-", "--", ":", "-.")
# With more domains than this, the lines have no names.
_MAX_NAMED_DOMAINS = 2 * len(COLORS)

_LOSS = "LM loss (nats per token)"


# Fonts with characters that Matplotlib's own lacks, where they are installed.
_FONTS = (
  *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP"),
  *("Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
  *("Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC"),
  *("Hiragino Sans", "Arial Unicode MS", "Unifont"),
)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
  """Draws names as they are: no mathematics between "$", quiet about glyphs."""
  known = set(font_manager.get_font_names())
  family = [*matplotlib.rcParams["font.family"], *known.intersection(_FONTS)]
  # Any: the stubs list the keys of Matplotlib's settings.
  style: Any = {"text.parse_math": False, "font.family": family}
  with matplotlib.rc_context(style), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    yield


@drawing()
def write_run_report(workdir: str) -> list[str]:
  """Draws the pictures of a run into `workdir`/report.

  loss.png needs metrics.jsonl; experts_by_domain.png and domain_divergence.png
  need routing.json. A picture without its file is left out.

  Returns:
    The paths of the pictures drawn.

  Raises:
    UserError: metrics.jsonl is damaged.
  """
  folder = os.path.join(workdir, "report")
  storage.make_folder(folder)
  name = os.path.basename(os.path.abspath(workdir))
  figures = {}
  lines = metrics.read_metrics(workdir)
  if lines:
    figures["loss.png"] = _draw_loss(lines, name)
  routing_file = epath.Path(workdir, "routing.json")
  if routing_file.exists():
    routing = json.loads(routing_file.read_text())
    figures["experts_by_domain.png"] = _draw_experts(routing, name)
    figures["domain_divergence.png"] = _draw_divergence(routing, name)
  paths = []
  for file_name, figure in figures.items():
    paths.append(os.path.join(folder, file_name))
    save_figure(figure, paths[-1])
  return paths


def save_figure(figure: Figure, path: str) -> None:
  """Writes a figure as a PNG file."""
  with storage.whole_file(path) as file:
    figure.savefig(file, dpi=DPI)


def line_style(index: int) -> dict[str, Any]:
  """Returns the colour and dashes of the index-th line of a plot."""
  style = LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]
  return {"color": COLORS[index % len(COLORS)], "linestyle": style}


def style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
  """Gives a line plot its title and labels, a light grid and an open frame."""
  axes.set_title(title, fontsize=10, loc="left")
  axes.set_xlabel(x_label, fontsize=9)
  axes.set_ylabel(y_label, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.grid(color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  if x_label == "step":
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def series(
  lines: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and the values of one metric, float64 (I,) each."""
  pairs = [(line["step"], line[key]) for line in lines if key in line]
  steps_I, values_I = np.array(pairs, np.float64).reshape(-1, 2).T
  return steps_I, values_I


def smooth(values_I: np.ndarray) -> np.ndarray:
  """Averages over a centred window of about a twentieth of the points, (I,).

  The window narrows symmetrically towards both ends, so that the curve does not
  lag behind the values.
  """
  count = len(values_I)
  total_I1 = np.concatenate([[0.0], np.cumsum(values_I)])
  index_I = np.arange(count)
  half_I = np.minimum(index_I, index_I[::-1]).clip(max=max(count // 40, 1))
  low_I, high_I = index_I - half_I, index_I + half_I + 1
  return (total_I1[high_I] - total_I1[low_I]) / (high_I - low_I)


def _draw_loss(lines: Sequence[Mapping[str, Any]], name: str) -> Figure:
  """Draws loss by step beside routing diversity and the auxiliary losses."""
  figure = Figure(figsize=(12, 6.2), layout="constrained")
  figure.suptitle(f"{name}: training", fontsize=12)
  panels = figure.subplot_mosaic(
    [["loss", "routing"], ["loss", "auxiliary"]], width_ratios=[1.35, 1]
  )
  _draw_lm_loss(panels["loss"], lines)
  routing = panels["routing"]
  for index, (key, label) in enumerate(
    {
      "routing/diversity": "diversity: mean JSD of domain pairs / ln 2",
      "routing/inter_fraction": "share between domains: D_inter / D_total",
    }.items()
  ):
    steps_I, values_I = series(lines, key)
    color = COLORS[index]
    routing.plot(steps_I, values_I, color=color, alpha=0.25, linewidth=0.8)
    routing.plot(steps_I, smooth(values_I), color=color, label=label)
    routing.plot(*series(lines, f"eval/{key}"), "o", color=color, markersize=4)
  routing.plot([], [], "o", color="#555555", markersize=4, label="held-out")
  routing.set_ylim(bottom=0)
  style_axes(routing, "Routing, mean over layers", "step", "ratio, 0 to 1")
  routing.legend(fontsize=8, frameon=False)
  auxiliary = panels["auxiliary"]
  for index, key in enumerate(_auxiliary_losses(lines)):
    steps_I, values_I = series(lines, key)
    label = key.removeprefix("train/").removesuffix("_loss")
    auxiliary.plot(
      steps_I, smooth(values_I), label=label, **line_style(index + 2)
    )
  # The terms differ by orders of magnitude. A logarithmic axis has no zeros,
  # such as the divergence of a batch with one domain.
  auxiliary.set_yscale("log", nonpositive="mask")
  for axis_formatter in (
    auxiliary.yaxis.set_major_formatter,
    auxiliary.yaxis.set_minor_formatter,
  ):
    axis_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
  style_axes(
    auxiliary, "Auxiliary losses, unweighted, smoothed", "step", "value (log)"
  )
  auxiliary.tick_params(which="minor", labelsize=8)
  if auxiliary.lines:
    auxiliary.legend(fontsize=8, frameon=False)
  return figure


def _auxiliary_losses(lines: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the keys of the auxiliary losses that a logarithmic axis shows."""
  keys = sorted({key for line in lines for key in line})
  return [
    key
    for key in keys
    if key.startswith("train/")
    and key.endswith("_loss")
    and key != "train/lm_loss"
    and np.any(series(lines, key)[1] > 0)
  ]


def _draw_lm_loss(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
  steps_I, values_I = series(lines, "train/lm_loss")
  axes.plot(steps_I, values_I, color="#999999", alpha=0.35, linewidth=0.8)
  axes.plot(
    steps_I, smooth(values_I), color="#777777", label="training, smoothed"
  )
  prefix = "eval/lm_loss/"
  found = dict.fromkeys(key for line in lines for key in line)
  domains = [
    key.removeprefix(prefix) for key in found if key.startswith(prefix)
  ]
  named = len(domains) <= _MAX_NAMED_DOMAINS
  for index, domain in enumerate(domains):
    style = line_style(index if named else 5)
    label = domain if named else f"each of {len(domains)} held-out domains"
    axes.plot(
      *series(lines, prefix + domain),
      linewidth=1.2 if named else 0.5,
      marker="o" if named else None,
      markersize=3,
      label=label if named or index == 0 else None,
      **style,
    )
  axes.plot(
    *series(lines, "eval/lm_loss"),
    color="black",
    linewidth=2,
    marker="o",
    markersize=4,
    label="held-out, overall",
  )
  style_axes(axes, "Language model loss", "step", _LOSS)
  axes.legend(fontsize=8, frameon=False, ncols=2 if len(domains) > 7 else 1)


def _heat_map_axes(
  count: int, width: float, height: float, margins: tuple[float, float]
) -> tuple[Figure, list[Axes], int]:
  """Lays out `count` panels of width x height inches.

  `margins` are the inches taken by labels on the left and below. The number
  of columns, returned last, brings the figure near 4 to 3 with few empty
  places.
  """
  left, below = margins

  def cost(columns: int) -> float:
    rows = -(-count // columns)
    ratio = (columns * width + left) / (rows * height + below)
    return abs(math.log(ratio * 3 / 4)) + (rows * columns - count) / count

  columns = min(range(1, count + 1), key=cost)
  rows = -(-count // columns)
  figure = Figure(
    figsize=(columns * width + left + 0.9, rows * height + below + 0.5),
    layout="constrained",
  )
  panels = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in panels[count:]:
    axes.remove()
  return figure, panels[:count], columns


def _finish_heat_maps(
  figure: Figure, panels: Sequence[Axes], title: str, bar_label: str
) -> None:
  """Adds a title and a colour bar, in proportion to the figure's size."""
  width, height = figure.get_size_inches()
  scale = max(width / 11, 1.0)
  figure.suptitle(
    textwrap.fill(title, round(12 * width / scale)), fontsize=11 * scale
  )
  for axes in panels:
    axes.title.set_fontsize(9 * math.sqrt(scale))
  bar_width = 0.2 * scale
  image = panels[0].images[0]
  clipped = any(
    np.max(np.ma.asarray(a.images[0].get_array())) > image.norm.vmax
    for a in panels
  )
  bar = figure.colorbar(
    image,
    ax=panels,
    extend="max" if clipped else "neither",
    extendfrac=0.03,
    fraction=bar_width / width,
    aspect=0.85 * height / bar_width,
  )
  bar.set_label(bar_label, fontsize=9 * scale)
  bar.ax.tick_params(labelsize=8 * scale)


def _label_domains(axes: Axes, names: Sequence[str], visible: bool) -> None:
  axes.set_yticks(range(len(names)), names if visible else [], fontsize=7)
  axes.tick_params(length=2, width=0.5)


def _draw_experts(routing: Mapping[str, Any], name: str) -> Figure:
  """Draws, per layer, the share of a domain's assignments of each expert.

  Experts are sorted by the domain that uses them most, so that specialisation
  appears as a diagonal. The numbers of experts carry no meaning.
  """
  domains = routing["domains"]
  percent_LDE = 100 * np.asarray(routing["assignments"], np.float64)
  num_domains, num_experts = percent_LDE.shape[1:]
  figure, panels, columns = _heat_map_axes(
    len(percent_LDE),
    width=min(max(0.15 * num_experts, 2.4), 4.0),
    height=max(0.125 * num_domains, 0.9) + 0.5,
    margins=(_label_inches(domains), 0.3),
  )
  # A few experts may take much more than all others: their colour saturates.
  top = float(np.quantile(percent_LDE, 0.995))
  for index, axes in enumerate(panels):
    percent_DE = percent_LDE[index]
    favourite_E = percent_DE.argmax(axis=0)
    order_E = np.lexsort((-percent_DE.max(axis=0), favourite_E))
    axes.imshow(
      percent_DE[:, order_E],
      cmap="magma_r",
      vmin=0,
      vmax=top,
      aspect="auto",
      interpolation="nearest",
    )
    axes.set_title(f"layer {routing['layers'][index]}", fontsize=9)
    _label_domains(axes, domains, index % columns == 0)
    if num_experts <= 32:
      size = 6 if num_experts <= 16 else 5
      axes.set_xticks(range(num_experts), order_E, fontsize=size)
    else:
      axes.set_xticks([])
  figure.supxlabel("expert, sorted by the domain that uses it most", fontsize=9)
  _finish_heat_maps(
    figure,
    panels,
    f"{name}: share of each domain's assignments that an expert takes"
    f" (uniform:\u00a0{100 / num_experts:.3g}%)",
    "% of the domain's assignments",
  )
  return figure


def _label_inches(names: Sequence[str]) -> float:
  return 0.058 * max(map(len, names)) + 0.15


def _draw_divergence(routing: Mapping[str, Any], name: str) -> Figure:
  """Draws, per layer, the matrix of the domains' pairwise JSD in nats."""
  domains = routing["domains"]
  divergence_LDD = np.asarray(routing["pairwise_divergence"], np.float64)
  num_domains = len(domains)
  annotated = num_domains <= 10
  label_inches = _label_inches(domains)
  side = max((0.36 if annotated else 0.13) * num_domains, 1.5)
  figure, panels, columns = _heat_map_axes(
    len(divergence_LDD),
    width=side + 0.25,
    height=side + 0.4,
    margins=(label_inches, label_inches),
  )
  top = max(float(divergence_LDD.max()), 1e-9)
  for index, axes in enumerate(panels):
    axes.imshow(divergence_LDD[index], cmap="cividis", vmin=0, vmax=top)
    axes.set_title(f"layer {routing['layers'][index]}", fontsize=9)
    _label_domains(axes, domains, index % columns == 0)
    lowest = index + columns >= len(panels)
    axes.set_xticks(
      range(num_domains), domains if lowest else [], rotation=90, fontsize=7
    )
    if annotated:
      for row, column in np.argwhere(~np.eye(num_domains, dtype=bool)):
        value = divergence_LDD[index, row, column]
        axes.text(
          column,
          row,
          f"{value:.3f}".removeprefix("0"),
          ha="center",
          va="center",
          fontsize=6,
          color="black" if value > 0.55 * top else "white",
        )
  _finish_heat_maps(
    figure,
    panels,
    f"{name}: Jensen-Shannon divergence of the domains' mean routing"
    f" (at most {math.log(2):.3f} nats)",
    "JSD (nats)",
  )
  return figure
