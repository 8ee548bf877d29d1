"""Sweep reports: spread over seeds, paired differences, plots."""

import csv
import itertools
import json
import statistics

import numpy as np
import pytest
from matplotlib.figure import Figure

from edl_jax import config, metrics
from edl_jax.analysis import report, sweep_report
from edl_jax.config import Experiment, UserError
from tests.analysis.test_task_comparison import make_tasks

WEIGHT = "losses.divergence_weight"
# Loss by seed, and the gain of a divergence weight by weight and seed.
BASE = {0: 3.0, 1: 3.5, 2: 4.25}
GAIN = {0.0: (0, 0, 0), 0.01: (0.5, 0.25, 0.75), 0.1: (1, 1, 1)}
STEPS = range(1, 5)


def loss_of(weight, seed):
  return BASE[seed] - GAIN[weight][seed]


def make_result(values, lm_loss):
  """Returns a result.json of the experiment that has these values."""
  layer = {
    "diversity": lm_loss / 10,
    "inter_fraction": 0.25,
    "max_violation": 1.0,
    "purity": 0.5,
    "normalized_mutual_information": 0.125,
  }
  domain = {"lm_loss": lm_loss, "bits_per_byte": 1.0, "tokens": 9, "bytes": 30}
  return {
    "experiment": config.flatten(Experiment()) | values,
    "step": 4,
    "content_hash": "0",
    "parameters": {"total": 100, "active": 50},
    "tokens_per_second": 1000.0,
    "eval": {
      "lm_loss": lm_loss,
      "bits_per_byte": 1.0,
      "domains": {"python": domain, "legal": domain | {"lm_loss": 2 * lm_loss}},
    },
    "routing": {**layer, "layers": [layer, layer]},
  }


def write_sweep(workdir, weights=tuple(GAIN), seeds=tuple(BASE), others=({},)):
  """Writes the folders of finished runs, all combinations."""
  for number, (weight, seed, other) in enumerate(
    itertools.product(weights, seeds, others),
    start=len(list(workdir.iterdir())),
  ):
    folder = workdir / f"run{number}"
    loss = loss_of(weight, seed)
    with metrics.MetricsWriter(str(folder)) as writer:
      for step in STEPS:
        writer.write(step, {"train/lm_loss": loss + 5.0 / step})
      writer.write(2, {"eval/lm_loss": loss + 1})
      writer.write(4, {"eval/lm_loss": loss})
    result = make_result({WEIGHT: weight, "seed": seed, **other}, loss)
    (folder / "result.json").write_text(json.dumps(result))


