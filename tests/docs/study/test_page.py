"""The study's tables: conditions, paired tests, and their place in the page."""

import csv
import pathlib
import re

import numpy as np
import pytest

from docs.study import page
from docs.study.collect import SETTINGS
from docs.study.questions import QUESTIONS, Condition, Question
from docs.study.runs import figures_of, runs_of

FOLDER = pathlib.Path(__file__).parents[3] / "docs" / "study"
AES = ("none", "orthogonality", "variance", "both")
WEIGHT = "losses.divergence_weight"
QUESTION = Question(
  "example",
  ("runs", "missing"),
  [
    Condition("none", {WEIGHT: "0.0"}),
    Condition("some", {WEIGHT: "0.01"}, "none"),
    Condition("never run", {WEIGHT: "0.5"}, "none"),
  ],
  (("LM loss", "lm_loss", ".3f"), ("diversity", "diversity", ".1f")),
)
# Loss by weight and seed. Seed 3 has no partner.
LOSSES = {"0.0": [3.0, 3.5, 4.25, 9.0], "0.01": [3.1, 3.4, 4.5]}


@pytest.fixture
def rows(tmp_path):
  (tmp_path / "results").mkdir()
  with (tmp_path / "results" / "runs.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["seed", WEIGHT, "lm_loss", "diversity"])
    for weight, losses in LOSSES.items():
      for seed, loss in enumerate(losses):
        writer.writerow([seed, weight, loss, 0.5])
  return page.read(tmp_path, QUESTION)


def test_table_pairs_conditions_by_seed(rows):
  lines = page.table(QUESTION, rows).splitlines()
  assert len(lines) == 4  # without the condition that has no run
  # Student's t for three pairs: by hand, with its distribution for two degrees
  # of freedom in closed form.
  pairs = np.array([0.1, -0.1, 0.25])
  error = pairs.std(ddof=1) / np.sqrt(3)
  t = pairs.mean() / error
  p = 1 - t / np.sqrt(2 + t**2)
  reach = 4.302652729911275 * error
  low, high = pairs.mean() - reach, pairs.mean() + reach
  assert lines[2] == "| none | 4 | 4.938 ± 2.757 | 0.5 ± 0.0 |  |"
  assert lines[3] == (
    f"| some | 3 | 3.667 ± 0.737 | 0.5 ± 0.0 | {pairs.mean():+.3f}"
    f" [{low:+.3f}, {high:+.3f}], p = {p:.2g} |"
  )


def test_runs_of_different_text_are_no_pair(rows):
  for row in rows:
    row["text"] = "one"
  before = page.table(QUESTION, rows)
  rows[-1]["text"] = "other"  # seed 2, with divergence
  # Two pairs are left: Student's t is then a Cauchy quotient.
  p = 1 - 2 / np.pi * np.arctan(0)
  assert page.table(QUESTION, rows) != before
  assert f"+0.000 [-1.271, +1.271], p = {p:.2g}" in page.table(QUESTION, rows)


def test_two_runs_of_one_seed_are_refused(rows):
  with pytest.raises(ValueError, match="two runs of seed 2"):
    page.table(QUESTION, [*rows, rows[2]])


def test_conditions_can_name_a_text(rows):
  none = Condition("none", {WEIGHT: "0.0", "text": ""})
  # Rows of older versions have no text.
  assert len(runs_of(rows, none)) == 4
  rows[0]["text"] = "one"
  assert len(runs_of(rows, none)) == 3


def test_conditions_can_name_a_sweep(rows):
  all_none = Condition("none", {WEIGHT: "0.0", "sweep": "runs"})
  assert len(runs_of(rows, all_none)) == 4
  assert not runs_of(rows, Condition("none", {"sweep": "missing"}))


def test_figure_has_a_line_for_each_condition(rows):
  labels = page.draw(QUESTION, rows).axes[0].get_yticklabels()
  assert [label.get_text() for label in labels] == ["none", "some"]


def test_figure_can_have_the_paired_differences(rows):
  question = QUESTION._replace(draws_differences=True)
  (axes,) = page.draw(question, rows).axes
  assert [label.get_text() for label in axes.get_yticklabels()] == ["some"]
  np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), [0.1, -0.1, 0.25])
  assert axes.get_xlabel() == "LM loss, difference"


@pytest.mark.usefixtures("rows")
def test_runs_without_the_first_figure_are_left_out(tmp_path):
  question = QUESTION._replace(columns=(("rise", "carved/4", ".3f"),))
  assert page.read(tmp_path, question) == []


def test_figures_that_some_runs_lack(rows):
  del rows[0]["diversity"]
  rows[1]["diversity"] = ""
  line = page.table(QUESTION, rows).splitlines()[2]
  assert line == "| none | 4 | 4.938 ± 2.757 | 0.5 ± 0.0 |  |"
  for row in rows:
    row["diversity"] = ""
  line = page.table(QUESTION, rows).splitlines()[2]
  assert line == "| none | 4 | 4.938 ± 2.757 |  |  |"


