"""The table of tasks follows from two runs' tasks.json alone."""

import json
import math

import numpy as np
import pytest

from docs.study import tasks
from edl_jax.config import UserError

BITS = {"a.rc": [[1.0, 2.0, 3.0], [1.5, 2.0, 2.0]], "b.rc": [[4.0], [3.0]]}
HITS = {"a.rc": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], "b.rc": [[0.0], [1.0]]}


def estimate(values):
  error = (
    np.std(values, ddof=1) / math.sqrt(len(values)) if values[1:] else None
  )
  return {"mean": float(np.mean(values)), "standard_error": error}


def tasks_json(run):
  """Returns what a run's tasks.json would say of two tasks of a group."""
  found = {
    name: {
      "form": "rc",
      "group": "g",
      "sha256": name,
      "documents": len(BITS[name][run]),
      "by_document": {
        "id": [str(i) for i in range(len(BITS[name][run]))],
        "bits_per_byte": BITS[name][run],
        "accuracy_per_byte": HITS[name][run],
      },
    }
    for name in BITS
  }
  group = {
    "tasks": 2,
    "chance": 0.25,
    "figures": {
      "bits_per_byte": estimate([np.mean(x[run]) for x in BITS.values()]),
      "accuracy_per_byte": estimate([np.mean(x[run]) for x in HITS.values()]),
    },
  }
  return {"step": 3, "max_length": 8, "tasks": found, "groups": {"g.rc": group}}


def write(tmp_path):
  for run in range(2):
    (tmp_path / str(run)).mkdir()
    path = tmp_path / str(run) / "tasks.json"
    path.write_text(json.dumps(tasks_json(run)))
  (tmp_path / "tasks.md").write_text(
    "# T\n\n<!-- table tasks -->\n<!-- end -->\n"
  )
  return [str(tmp_path / str(run)) for run in range(2)]


def test_the_page_has_both_runs_and_their_difference(tmp_path):
  runs = write(tmp_path)
  flags = [f"--folder={tmp_path}"]
  assert tasks.main([f"--runs={','.join(runs)}", *flags]) == 0
  page = (tmp_path / "tasks.md").read_text()
  row = next(line for line in page.splitlines() if "`g.rc`" in line)
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[1] == "2, 4"
  # The mean over tasks of the mean over documents; one task has one document,
  # so that the difference has no error.
  assert cells[2].startswith("3.000 ± ") and cells[3].startswith("2.417 ± ")
  assert cells[4] == f"{(-0.5 / 3 - 1) / 2:+.3f}"
  assert cells[7] == f"{100 * (1 / 3 + 1) / 2:+.1f}"
  assert cells[8] == "25.0"
  # The small file is all that the page needs.
  (tmp_path / "tasks.md").write_text("<!-- table tasks -->\n<!-- end -->\n")
  assert tasks.main(flags) == 0
  assert row in (tmp_path / "tasks.md").read_text()


def test_runs_on_other_documents_are_refused():
  first, second = tasks_json(0), tasks_json(1)
  second["tasks"]["b.rc"]["sha256"] = "another file"
  with pytest.raises(UserError, match=r"g\.rc: .* other documents"):
    tasks.collected(first, second)


def test_a_run_without_tasks_is_refused(tmp_path, capsys):
  runs = write(tmp_path)
  assert tasks.main([f"--runs={runs[0]}", f"--folder={tmp_path}"]) == 2
  assert "two runs that have a tasks.json" in capsys.readouterr().err
