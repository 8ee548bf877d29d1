"""Writes the tables and figures of the study into its page.

  python -m docs.study.page

reads docs/study/results/*.csv and puts each table between the marks
`<!-- table NAME -->` and `<!-- end -->` of docs/study/index.md, with a figure
of the question beside the page. The text around them is written by hand, and
has marks for what is finished.
"""

import re
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from scipy import stats

from docs.study import scaling, training
from docs.study.collect import read_rows
from docs.study.questions import QUESTIONS, Question
from docs.study.runs import Runs, figures_of, pairs_of, runs_of
from edl_jax import storage
from edl_jax.analysis import report
from edl_jax.command import Command

COMMAND = Command(__doc__)
_FOLDER = COMMAND.flag(
  "folder", str(Path(__file__).parent), "Folder of results and page."
)


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
  """Returns the rows of a file, each with the file's name as "sweep"."""
  rows = read_rows(str(folder / "results" / f"{name}.csv"))
  return [row | {"sweep": name} for row in rows]


def read(folder: Path, question: Question) -> list[dict[str, str]]:
  """Returns the rows of a question's files that have its first figure.

  Files of runs that are not made yet may be missing.
  """
  _, figure, _ = question.columns[0]
  return [
    row
    for name in question.files
    for row in _rows(folder, name)
    if figures_of({int(row["seed"]): row}, figure)
  ]


def spread(values: Collection[float], form: str) -> str:
  """Returns mean and sample standard deviation as text; "" without values."""
  if not values:
    return ""
  mean = format(statistics.fmean(values), form)
  if len(values) < 2:
    return mean
  return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def paired(first: Runs, second: Runs, name: str, form: str) -> str:
  """Returns second minus first by seed: mean, 95% interval and p of a t-test.

  The interval and the two-sided p are Student's, for paired values.
  """
  pairs = [*pairs_of(first, second, name).values()]
  if len(pairs) < 2:
    return ""
  test = stats.ttest_1samp(pairs, 0.0)
  low, high = test.confidence_interval(0.95)
  signed = f"+{form.lstrip('+')}"
  return (
    f"{format(statistics.fmean(pairs), signed)}"
    f" [{format(low, signed)}, {format(high, signed)}], p = {test.pvalue:.2g}"
  )