def test_cpu_time_is_that_of_the_runs_that_are_in_the_table(rows):
  for row in rows:
    row["cpu_seconds"] = "900.0"
  others = [row | {WEIGHT: "0.3"} for row in rows]
  text = page.spent(QUESTION, rows + others)
  assert text == "7 runs; CPU time: 1.8 hours."
  rows[0]["cpu_seconds"] = ""
  text = page.spent(QUESTION, rows)
  assert text == "7 runs; CPU time, of 6 of them: 1.5 hours."


def test_distances_by_tokens(rows):
  question = QUESTION._replace(
    columns=(("nats above the best", "distance", ".2f"),)
  )
  for row in rows:
    row |= {"best_loss/known": "2.5", "best_loss/inferred": "2.75"}
    row["lm_loss@2000000"] = row["lm_loss"]
    row["lm_loss@1000000"] = str(float(row["lm_loss"]) + 1)
  table = page.table(question, rows).splitlines()
  assert table[2] == "| none | 4 | 2.44 ± 2.76 |  |"
  (axes,) = page.draw_by_tokens(question, rows).axes
  none, floor, some = axes.get_lines()
  assert set(floor.get_ydata()) == {0.25}
  assert none.get_xydata().tolist() == [[1, 3.4375], [2, 2.4375]]
  means = np.mean(LOSSES["0.01"]) - 2.5 + np.array([1.0, 0.0])
  np.testing.assert_allclose(some.get_ydata(), means)


def test_page_is_filled_between_its_marks():
  text = "# A\n<!-- table x -->\nold\n<!-- end -->\nB\n"
  filled = page.filled(text, {"x": "| new |", "not_on_the_page": ""})
  assert filled == "# A\n<!-- table x -->\n\n| new |\n\n<!-- end -->\nB\n"
  assert page.filled(filled, {"x": "| new |"}) == filled
  with pytest.raises(ValueError, match="a place for the table x, of no runs"):
    page.filled(text, {"y": ""})
  with pytest.raises(ValueError, match="2 places for the table x"):
    page.filled(text + text, {"x": ""})


def test_conditions_use_settings_that_are_collected():
  for question in QUESTIONS:
    labels = [condition.label for condition in question.conditions]
    assert len(set(labels)) == len(labels)
    for condition in question.conditions:
      assert set(condition.where) <= {*SETTINGS, "text", "sweep"}
      assert condition.base in {"", *labels}


def test_published_page_is_made_from_the_published_results():
  text = (FOLDER / "index.md").read_text()
  assert page.filled(text, page.tables(FOLDER)) == text


def test_total_is_of_all_runs_once(tmp_path):
  (tmp_path / "results").mkdir()
  for name, lines in (
    ("one", "seed,cpu_seconds\n0,5400\n1,\n"),
    ("linked", "seed,cpu_seconds\n0,5400\n1,\n"),
    ("old", "seed\n0\n"),
    ("noise", "question,difference\nx,0.1\n"),
  ):
    (tmp_path / "results" / f"{name}.csv").write_text(lines)
  assert page.total(tmp_path) == (
    "All 3 runs took 1.5 hours of CPU time, not counting 2 whose time was not"
    " recorded. Carving, training on and the noise of held-out text are not in"
    " it."
  )


def test_rows_of_no_condition_are_counted(tmp_path, monkeypatch):
  (tmp_path / "results").mkdir()
  (tmp_path / "results" / "runs.csv").write_text(
    f"seed,{WEIGHT}\n0,0.0\n0,0.01\n1,0.7\n2,0.7\n"
  )
  monkeypatch.setattr(page, "QUESTIONS", (QUESTION,))
  assert page.unused(tmp_path) == {"runs": 2}


def test_shares_of_the_experts():
  runs = {
    0: {"model.num_experts": "16", "carved/4": "0.5", "carved/8": "0.25"},
    1: {"model.num_experts": "64", "carved/16": "0.125"},
  }
  assert figures_of(runs, "carved/quarter") == {0: 0.5, 1: 0.125}
  assert figures_of(runs, "carved/half") == {0: 0.25}


def test_every_file_of_the_questions_is_made_and_every_made_one_is_asked_for():
  names = {name for question in QUESTIONS for name in question.files}
  script = (FOLDER / "run.sh").read_text()
  made = set(re.findall(r"^ *sweep (\w+) ", script, flags=re.MULTILINE))
  made |= {f"post_training_{name}" for name in ("both_100", "edl")}
  made |= {"finer", *(f"layers_{number}" for number in (2, 3, 6, 8))}
  made |= {f"post_training_{name}" for name in AES}
  assert made == names | {"post_training_base"}
