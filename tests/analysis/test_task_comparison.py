"""Comparison of runs on tasks, against plain loops."""

import json
import math
import statistics

import numpy as np
import pytest

from edl_jax.analysis.task_comparison import (
  RunsOfGroup,
  flat_figures,
  mean_difference,
  paired_difference,
  read_tasks,
  sections,
)
from edl_jax.config import UserError

NAMES = {"a.rc": 12, "b.rc": 7}


def make_tasks(seed, shift=0.0, step=4):
  """Returns a tasks.json of random figures; `shift` is added to them."""
  random = np.random.default_rng(seed)
  tasks = {}
  for name, count in NAMES.items():
    figures = {
      "bits_per_byte": random.normal(4 + shift, 1, count).tolist(),
      "accuracy_per_byte": random.integers(0, 2, count).tolist(),
    }
    tasks[name] = {
      "form": "rc",
      "group": "g",
      "sha256": name,
      "chance": 0.25,
      "figures": {
        figure: {"mean": statistics.fmean(x), "standard_error": 0.1}
        for figure, x in figures.items()
      },
      "by_document": {"id": list(map(str, range(count))), **figures},
    }
  means = {
    figure: {
      "mean": statistics.fmean(
        task["figures"][figure]["mean"] for task in tasks.values()
      ),
      "standard_error": 0.1,
    }
    for figure in ("bits_per_byte", "accuracy_per_byte")
  }
  return {
    "step": step,
    "max_length": 16,
    "tasks": tasks,
    "groups": {"g.rc": {"tasks": 2, "chance": 0.25, "figures": means}},
  }


def values_of(tasks, name, figure="bits_per_byte"):
  return tasks["tasks"][name]["by_document"][figure]


def test_differences_are_paired_by_document_and_seed():
  pairs = [(make_tasks(i), make_tasks(10 + i, 0.5)) for i in range(3)]
  found = paired_difference(pairs, "a.rc", "bits_per_byte")
  assert found is not None
  by_pair = [
    [y - x for x, y in zip(values_of(base, "a.rc"), values_of(other, "a.rc"))]
    for base, other in pairs
  ]
  by_document = [statistics.fmean(each) for each in zip(*by_pair)]
  means = [statistics.fmean(each) for each in by_pair]
  assert found.mean == pytest.approx(statistics.fmean(means))
  assert found.documents == 12
  assert found.by_pair == pytest.approx(means)
  assert found.document_error == pytest.approx(
    statistics.stdev(by_document) / math.sqrt(12)
  )
  assert found.pair_error == pytest.approx(statistics.stdev(means) / 3**0.5)


def test_pairing_removes_what_documents_share():
  base = make_tasks(0)
  other = json.loads(json.dumps(base))
  values = values_of(other, "a.rc")
  values[:] = [value + 0.25 for value in values]
  found = paired_difference([(base, other)], "a.rc", "bits_per_byte")
  assert found is not None
  assert found.mean == pytest.approx(0.25)
  assert found.document_error == pytest.approx(0, abs=1e-12)
  assert found.pair_error is None


def test_only_what_is_comparable_is_compared():
  base, other = make_tasks(0), make_tasks(1)
  # Another subset of the documents, in another order.
  fewer = json.loads(json.dumps(other))
  documents = fewer["tasks"]["a.rc"]["by_document"]
  for key in documents:
    documents[key] = documents[key][5:1:-1]
  found = paired_difference([(base, fewer)], "a.rc", "bits_per_byte")
  assert found is not None and found.documents == 4
  assert found.mean == pytest.approx(
    statistics.fmean(values_of(other, "a.rc")[2:6])
    - statistics.fmean(values_of(base, "a.rc")[2:6])
  )
  for change in (
    {"max_length": 8},
    {"tasks": other["tasks"] | {"a.rc": documents_of_another_file(other)}},
    {"tasks": {}},
  ):
    pairs = [(base, {**other, **change})]
    assert paired_difference(pairs, "a.rc", "bits_per_byte") is None
  assert paired_difference([(base, other)], "a.rc", "accuracy_pmi") is None
  assert paired_difference([], "a.rc", "bits_per_byte") is None


def documents_of_another_file(tasks):
  return tasks["tasks"]["a.rc"] | {"sha256": "other"}


def test_the_mean_over_tasks():
  pairs = [(make_tasks(i), make_tasks(10 + i)) for i in range(2)]
  each = []
  for name in NAMES:
    found = paired_difference(pairs, name, "bits_per_byte")
    assert found is not None
    each.append(found)
  mean = mean_difference(each)
  assert mean.mean == pytest.approx((each[0].mean + each[1].mean) / 2)
  errors = [found.document_error for found in each]
  assert mean.document_error == pytest.approx(np.linalg.norm(errors) / 2)
  by_pair = np.mean([found.by_pair for found in each], axis=0)
  assert mean.pair_error == pytest.approx(abs(by_pair[1] - by_pair[0]) / 2)
  assert mean.documents == 19


def test_sections_have_means_and_differences():
  groups = [
    RunsOfGroup("w=0", {0: make_tasks(0), 1: make_tasks(1)}),
    RunsOfGroup("w=1", {0: make_tasks(2), 1: make_tasks(3)}),
    RunsOfGroup("w=2", {}),
  ]
  text = "\n\n".join(sections(groups))
  assert "w=2" not in text
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  assert rows[0] == ["task", "w=0", "w=1", "chance"]
  names = ["a.rc", "b.rc", "mean of g.rc"]
  assert [row[0] for row in rows if row[0] in names] == 4 * names
  means = [
    run["tasks"]["a.rc"]["figures"]["bits_per_byte"]["mean"]
    for run in groups[1].by_seed.values()
  ]
  spread = statistics.stdev(means)
  assert rows[2][2] == f"{statistics.fmean(means):.4f} ± {spread:.4f}"
  assert rows[2][3] == "-"
  pairs = [(make_tasks(0), make_tasks(2)), (make_tasks(1), make_tasks(3))]
  found = paired_difference(pairs, "a.rc", "bits_per_byte")
  assert found is not None
  assert [
    "a.rc",
    f"{found.mean:+.4f} ± {found.document_error:.4f} / {found.pair_error:.4f}",
  ] in rows
  assert "Accuracy in percent" in text and "25.0" in text
  assert sections([RunsOfGroup("w=0", {})]) == []


def test_files_of_the_step_are_read(tmp_path):
  folder = str(tmp_path)
  assert read_tasks(folder) is None
  path = tmp_path / "tasks.json"
  path.write_text(json.dumps(make_tasks(0)))
  found = read_tasks(folder, 4)
  assert found == make_tasks(0)
  assert read_tasks(folder, 5) is None
  flat = flat_figures(found)
  assert flat["task/a.rc/bits_per_byte"] == pytest.approx(
    statistics.fmean(values_of(found, "a.rc"))
  )
  assert "group/g.rc/accuracy_per_byte" in flat
  path.write_text('{"step": 4}')
  with pytest.raises(UserError, match=r"tasks\.json: not the figures"):
    read_tasks(folder)
