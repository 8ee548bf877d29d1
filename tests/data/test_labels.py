"""Rules that label text, their errors, and the report."""

import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest

from data import labels
from data.columns import columns_in, stored_columns
from data.labels import (
  Label,
  LabelReport,
  load_rules,
  rule_columns,
)
from edl_jax.config import UserError
from edl_jax.text.streams import need_package

ENGLISH = "It is a truth universally acknowledged, that a single man in"
CHINESE = "道可道非常道。名可名非常名。无名天地之始有名万物之母。"
SHANGHAINESE = "上海闲话老好听个侬晓得伐"


@pytest.fixture
def rule(tmp_path):
  def make(text):
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return load_rules(str(path))

  return make


def names(rule, key, values):
  found = [rule({"text": "t", key: value}) for value in values]
  return [label and label.name for label in found]


# --- Rules -------------------------------------------------------------------


def test_column(rule):
  plain = rule("rules: [{by: column, column: source}]")
  values = ["wiki", "web/news", 3, "", None]
  assert names(plain, "source", values) == ["wiki", "web/news", "3", None, None]
  assert plain({"text": "t"}) is None
  mapped = rule(
    "rules: [{by: column, column: source, labels: {wiki: prose/wiki,"
    " 3: three}}]"
  )
  assert names(mapped, "source", values[:3]) == ["prose/wiki", None, "three"]


def test_url(rule):
  host = rule(
    "rules: [{by: url, labels: {arxiv.org: math, .gov: law, nasa.gov: sky}}]"
  )
  found = {
    "https://arxiv.org/abs/1": "math",
    "http://export.arxiv.org:80/x": "math",
    "arxiv.org": "math",
    "ARXIV.org/x": "math",
    "https://notarxiv.org/arxiv.org": None,
    "https://www.congress.gov": "law",
    "https://www.nasa.gov/a?b=.gov": "sky",
    "https://gov.example/": None,
    "http://[": None,
    "": None,
  }
  assert names(host, "url", found) == list(found.values())
  other = rule("rules: [{by: url, column: link, labels: {a.b: x}}]")
  assert names(other, "link", ["https://a.b"]) == ["x"]


def test_path(rule):
  path = rule(
    "rules: [{by: path, labels: {'*/test_*.py': tests, '*.py': code, 'docs/*':"
    " prose}}]"
  )
  found = {
    "a/b/c.py": "code",
    "c.py": "code",
    "a/test_c.py": "tests",
    "docs/a/b.md": "prose",
    "x/docs/b.md": None,
    "a.pyc": None,
  }
  assert names(path, "path", found) == list(found.values())


def test_language(rule):
  plain = rule("rules: [{by: language}]")
  assert plain({"text": ENGLISH}).name == "en"
  assert plain({"text": CHINESE}).name == "zh"
  module = need_package("py3langid.langid", "test")
  assert module.classify(SHANGHAINESE)[0] == "wuu"
  assert plain({"text": SHANGHAINESE}).name == "zh"
  # Nothing to go by.
  assert plain({"text": "1 + 2 = 3"}) is None
  sure = plain({"text": ENGLISH}).confidence
  for at_least, known in ((sure - 1e-6, True), (sure + 1e-6, False)):
    mapped = rule(
      "rules: [{by: language, labels: {en: english}, at_least:"
      f" {at_least}}}]"
    )
    assert mapped({"text": ENGLISH}) == (
      Label("english", sure) if known else None
    )
    assert mapped({"text": CHINESE}) is None


def test_file_type_is_optional(rule, monkeypatch):
  text = "rules: [{by: file_type, labels: {python: code}}]"
  with pytest.raises(UserError, match="magika: pip install magika"):
    rule(text)

  class Magika:
    def identify_bytes(self, content):
      kind = "python" if content.startswith(b"import") else "txt"
      output = types.SimpleNamespace(label=kind)
      return types.SimpleNamespace(output=output, score=0.75)

  monkeypatch.setitem(
    sys.modules, "magika", types.SimpleNamespace(Magika=Magika)
  )
  kind = rule(text)
  assert kind({"text": "import os"}) == Label("code", 0.75)
  assert kind({"text": "Dear Sir"}) is None


def test_rules_are_asked_in_order(rule):
  either = rule(
    """
rules:
  - {by: path, labels: {"*.py": code}}
  - {by: column, column: source, labels: {wiki: prose}}
  - {by: language, labels: {en: english}}
"""
  )
  record = {"text": ENGLISH, "path": "a.py", "source": "wiki"}
  assert either(record).name == "code"
  assert either(record | {"path": "a.md"}).name == "prose"
  assert either(record | {"path": "a.md", "source": "x"}).name == "english"
  assert either({"text": CHINESE}) is None


def test_two_rules_make_coarse_and_fine(rule):
  pair = rule(
    """
rules:
  - by: both
    coarse: {by: language, labels: {en: english, zh: chinese}}
    fine: {by: column, column: topic}
"""
  )
  label = pair({"text": ENGLISH, "topic": "law"})
  assert label.name == "english/english_law" and 0.5 < label.confidence < 1
  chinese = pair({"text": CHINESE, "topic": "law"})
  assert chinese.name == "chinese/chinese_law"
  assert pair({"text": ENGLISH}) is None
  assert pair({"text": "1 + 2", "topic": "law"}) is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("rules: []", "must hold a list under 'rules'"),
    ("rule: [{by: path}]", "must hold a list under 'rules'"),
    ("rules: [{by: magic}]", "rule 1: 'by' must be one of column, url"),
    ("rules: [path]", "rule 1: 'by' must be one of"),
    ("rules: [{by: column}]", "rule 1: by column needs 'column'"),
    ("rules: [{by: path, label: 1}]", "rule 1: unknown key 'label'"),
    ("rules: [{by: url}]", "rule 1: by url needs 'labels'"),
    ("rules: [{by: url, labels: }]", "rule 1: by url needs 'labels'"),
    ("rules: [{by: url, labels: [a]}]", "rule 1: 'labels' must be"),
    ("rules: [{by: language, at_least: x}]", "rule 1: at_least must be"),
    ("rules: [{by: language}, {by: topic}]", "rule 2: by topic needs 'model'"),
    ("rules: [{by: both, fine: {by: url}}]", "rule 1, coarse: 'by' must be"),
    ("rules: [{by: topic, model: none}]", "none: no topic classifier"),
  ],
)
def test_errors_in_a_file_of_rules(rule, text, message):
  with pytest.raises(UserError, match=message) as error:
    rule(text)
  assert "\n" not in str(error.value)


