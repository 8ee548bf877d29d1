"""Pictures of a run show the figures of its files."""

import json
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg

from edl_jax import metrics
from edl_jax.analysis import report


def write_run(folder, num_layers, domains, num_experts):
  """Writes routing.json and metrics.jsonl as a run does."""
  random = np.random.default_rng(0)
  size = num_layers, len(domains), num_experts
  probabilities = random.dirichlet(np.ones(num_experts), size[:2])
  divergence = random.uniform(0, 0.6, (num_layers, size[1], size[1]))
  routing = {
    "domains": list(domains),
    "layers": list(range(1, num_layers + 1)),
    "probabilities": probabilities.tolist(),
    "assignments": probabilities.tolist(),
    "pairwise_divergence": (divergence + divergence.swapaxes(1, 2)).tolist(),
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "routing.json").write_text(json.dumps(routing))
  with metrics.MetricsWriter(str(folder)) as writer:
    for step in (10, 20, 30):
      names = ("lm_loss", "divergence_loss", "balance_loss", "z_loss")
      values = {f"train/{name}": 30.0 / step for name in names}
      values |= {"routing/diversity": 0.2, "routing/inter_fraction": 0.4}
      writer.write(step, values)
      losses = {f"eval/lm_loss/{d}": 2 + i / 2 for i, d in enumerate(domains)}
      writer.write(step, {"eval/lm_loss": 2.25, **losses})
      writer.write(step, {"eval/routing/diversity": 0.3})
  return routing


def pixels_of(figure, axes, points):
  """Returns the pixels (row, column) of a saved figure at data coordinates."""
  figure.set_dpi(report.DPI)
  FigureCanvasAgg(figure).draw()
  x, y = axes.transData.transform(points).T
  height = figure.bbox.height
  return (height - y).astype(int), x.astype(int)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (3, 16, 40)])
def test_pictures_show_every_cell_in_its_colour(tmp_path, sizes):
  num_layers, num_domains, num_experts = sizes
  domains = [f"domain_{i}" for i in range(num_domains)]
  routing = write_run(tmp_path / "run", num_layers, domains, num_experts)
  paths = report.write_run_report(str(tmp_path / "run"))
  names = ("loss", "experts_by_domain", "domain_divergence")
  assert paths == [str(tmp_path / f"run/report/{n}.png") for n in names]
  for path, draw, columns in (
    (paths[1], report._draw_experts, num_experts),
    (paths[2], report._draw_divergence, num_domains),
  ):
    picture = image.imread(path)[..., :3]
    figure = draw(routing, "run")
    # One panel a layer, and the colour bar.
    assert len(figure.axes) == num_layers + 1
    for axes in figure.axes[:num_layers]:
      (drawn,) = axes.images
      shown = np.asarray(drawn.get_array())
      assert shown.shape == (num_domains, columns)
      # A third of a cell from its centre, beside the number written there.
      points = [
        (column + 0.33, row + 0.33)
        for row in range(num_domains)
        for column in range(columns)
      ]
      colors = picture[pixels_of(figure, axes, points)]
      expected = drawn.cmap(drawn.norm(shown.ravel()))[:, :3]
      np.testing.assert_allclose(colors, expected, atol=1.5 / 255)


def test_domains_name_the_rows_of_the_leftmost_panels(tmp_path):
  domains = [f"domain_{i}" for i in range(16)]
  routing = write_run(tmp_path, 3, domains, 40)
  for draw in (report._draw_experts, report._draw_divergence):
    panels = draw(routing, "run").axes[:3]
    columns = panels[0].get_gridspec().ncols
    for index, axes in enumerate(panels):
      labels = [label.get_text() for label in axes.get_yticklabels()]
      assert labels == (domains if index % columns == 0 else [""] * 16)