def table(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns the question's table as Markdown; conditions without runs are out.

  The difference is of the first column's figure, paired by seed.
  """
  by_label = {
    condition.label: runs
    for condition in question.conditions
    if (runs := runs_of(rows, condition))
  }
  headings = [
    "condition",
    "seeds",
    *(heading for heading, _, _ in question.columns),
    f"{question.columns[0][0]}, difference",
  ]
  lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
  for condition in question.conditions:
    runs = by_label.get(condition.label)
    if not runs:
      continue
    _, first, form = question.columns[0]
    base = by_label.get(condition.base)
    lines.append(
      [
        condition.label,
        str(len(runs)),
        *(
          spread(figures_of(runs, name).values(), style)
          for _, name, style in question.columns
        ),
        paired(base, runs, first, form) if base else "",
      ]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spent(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns a sentence on the CPU time of the question's runs."""
  runs = [
    row
    for condition in question.conditions
    for row in runs_of(rows, condition).values()
  ]
  seconds = [float(row["cpu_seconds"]) for row in runs if row["cpu_seconds"]]
  known = "" if len(seconds) == len(runs) else f", of {len(seconds)} of them"
  return f"{len(runs)} runs; CPU time{known}: {sum(seconds) / 3600:.1f} hours."


def total(folder: Path) -> str:
  """Returns a sentence on all runs that have results in a folder.

  A run that two files have, as where run.sh links sweeps, counts once.
  """
  every = [
    row
    for path in sorted((folder / "results").glob("*.csv"))
    for row in read_rows(str(path))
    if row.get("seed")
  ]
  rows = [row for place, row in enumerate(every) if row not in every[:place]]
  seconds = [float(row.get("cpu_seconds") or 0) for row in rows]
  unknown = seconds.count(0)
  return (
    f"All {len(rows)} runs took {sum(seconds) / 3600:.1f} hours of CPU time,"
    f" not counting {unknown} whose time was not recorded. Carving, training on"
    " and the noise of held-out text are not in it."
  )


def section(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns what stands between the marks of a question."""
  return f"{table(question, rows)}\n\n{spent(question, rows)}"


def draw(question: Question, rows: Sequence[Mapping[str, str]]) -> Figure:
  """Draws the first column: a point for each run, a bar at the mean.

  Where the question says so, points are differences from a condition's base.
  """
  heading, name, _ = question.columns[0]
  by_label = {each.label: runs_of(rows, each) for each in question.conditions}
  drawn = []
  for condition in question.conditions:
    runs = by_label[condition.label]
    if question.draws_differences:
      values = pairs_of(by_label.get(condition.base, {}), runs, name)
    else:
      values = figures_of(runs, name)
    if values:
      drawn.append((condition.label, list(values.values())))
  if question.draws_differences:
    heading += ", difference"
  figure = Figure(figsize=(7, 0.8 + 0.3 * len(drawn)), layout="constrained")
  axes = figure.subplots()
  for place, (_, values) in enumerate(drawn):
    axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    axes.plot(statistics.fmean(values), place, "|", color="black", ms=14)
  axes.set_yticks(range(len(drawn)), [label for label, _ in drawn])
  axes.set_ylim(len(drawn) - 0.5, -0.5)
  axes.set_xlabel(heading)
  axes.grid(axis="x", alpha=0.3)
  return figure


def draw_by_tokens(
  question: Question, rows: Sequence[Mapping[str, str]]
) -> Figure:
  """Draws distances from the best loss against tokens trained on.

  A panel has a condition and those that are compared with it. Lines are means
  over seeds, and bands reach from the least to the largest. The dotted line is
  the best of a predictor that has to infer the source.
  """
  heading, name, _ = question.columns[0]
  bases = [each.label for each in question.conditions if not each.base]
  figure = Figure(figsize=(3 * len(bases), 3.2), layout="constrained")
  panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
  tokens = sorted(
    {int(key.partition("@")[2]) for row in rows for key in row if "@" in key}
  )
  for axes, base in zip(panels, bases):
    for condition in question.conditions:
      if base not in (condition.label, condition.base):
        continue
      runs = runs_of(rows, condition)
      floors = [
        float(row["best_loss/inferred"]) - float(row["best_loss/known"])
        for row in runs.values()
      ]
      values = [list(figures_of(runs, f"{name}@{n}").values()) for n in tokens]
      drawn = [(n, each) for n, each in zip(tokens, values) if each]
      if not drawn:
        continue
      places = [n / 1e6 for n, _ in drawn]
      lows, highs = zip(*((min(each), max(each)) for _, each in drawn))
      title, _, label = condition.label.rpartition(": ")
      means = [statistics.fmean(each) for _, each in drawn]
      (line,) = axes.plot(places, means, label=label)
      axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.2)
      axes.set_title(title)
      if not condition.base and (floor := statistics.fmean(floors)) > 0:
        axes.axhline(floor, color="black", ls=":", label="best without labels")
    axes.set_xlabel("million tokens")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
  panels[0].set_ylabel(heading)
  figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5
  )
  return figure


def places(page: str) -> list[str]:
  """Returns the names of the tables that a page has a place for."""
  return re.findall(r"^<!-- table (\w+) -->$", page, flags=re.MULTILINE)


def filled(page: str, tables: Mapping[str, str]) -> str:
  """Returns the page with each table between its marks.

  Raises:
    ValueError: the page has two places for a table, or a place for none.
  """
  for name in places(page):
    if name not in tables:
      raise ValueError(f"the page has a place for the table {name}, of no runs")
    pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
    page, count = re.subn(
      pattern,
      lambda found, text=tables[name]: f"{found[1]}\n{text}\n\n{found[2]}",
      page,
      flags=re.DOTALL,
    )
    if count != 1:
      raise ValueError(f"the page has {count} places for the table {name}")
  return page


def noise_table(question: Question, rows: Sequence[Mapping[str, str]]) -> str:
  """Returns a table of differences, and the noise of the held-out rows in them.

  Args:
    question: whose conditions to show.
    rows: of results/noise.csv.
  """
  lines = [
    ["condition", "seeds", "rows", "difference", "standard error of rows"],
    ["---", *["---:"] * 4],
  ]
  for condition in question.conditions:
    for row in rows:
      if (question.name, condition.label) == (
        row["question"],
        row["condition"],
      ):
        lines.append(
          [
            condition.label,
            row["seeds"],
            f"{int(row['rows']):,}",
            f"{float(row['difference']):+.4f}",
            f"{float(row['standard_error']):.4f}",
          ]
        )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(folder: Path) -> dict[str, str]:
  """Returns what can stand between the page's marks, by name."""
  noise = read_rows(str(folder / "results" / "noise.csv"))
  found = {"total": total(folder)}
  for question in QUESTIONS:
    if rows := read(folder, question):
      found[question.name] = section(question, rows)
      if question.noise and any(r["question"] == question.name for r in noise):
        found[f"{question.name}_noise"] = noise_table(question, noise)
      if question.by_quarter and (quarters := training.table(question, rows)):
        found[f"{question.name}_quarters"] = quarters
      if question.by_compute and (fits := scaling.table(question, rows)):
        found[f"{question.name}_fits"] = fits
  return found


def unused(folder: Path) -> dict[str, int]:
  """Returns how many rows of each file belong to no condition."""
  counts = {}
  for name in dict.fromkeys(name for q in QUESTIONS for name in q.files):
    conditions = [
      condition
      for question in QUESTIONS
      if name in question.files
      for condition in question.conditions
    ]
    alone = [
      row
      for row in _rows(folder, name)
      if not any(runs_of([row], each) for each in conditions)
    ]
    if alone:
      counts[name] = len(alone)
  return counts


@COMMAND.main
def main() -> None:
  """Writes the tables and figures that the page has a place for."""
  folder = Path(_FOLDER.value)
  page = folder / "index.md"
  found, text = tables(folder), page.read_text()
  storage.write_bytes(page, filled(text, found).encode())
  shown = places(text)
  for question in QUESTIONS:
    if question.name in shown:
      rows = read(folder, question)
      path = folder / f"{question.name}.png"
      drawing = scaling.draw if question.by_compute else draw
      report.save_figure(drawing(question, rows), str(path))
      if question.by_tokens:
        path = folder / f"{question.name}_by_tokens.png"
        report.save_figure(draw_by_tokens(question, rows), str(path))
  print(f"written to {page}: {', '.join(shown) or 'no table'}")
  if left := sorted(found.keys() - set(shown)):
    print(f"it has no place for: {', '.join(left)}")
  for name, count in unused(folder).items():
    print(f"{count} runs of {name}.csv are of no condition in questions.py")


if __name__ == "__main__":
  sys.exit(main())