# --- The report --------------------------------------------------------------


def test_report_adds():
  rng = random.Random(0)
  whole, parts = LabelReport(), [LabelReport(), LabelReport()]
  counted = {"a": [], "b": []}
  for n in range(50):
    entry = (rng.choice("ab"), rng.randrange(100), rng.random())
    counted[entry[0]].append(entry[1:])
    whole.add(*entry)
    parts[n % 2].add(*entry)
  for row in whole.rows():
    own = counted[row["label"]]
    assert row["documents"] == len(own)
    assert row["bytes"] == sum(size for size, _ in own)
    assert row["confidence"] == pytest.approx(np.mean([c for _, c in own]))
  total = LabelReport()
  for part in parts:
    total.merge(json.loads(json.dumps(part.rows())))
  assert [pytest.approx(row) for row in whole.rows()] == total.rows()


def test_command_reports(tmp_path):
  records = [{"text": ENGLISH}, {"text": CHINESE}, {"text": "1 + 1"}]
  lines = [json.dumps(record) for record in records]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  (tmp_path / "rules.yaml").write_text("rules: [{by: language}]")
  command = [sys.executable, "-m", "data.labels", f"--files={tmp_path}/a.jsonl"]
  done = subprocess.run(
    [*command, f"--rules={tmp_path}/rules.yaml"], capture_output=True, text=True
  )
  assert [line.split()[:2] for line in done.stdout.splitlines()] == [
    ["label", "documents"],
    ["en", "1"],
    ["unlabelled", "1"],
    ["zh", "1"],
  ]
  for wrong in ("--rules=none.yaml", "--rule=x"):
    done = subprocess.run([*command, wrong], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_columns_inside_objects(rule):
  inner = rule("rules: [{by: column, column: meta.set}]")
  for record in (
    {"meta": {"set": "wiki"}},
    {"meta": '{"set": "wiki"}'},
    {"meta.set": "wiki", "meta": {"set": "other"}},
  ):
    assert inner(record) == Label("wiki", 1.0)
    assert columns_in(record, ["meta.set", "meta.other"]) == {"meta.set"}
  for record in ({}, {"meta": None}, {"meta": "{"}, {"meta": {"set": None}}):
    assert inner(record) is None
  deep = rule("rules: [{by: url, column: a.b.c, labels: {x.org: code}}]")
  assert deep({"a.b": {"c": "https://x.org/1"}}).name == "code"
  dotted = {"rules": 0, "a": {"b.c": "x.org"}}
  assert deep(dotted).name == "code"


def test_columns_of_rules(tmp_path):
  path = tmp_path / "rules.yaml"
  path.write_text(
    """
rules:
  - {by: column, column: meta.set}
  - {by: url, labels: {x.org: code}}
  - by: both
    coarse: {by: path, column: file, labels: {"*.py": code}}
    fine: {by: language}
"""
  )
  columns = rule_columns(str(path))
  assert columns == ["meta.set", "url", "file"]
  assert stored_columns(columns) == ["meta", "meta.set", "url", "file"]


def test_a_column_that_no_record_has_is_an_error(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text('{"text": "t", "meta": {"set": "wiki"}}\n')
  rules = tmp_path / "rules.yaml"
  command = [f"--files={tmp_path}/a.jsonl", f"--rules={rules}"]
  rules.write_text("rules: [{by: column, column: meta.set}]")
  assert labels.main(command) == 0
  assert "wiki" in capsys.readouterr().out
  rules.write_text("rules: [{by: column, column: meta.sets}]")
  assert labels.main(command) == 2
  assert "no record has the column meta.sets" in capsys.readouterr().err


def test_examples_are_labelled_and_written(tmp_path, capsys):
  records = [
    {"prompt": "1 + 1 =", "completion": " 2", "subject": "math", "id": 7},
    {
      "messages": [
        {"role": "user", "content": "Héllo?"},
        {"role": "assistant", "content": "Hi."},
      ],
      "subject": "talk",
    },
    {"text": "plain", "subject": "none"},
    {"prompt": "a", "completion": "b", "subject": "out"},
  ]
  (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
  (tmp_path / "rules.yaml").write_text(
    "rules:\n  - {by: column, column: subject, labels: {math: m, talk: t/u}}\n"
    "keep: [column subject != out]\n"
  )
  out = tmp_path / "out.jsonl"
  command = [
    f"--files={tmp_path}/in.jsonl",
    f"--rules={tmp_path}/rules.yaml",
    f"--out={out}",
  ]
  assert labels.main(command) == 0
  found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
  assert found == [
    {**record, "domain": domain}
    for record, domain in zip(records, ("m", "t/u", None))
  ]
  assert "t/u" in capsys.readouterr().out
  assert labels.main(command) == 2
  assert "out.jsonl exists; name a new file" in capsys.readouterr().err
  command[-1] = f"--out={tmp_path}/none/out.jsonl"
  assert labels.main(command) == 2
  assert "No such file or directory" in capsys.readouterr().err
