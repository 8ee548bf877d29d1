"""Conditions on columns, in every form, alone and in preparation."""

import json

import pytest

from data.columns import load_conditions
from data.labels import load_rules, rule_columns
from data.labels import main as label
from data.prepare import Options, prepare
from edl_jax.config import UserError

RECORDS = [
  {"score": 0.5, "meta": {"lang": "en"}},
  {"score": "0.75", "meta": {"lang": "zh"}},
  {"score": 0.4999, "meta": {"lang": "en"}},
  {"score": None, "meta": {"lang": "en"}},
  {"score": "high", "meta": {"lang": "de"}},
  {"meta": {}},
  {"score": 3},
]


@pytest.mark.parametrize(
  ("condition", "kept"),
  [
    ("column score >= 0.5", [0, 1, 6]),
    ("column score > 0.5", [1, 6]),
    ("column score < 5e-1", [2]),
    ("column score<= 0.5", None),
    ("column score <= 0.5", [0, 2]),
    ("column score == 3", [6]),
    ("column score != 3", [0, 1, 2, 4]),
    ("column score == high", [4]),
    ("column meta.lang == en", [0, 2, 3]),
    ("column meta.lang != en", [1, 4]),
    ("column meta.lang in en, zh", [0, 1, 2, 3]),
    ("column score >= high", None),
    ("score >= 0.5", None),
    ("column score", None),
    (3, None),
  ],
)
def test_forms(tmp_path, condition, kept):
  path = tmp_path / "rules.yaml"
  path.write_text(json.dumps({"keep": [condition]}))
  if kept is None:
    with pytest.raises(UserError, match=r"rules\.yaml: keep 1: "):
      load_conditions(str(path))
    return
  (found,) = load_conditions(str(path))
  assert [n for n, record in enumerate(RECORDS) if found.holds(record)] == kept
  assert rule_columns(str(path)) == [found.column]


def test_a_file_of_conditions_alone_labels_by_domain(tmp_path):
  path = tmp_path / "rules.yaml"
  path.write_text("keep: column score >= 1")
  found = load_rules(str(path))({"domain": "news"})
  assert found is not None and found.name == "news"
  assert len(load_conditions(str(path))) == 1
  path.write_text("keep: {score: 1}")
  with pytest.raises(UserError, match="'keep' must be a list"):
    load_conditions(str(path))


def test_what_is_not_kept_is_counted(tmp_path, capsys):
  lines = [
    json.dumps({"text": f"{d} {n}", "domain": d, "score": n / 10}) + "\n"
    for d in "ab"
    for n in range(10)
  ]
  files = tmp_path / "a.jsonl"
  # Left out before its label, which would be an error, is looked at.
  files.write_text("".join([*lines, '{"text": "no domain", "score": 0}\n']))
  rules = tmp_path / "rules.yaml"
  rules.write_text("keep: [column score >= 0.3, column score < 0.9]")
  options = Options(
    str(files), str(tmp_path / "out"), "byte", labels=str(rules)
  )
  manifest = prepare(options)
  assert manifest["skipped"]["not kept"] == 2 * 4 + 1
  assert [row["documents"] for row in manifest["domains"]] == [6, 6]
  assert label([f"--files={files}", f"--rules={rules}"]) == 0
  assert "left out by 'keep': 9 documents" in capsys.readouterr().out
  rules.write_text("keep: column quality >= 0.3")
  other = Options(
    str(files), str(tmp_path / "other"), "byte", labels=str(rules)
  )
  with pytest.raises(UserError, match="no record has the column quality"):
    prepare(other)