def markdown_rows(text):
  lines = [line for line in text.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_tables_have_spread_and_paired_differences(tmp_path):
  # Written in an order that is not the order of the weights.
  write_sweep(tmp_path, weights=(0.1, 0.01, 0.0))
  (tmp_path / "unfinished").mkdir()
  text = sweep_report.write_report(str(tmp_path))
  assert (tmp_path / "report.md").read_text(encoding="utf-8") == text + "\n"
  assert text.startswith("# Sweep: 9 runs, seeds 0, 1, 2\n")
  rows = markdown_rows(text)
  assert rows[0][:3] == ["group", "n", "LM loss (nats/token)"]
  groups = {row[0]: row for row in rows[2:5]}
  assert list(groups) == [
    f"divergence_weight={w}" for w in ("0", "0.01", "0.1")
  ]
  for row, weight in zip(groups.values(), GAIN):
    losses = [loss_of(weight, seed) for seed in range(3)]
    assert row[1] == "3"
    assert row[2] == f"{sum(losses) / 3:.4f} ± {statistics.stdev(losses):.4f}"
  # By domain: as many groups as rows, legal last.
  domains = markdown_rows(text[text.index("loss by domain") :])
  assert domains[0] == ["group", "python", "legal"]
  for row, weight in zip(domains[2:5], GAIN):
    mean = statistics.fmean(2 * loss_of(weight, seed) for seed in range(3))
    assert row[2].startswith(f"{mean:.4f} ± ")
  # The spread of the differences is that of the gain: seeds cancel.
  start = text.index("Difference from divergence_weight=0, paired by seed")
  small, large = markdown_rows(text[start:])[2:]
  assert small[:3] == ["divergence_weight=0.01", "3", "-0.5000 ± 0.2500"]
  assert large[:3] == ["divergence_weight=0.1", "3", "-1.0000 ± 0.0000"]


def test_csv_has_every_figure_of_every_run(tmp_path):
  write_sweep(tmp_path)
  sweep_report.write_report(str(tmp_path))
  with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
    table = list(csv.DictReader(file))
  assert len(table) == 9
  for row in table:
    expected = loss_of(float(row[WEIGHT]), int(row["seed"]))
    assert float(row["lm_loss"]) == expected
    assert float(row["lm_loss/legal"]) == 2 * expected
    assert float(row["diversity/layer_1"]) == expected / 10
  assert {path.name for path in tmp_path.glob("*.png")} == {
    "loss_by_divergence_weight.png",
    "diversity_by_divergence_weight.png",
    "loss_by_step.png",
  }


def test_plot_has_one_line_a_group_with_error_bars(tmp_path):
  granularity = [{"data.granularity": name} for name in ("fine", "shuffled")]
  write_sweep(tmp_path, others=granularity)
  runs = sweep_report.read_runs(str(tmp_path))
  keys = sweep_report.swept_keys(runs)
  assert keys == [WEIGHT, "data.granularity", "seed"]
  figure = sweep_report._draw_by(
    WEIGHT,
    sweep_report.short_names(keys),
    sweep_report.group_runs(runs),
    "lm_loss",
    "loss",
  )
  (axes,) = figure.axes
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend == ["granularity=fine", "granularity=shuffled"]
  ticks = [label.get_text() for label in axes.get_xticklabels()]
  assert ticks == ["0", "0.01", "0.1"]
  assert len(axes.containers) == 2
  for container in axes.containers:
    line, _, (bars,) = container.lines
    assert list(line.get_xdata()) == [0.0, 0.01, 0.1]
    for y, segment, weight in zip(
      line.get_ydata(), bars.get_segments(), GAIN, strict=True
    ):
      losses = [loss_of(weight, seed) for seed in range(3)]
      assert y == pytest.approx(statistics.fmean(losses))
      spread = segment[1, 1] - segment[0, 1]
      assert spread == pytest.approx(2 * statistics.stdev(losses))


def test_plot_over_steps_has_a_line_for_each_run(tmp_path):
  write_sweep(tmp_path, seeds=(0, 1))
  groups = sweep_report.group_runs(sweep_report.read_runs(str(tmp_path)))
  figure = sweep_report._draw_over_steps(str(tmp_path), groups)
  train, held_out = figure.axes
  expected = [loss_of(weight, seed) for weight in GAIN for seed in (0, 1)]
  assert len(train.lines) == len(held_out.lines) == len(expected)
  for index, loss in enumerate(expected):
    line = train.lines[index]
    assert list(line.get_xdata()) == list(STEPS)
    # The ends of a curve are not averaged.
    assert line.get_ydata()[[0, -1]] == pytest.approx([loss + 5, loss + 5 / 4])
    assert held_out.lines[index].get_xydata().tolist() == [
      [2, loss + 1],
      [4, loss],
    ]
    # Runs of one group share its colour.
    assert line.get_color() == report.COLORS[index // 2]
  legend = [text.get_text() for text in held_out.get_legend().get_texts()]
  assert legend == [group.label for group in groups]


@pytest.mark.parametrize(
  ("points", "scale"),
  [
    ((1.0, 2.0, 20.0), "linear"),
    ((1.0, 2.0, 21.0), "log"),
    ((0.0, 1.0, 20.0), "linear"),
    ((0.0, 0.001, 0.1), "symlog"),
    ((-1.0, 0.001, 0.1), "linear"),
    ((0.0, 0.0), "linear"),
  ],
)
def test_wide_axes_are_logarithmic(points, scale):
  axes = Figure().subplots()
  sweep_report._scale_like(axes.set_xscale, points)
  assert axes.get_xscale() == scale


def test_seeds_that_are_not_shared_are_not_paired(tmp_path):
  write_sweep(tmp_path, weights=(0.0,), seeds=(0,))
  write_sweep(tmp_path, weights=(0.1,), seeds=(1, 2))
  base, other = sweep_report.group_runs(sweep_report.read_runs(str(tmp_path)))
  assert sweep_report.paired_differences(base, other, "lm_loss") == []
  text = sweep_report.write_report(str(tmp_path))
  assert "Difference" not in text
  assert markdown_rows(text)[2][:3] == ["divergence_weight=0", "1", "3.0000"]


def test_names_and_values_are_short():
  keys = ["losses.z_weight", "data.weights", "mesh.data", "model.data"]
  assert sweep_report.short_names(keys) == {
    "losses.z_weight": "z_weight",
    "data.weights": "weights",
    "mesh.data": "mesh.data",
    "model.data": "model.data",
  }
  values = [0.0, 0.01, 3, "fine", True, [0.5, 1.0], ()]
  assert [sweep_report.format_value(value) for value in values] == (
    ["0", "0.01", "3", "fine", "True", "0.5+1", ""]
  )


def test_spread_needs_two_values():
  assert sweep_report.mean_and_spread([2.0]) == (2.0, None)
  values = np.random.default_rng(0).normal(size=9)
  mean, spread = sweep_report.mean_and_spread(values.tolist())
  assert mean == pytest.approx(values.mean())
  assert spread == pytest.approx(values.std(ddof=1))


def test_folder_without_a_good_result_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r"no folder in it has a result\.json"):
    sweep_report.read_runs(str(tmp_path / "none"))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "result.json").write_text("{")
  with pytest.raises(UserError, match=r"run/result\.json: not the result"):
    sweep_report.read_runs(str(tmp_path))


def test_tasks_of_runs_are_compared(tmp_path):
  write_sweep(tmp_path, weights=(0.0, 0.1), seeds=(0, 1))
  text = sweep_report.write_report(str(tmp_path))
  assert "## Tasks" not in text
  for number, folder in enumerate(sorted(tmp_path.glob("run*"))):
    tasks = json.dumps(make_tasks(number))
    (folder / "tasks.json").write_text(tasks)
  text = sweep_report.write_report(str(tmp_path))
  sections = sweep_report.task_sections(
    str(tmp_path),
    sweep_report.group_runs(sweep_report.read_runs(str(tmp_path))),
  )
  assert "\n\n".join(sections) in text
  assert "difference from divergence_weight=0, paired by document" in text
  with open(tmp_path / "report.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  tasks = make_tasks(3)["tasks"]["b.rc"]["figures"]
  last = float(rows[-1]["task/b.rc/accuracy_per_byte"])
  assert last == tasks["accuracy_per_byte"]["mean"]


def test_results_of_an_older_version_have_todays_defaults(tmp_path):
  saved = {"seed": 3, "losses.divergence_weight": 0.5}
  (tmp_path / "result.json").write_text(json.dumps({"experiment": saved}))
  found = sweep_report.read_result(str(tmp_path))["experiment"]
  expected = config.flatten(config.Experiment()) | saved
  assert found == json.loads(json.dumps(expected))
