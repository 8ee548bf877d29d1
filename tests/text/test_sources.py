import ast
import json
import math
import re
import sysconfig
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from data.export import export
from edl_jax.config import DataConfig, UserError
from edl_jax.text import embedded as embedded_lib
from edl_jax.text.arithmetic import worked_problems
from edl_jax.text.mixture import load_corpus
from edl_jax.text.sources import read_documents

CAP = 40_000


@pytest.fixture(scope="module")
def embedded():
  return read_documents(DataConfig(max_characters_per_domain=CAP))


def write(path, *records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return str(path)


def by_domain(documents, domain):
  return [d for d in documents if d.domain == domain]


# --- The embedded mixture ----------------------------------------------------


def test_embedded_domains_are_named_by_place(embedded):
  taxonomy, documents = embedded
  assert taxonomy.names == (
    "code/c_headers",
    "code/python_source",
    "math/arithmetic",
    "prose/documentation",
    "prose/legal",
    "tables/unicode",
  )
  assert {d.domain for d in documents} == {
    n.split("/")[1] for n in taxonomy.names
  }


def test_embedded_mixture_respects_the_cap_and_has_no_duplicates(embedded):
  taxonomy, documents = embedded
  for fine in taxonomy.fine:
    own = by_domain(documents, fine)
    # Every machine has more of each than this, so that the cap is met exactly.
    assert sum(len(d.text) for d in own) == CAP
    assert len({d.origin for d in own}) >= 3
  assert len({d.text for d in documents}) == len(documents)


def test_embedded_mixture_is_deterministic(embedded):
  assert read_documents(DataConfig(max_characters_per_domain=CAP)) == embedded


def test_python_source_is_the_standard_library(embedded):
  root = Path(sysconfig.get_path("stdlib"))
  for document in by_domain(embedded[1], "python_source"):
    path = root / document.origin.removeprefix("python/")
    assert path.read_text(encoding="utf-8").startswith(document.text)
    folders = path.relative_to(root).parts[:-1]
    assert not {"test", "tests", "site-packages", "pydoc_data"} & set(folders)


def test_docstrings_share_the_origin_of_their_source():
  data = DataConfig(
    domains=("python_source", "documentation"),
    max_characters_per_domain=600_000,
  )
  _, documents = read_documents(data)
  code = {d.origin: d.text for d in by_domain(documents, "python_source")}
  prose = {d.origin: d.text for d in by_domain(documents, "documentation")}
  shared = [o for o in code.keys() & prose.keys() if _parses(code[o])]
  assert shared
  for origin in shared:
    docstring = ast.get_docstring(ast.parse(code[origin]))
    assert docstring is None or docstring in prose[origin]


def test_topics_of_help_are_prose_only():
  data = DataConfig(
    domains=("documentation",), max_characters_per_domain=90_000
  )
  _, prose = read_documents(data)
  assert any("pydoc_data" in document.origin for document in prose)
  everything = DataConfig(
    domains=("python_source",), max_characters_per_domain=10**9
  )
  _, code = read_documents(everything)
  assert any(document.origin == "python/pydoc.py" for document in code)
  assert not any("pydoc_data" in document.origin for document in code)


def _parses(source):
  try:
    ast.parse(source)
  except SyntaxError:  # Cut at the cap.
    return False
  return True


def test_headers_of_packages_replace_those_of_the_interpreter(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(embedded_lib, "_HEADERS", tmp_path / "not-installed")
  _, documents = read_documents(DataConfig(domains=("c_headers",)))
  assert len(documents) > 10
  assert all(d.origin.startswith("packages/") for d in documents)
  assert any("numpy" in document.origin for document in documents)


def test_copies_of_a_licence_share_an_origin():
  data = DataConfig(domains=("legal",))
  _, documents = read_documents(data)
  assert len({d.origin for d in documents}) < len(documents)


def test_declared_domains_select_order_and_regroup():
  taxonomy, documents = read_documents(
    DataConfig(
      domains=("data/unicode", "arithmetic"), max_characters_per_domain=9000
    )
  )
  assert taxonomy.names == ("data/unicode", "math/arithmetic")
  assert {d.domain for d in documents} == {"unicode", "arithmetic"}


def test_unknown_embedded_domain_is_named():
  with pytest.raises(UserError, match=r"no domain 'poems'.*math/arithmetic"):
    read_documents(DataConfig(domains=("arithmetic", "poems")))


def test_export_carries_the_same_corpus(tmp_path):
  data = DataConfig(max_characters_per_domain=CAP)
  path = str(tmp_path / "corpus.jsonl")
  export(data, path)
  copy = DataConfig(files=path, max_characters_per_domain=CAP)
  assert load_corpus(copy) == load_corpus(data)
  with pytest.raises(UserError, match="File exists"):
    export(data, path)


# --- Generated arithmetic ----------------------------------------------------


def test_every_worked_step_is_right():
  documents = list(islice(worked_problems(), 400))
  assert len(set(documents)) == 400
  checked = 0
  for line in "\n".join(documents).splitlines():
    if divisor := re.match(r"gcd\((\d+), (\d+)\) = (\d+)$", line):
      a, b, c = map(int, divisor.groups())
      assert math.gcd(a, b) == c
      checked += 1
    elif "x" not in line:
      number = r"[-\d][-\d +*/().]*"
      for equation in re.findall(f"{number}(?: = {number})+", line):
        sides = equation.rstrip(". ").split(" = ")
        assert len(set(map(_value, sides))) == 1, line
        checked += 1
  assert checked > 3000


def test_every_root_solves_its_equation():
  solved = 0
  for document in islice(worked_problems(), 400):
    for problem in document.split("\n\n")[1:]:
      if equation := re.search(r"Solve (.*?)( for x| by factoring)", problem):
        left, right = equation[1].split(" = ")
        roots = re.findall(r"(?m)(?:^|: |or )x = (-?\d+)", problem)
        assert roots
        for root in map(int, roots):
          assert _value(left, root) == _value(right, root), problem
          solved += 1
  assert solved > 300


def _value(expression, x=0):
  expression = re.sub(r"(\d)x", r"\1 * x", expression).replace("^", "**")
  expression = re.sub(r"\d+(\.\d+)?", r"Fraction('\g<0>')", expression)
  return eval(expression, {"Fraction": Fraction, "x": Fraction(x)})


# --- JSONL -------------------------------------------------------------------


def test_json_lines(tmp_path):
  write(
    tmp_path / "b.jsonl",
    {"text": "two", "domain": "web"},
    "",
    {"text": "one", "domain": "web"},
    {"text": " \n", "domain": "web"},
  )
  write(
    tmp_path / "a.jsonl",
    {"text": "zwei\u2028", "domain": "de/books"},
    {"text": "one", "domain": "books"},
    {"text": "drei", "domain": "books", "origin": "shelf"},
  )
  taxonomy, documents = read_documents(DataConfig(files=f"{tmp_path}/*.jsonl"))
  assert taxonomy.names == ("de/books", "web")
  assert [(d.domain, d.text, d.origin) for d in documents] == [
    ("books", "zwei\u2028", "zwei\u2028"),
    ("books", "one", "one"),
    ("books", "drei", "shelf"),
    # "one" again is a duplicate, in another domain too.
    ("web", "two", "two"),
  ]


def test_json_lines_are_cut_at_the_cap(tmp_path):
  files = write(
    tmp_path / "a.jsonl",
    *({"text": f"{n:010}", "domain": "x"} for n in range(5)),
    {"text": "short", "domain": "y"},
  )
  _, documents = read_documents(
    DataConfig(files=files, max_characters_per_domain=25)
  )
  assert [len(d.text) for d in documents] == [10, 10, 5, 5]


def test_byte_order_mark_is_accepted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "t", "domain": "d"}\n')
  assert read_documents(DataConfig(files=str(path)))[0].fine == ("d",)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{'text': 1}", "not JSON"),
    ('{"text": "cut', "not JSON"),
    ("9" * 5000, "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "not an object with the keys text and domain, but list"),
    ('{"domain": "a"}', "key 'text' is missing"),
    ('{"text": "t"}', "key 'domain' is missing"),
    ('{"text": 3, "domain": "a"}', "text must be a string, not int"),
    ('{"text": "t", "domain": null}', "domain must be a string"),
    ('{"text": "t", "domain": "a", "origin": 1}', "origin must be a string"),
    ('{"text": "t", "domain": "c"}', "unknown domain 'c'; .* a, g/b"),
    ('{"text": "t", "domain": "x/y/a"}', "must be fine or coarse/fine"),
    ('{"text": "t", "domain": ""}', "must be fine or coarse/fine"),
    (r'{"text": "\ud800", "domain": "a"}', "half a surrogate pair"),
    (b'{"text": "\xff", "domain": "a"}', "not UTF-8"),
  ],
)
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "a.jsonl"
  good = b'{"text": "good", "domain": "a"}\n'
  bad = line if isinstance(line, bytes) else line.encode()
  path.write_bytes(good + b"\n" + bad + b"\n" + good)
  data = DataConfig(files=str(path), domains=("a", "g/b"))
  with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}") as error:
    read_documents(data)
  assert "\n" not in str(error.value)


def test_contradicting_coarse_names(tmp_path):
  records = [
    {"text": "1", "domain": "g/a"},
    {"text": "2", "domain": "a"},
    {"text": "3", "domain": "h/a"},
  ]
  files = write(tmp_path / "a.jsonl", *records)
  with pytest.raises(UserError, match=r"a\.jsonl:3: .*'h' here and to 'g'"):
    read_documents(DataConfig(files=files))
  taxonomy, documents = read_documents(
    DataConfig(files=files, domains=("h/a",))
  )
  assert taxonomy.names == ("h/a",)
  assert len(documents) == 3


def test_empty_domain_and_missing_files(tmp_path):
  files = write(tmp_path / "a.jsonl", {"text": "t", "domain": "a"})
  with pytest.raises(UserError, match="empty domain 'b'"):
    read_documents(DataConfig(files=files, domains=("a", "b")))
  with pytest.raises(UserError, match=r"nothing\*: no such file"):
    read_documents(DataConfig(files=f"{tmp_path}/nothing*"))
  blank = write(tmp_path / "blank.jsonl", "")
  with pytest.raises(UserError, match="no text"):
    read_documents(DataConfig(files=blank))