def test_loss_picture_has_a_line_for_each_figure(tmp_path):
  write_run(tmp_path, 1, ["c", "legal"], 4)
  lines = metrics.read_metrics(str(tmp_path))
  steps = [10, 20, 30]
  loss, routing, auxiliary = report._draw_loss(lines, "run").axes
  drawn = {
    line.get_label(): line.get_xydata().round(9).tolist()
    for axes in (loss, routing, auxiliary)
    for line in axes.lines
    if not line.get_label().startswith("_")
  }
  falling = [[step, 30.0 / step] for step in steps]
  middle = sum(y for _, y in falling) / 3
  smoothed = [falling[0], [20, round(middle, 9)], falling[2]]
  assert drawn == {
    "training, smoothed": smoothed,
    "c": [[step, 2.0] for step in steps],
    "legal": [[step, 2.5] for step in steps],
    "held-out, overall": [[step, 2.25] for step in steps],
    "diversity: mean JSD of domain pairs / ln 2": [[s, 0.2] for s in steps],
    "share between domains: D_inter / D_total": [[s, 0.4] for s in steps],
    "held-out": [],
    "balance": smoothed,
    "divergence": smoothed,
    "z": smoothed,
  }
  # Without names: the training loss as it is; of each routing figure the values
  # as they are and the held-out points.
  unnamed = [
    [line.get_xydata().tolist() for line in axes.lines[start::step]]
    for axes, start, step in ((loss, 0, 5), (routing, 0, 3), (routing, 2, 3))
  ]
  assert unnamed == [
    [falling],
    [[[s, 0.2] for s in steps], [[s, 0.4] for s in steps], []],
    [[[s, 0.3] for s in steps], []],
  ]


def test_many_domains_share_one_name(tmp_path):
  domains = [f"domain_{i}" for i in range(20)]
  write_run(tmp_path, 1, domains, 4)
  lines = metrics.read_metrics(str(tmp_path))
  axes = report._draw_loss(lines, "run").axes[0]
  # Training twice, each domain, overall.
  assert len(axes.lines) == 2 + 20 + 1
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend == [
    "training, smoothed",
    "each of 20 held-out domains",
    "held-out, overall",
  ]


def test_run_report_draws_what_there_is(tmp_path):
  assert report.write_run_report(str(tmp_path)) == []
  metrics.MetricsWriter(str(tmp_path)).close()
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/lm_loss": 2.0}\n')
  (path,) = report.write_run_report(str(tmp_path))
  assert path.endswith("loss.png")


def test_heat_maps_show_the_right_numbers(tmp_path):
  routing = write_run(tmp_path, 2, ["c", "python", "prose"], 5)
  experts = report._draw_experts(routing, "run")
  divergence = report._draw_divergence(routing, "run")
  for layer in range(2):
    axes = experts.axes[layer]
    assert axes.get_title() == f"layer {layer + 1}"
    shown_DE = np.asarray(axes.images[0].get_array())
    order_E = [int(label.get_text()) for label in axes.get_xticklabels()]
    assert sorted(order_E) == list(range(5))
    expected_DE = 100 * np.array(routing["assignments"][layer])
    np.testing.assert_allclose(shown_DE, expected_DE[:, order_E])
    # The favourite domain of the experts, left to right, never goes back up.
    assert np.all(np.diff(shown_DE.argmax(axis=0)) >= 0)
    axes = divergence.axes[layer]
    expected_DD = np.array(routing["pairwise_divergence"][layer])
    np.testing.assert_allclose(axes.images[0].get_array(), expected_DD)
    shown = {t.get_position(): float(t.get_text()) for t in axes.texts}
    assert len(shown) == 6
    for (column, row), value in shown.items():
      assert abs(value - expected_DD[row, column]) <= 0.0005 + 1e-9
  names = [label.get_text() for label in divergence.axes[0].get_yticklabels()]
  assert names == ["c", "python", "prose"]


def test_smooth_equals_a_naive_window():
  values = np.random.default_rng(0).normal(size=100)
  smoothed = report.smooth(values)
  for i in range(100):
    half = min(2, i, 99 - i)
    expected = values[i - half : i + half + 1].mean()
    assert smoothed[i] == pytest.approx(expected, abs=1e-12)
  assert report.smooth(np.array([])).shape == (0,)


def test_importing_loads_neither_jax_nor_pyplot():
  code = (
    "import sys, edl_jax.analysis.report, edl_jax.sweep;"
    "print([m for m in ('jax', 'matplotlib.pyplot') if m in sys.modules])"
  )
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  assert output.strip() == "[]"


def test_names_are_drawn_as_they_are(tmp_path):
  domains = ["$AAPL_$TSLA", "C$", "新闻", "a_b^c", "\\\\frac{"]
  write_run(tmp_path / "a$b_$c", 2, domains, 4)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    paths = report.write_run_report(str(tmp_path / "a$b_$c"))
  assert len(paths) == 3
  # Outside, mathematics stays what it was.
  assert matplotlib.rcParams["text.parse_math"]
