"""A table that compares the results of runs.

This module imports no JAX. `edl_jax.losses.routing_metrics` defines the routing
metrics.
"""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edl_jax import tables

# Characters of the columns.
_NAMES_WIDTH = 30
_CELL_WIDTH = 20


class Figures(NamedTuple):
  """A section of the table: its heading, its format, and its rows."""

  heading: str
  format: str
  # The value of each row by name, for each of the runs.
  runs: list[dict[str, float]]


def comparison_table(
  results: Sequence[tuple[str, Mapping[str, Any]]],
  carved: Sequence[Mapping[str, Any] | None] = (),
) -> str:
  """Returns a table with a column for each run.

  Two runs get a third column, the second minus the first. That table has at
  most 100 characters per line.

  Args:
    results: the label and the content of result.json of every run.
    carved: what `carve.curve.carve_run` measured of every run, None where it
      measured nothing. With these the table has the loss, the diversity, and
      each domain's loss with some of the experts; without, every figure.

  Returns:
    Aligned lines, without a newline at the end.
  """
  labels = [label for label, _ in results]
  if len(results) == 2:
    labels.append("difference")
  rows = _table_header(labels)
  # Section headings by the number of rows above them.
  headings = {}
  num_header_rows = len(rows)
  contents = [run for _, run in results]
  sections = (
    _carved_sections(contents, carved) if carved else _table_sections(contents)
  )
  for heading, number, runs in sections:
    headings[len(rows)] = heading
    for name in dict.fromkeys(name for run in runs for name in run):
      values = [run.get(name) for run in runs]
      cells = [_cell(value, number) for value in values]
      if len(values) == 2:
        old, new = values
        change = None if old is None or new is None else new - old
        cells.append(_cell(change, f"+{number}"))
      text = f"  {name}"
      if len(text) > _NAMES_WIDTH:
        text = text[: _NAMES_WIDTH - 1] + "…"
      rows.append([text, *cells])
  widths = [_NAMES_WIDTH, *(_CELL_WIDTH for _ in labels)]
  lines = []
  for index, line in enumerate(tables.aligned(rows, min_widths=widths)):
    if index == num_header_rows:
      lines.append("-" * (sum(widths) + 2 * len(labels)))
    if index in headings:
      lines += ["", headings[index]]
    lines.append(line)
  return "\n".join(lines)


def _cell(value: float | None, number: str) -> str:
  return "-" if value is None else format(value, number)


def _table_header(labels: Sequence[str]) -> list[list[str]]:
  """Returns the labels as rows; long ones take several, the last one always."""
  # Spaces let the name of a point, "key=1,other=2", be wrapped.
  spaced = [label.replace(",", ", ").replace("=", " = ") for label in labels]
  wrapped = [textwrap.wrap(label, _CELL_WIDTH) or [""] for label in spaced]
  height = max(map(len, wrapped))
  padded = [[""] * (height - len(cell)) + cell for cell in wrapped]
  return [["", *row] for row in zip(*padded)]


# Shown if a run trains on the orthogonality or the variance loss.
_SPECIALIZATION = (
  ("routing variance", "routing_variance"),
  ("expert overlap (0 to 1)", "expert_overlap"),
  ("output similarity (0 to 1)", "output_similarity"),
  ("silhouette (0 to 1)", "silhouette"),
)


def _specializes(result: Mapping[str, Any]) -> bool:
  keys = ("losses.orthogonality_weight", "losses.variance_weight")
  return any(result["experiment"].get(key) for key in keys)


def _table_sections(results: Sequence[Mapping[str, Any]]) -> list[Figures]:
  def held_out(key: str) -> list[dict[str, float]]:
    return [
      {"overall": run["eval"][key]}
      | {
        _domain(name): run["eval"]["domains"][name][key]
        for name in run["eval"]["domains"]
      }
      for run in results
    ]

  def routing(key: str) -> list[dict[str, float]]:
    return [
      {"mean": run["routing"][key]}
      | {f"layer {layer}": values[key] for layer, values in layers(run)}
      for run in results
    ]

  return [
    Figures("held-out LM loss (nats per token)", ".4f", held_out("lm_loss")),
    Figures("held-out bits per byte", ".4f", held_out("bits_per_byte")),
    Figures("routing diversity (0 to 1)", ".4f", routing("diversity")),
    Figures("D_inter / D_total", ".4f", routing("inter_fraction")),
    Figures("MaxVio (0 is balanced)", ".3f", routing("max_violation")),
    *(
      Figures(heading, ".4f", routing(key))
      for heading, key in _SPECIALIZATION
      if any(map(_specializes, results))
    ),
    Figures(
      "speed",
      ",.0f",
      [{"tokens per second": run["tokens_per_second"]} for run in results],
    ),
  ]


def _carved_sections(
  results: Sequence[Mapping[str, Any]],
  carved: Sequence[Mapping[str, Any] | None],
) -> list[Figures]:
  """Returns what a model is worth whole, and what its parts are worth."""

  def with_experts(
    run: Mapping[str, Any] | None, keep: int
  ) -> dict[str, float]:
    points = run["points"] if run else []
    losses = {p["domain"]: p["loss"] for p in points if p["keep"] == keep}
    if not losses:
      return {}
    return {"mean over domains": statistics.fmean(losses.values())} | losses

  every = {run["experiment"]["model.num_experts"] for run in results}
  of_all = f" of {every.pop()}" if len(every) == 1 else ""
  keeps = {point["keep"] for run in carved if run for point in run["points"]}
  return [
    Figures(
      "held-out LM loss (nats per token)",
      ".4f",
      [{"overall": run["eval"]["lm_loss"]} for run in results],
    ),
    Figures(
      "routing diversity (0 to 1)",
      ".4f",
      [{"mean over layers": run["routing"]["diversity"]} for run in results],
    ),
    *(
      Figures(
        f"LM loss with {keep}{of_all} experts in each layer",
        ".4f",
        [with_experts(run, keep) for run in carved],
      )
      for keep in sorted(keeps, reverse=True)
    ),
  ]


def _domain(name: str) -> str:
  """Returns the name of a domain's row, which is not that of all domains."""
  return f"{name} (domain)" if name == "overall" else name


def layers(
  result: Mapping[str, Any],
) -> list[tuple[int, Mapping[str, float]]]:
  """Returns each MoE layer's routing figures, with its index in the model."""
  first = result["experiment"].get("model.num_dense_layers", 0)
  return list(enumerate(result["routing"]["layers"], start=first))
