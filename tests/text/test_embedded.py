"""The embedded mixture: labelled by place, capped, the same on every start."""

import ast
import sysconfig
from pathlib import Path

import pytest

from edl_jax.config import DataConfig, UserError
from edl_jax.text import embedded as embedded_lib
from edl_jax.text.sources import read_documents

CAP = 40_000


@pytest.fixture(scope="module")
def embedded():
  return read_documents(DataConfig(max_characters_per_domain=CAP))


def by_domain(documents, domain):
  return [d for d in documents if d.domain == domain]


def test_embedded_domains_are_named_by_place(embedded):
  taxonomy, documents, _ = embedded
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
  taxonomy, documents, _ = embedded
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
  _, documents, _ = read_documents(data)
  code = {d.origin: d.text for d in by_domain(documents, "python_source")}
  prose = {d.origin: d.text for d in by_domain(documents, "documentation")}
  prose.popitem()  # cut at max_characters_per_domain
  shared = [o for o in code.keys() & prose.keys() if _parses(code[o])]
  assert shared
  for origin in shared:
    docstring = ast.get_docstring(ast.parse(code[origin]))
    assert docstring is None or docstring in prose[origin]


def test_topics_of_help_are_prose_only():
  data = DataConfig(
    domains=("documentation",), max_characters_per_domain=90_000
  )
  _, prose, _ = read_documents(data)
  assert any("pydoc_data" in document.origin for document in prose)
  everything = DataConfig(
    domains=("python_source",), max_characters_per_domain=10**9
  )
  _, code, _ = read_documents(everything)
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
  _, documents, _ = read_documents(DataConfig(domains=("c_headers",)))
  assert len(documents) > 10
  assert all(d.origin.startswith("packages/") for d in documents)
  assert any("numpy" in document.origin for document in documents)


def test_packages_that_other_platforms_require_add_no_text(
  tmp_path, monkeypatch
):
  packages = {
    "top": [
      "needed>=1",
      'foreign; sys_platform == "none"',
      'more; extra == "x"',
    ],
    "needed": [],
    "foreign": [],
    "more": [],
    "unrelated": [],
  }
  for name, requires in packages.items():
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "LICENSE").write_text(f"The licence of {name}.\n")
    (info / "RECORD").write_text(f"{info.name}/LICENSE,,\n")
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(embedded_lib, "_REQUIRED", ("top",))
  _, documents, _ = read_documents(DataConfig(domains=("legal",)))
  texts = {d.text for d in documents if d.text.startswith("The licence of")}
  assert texts == {"The licence of top.\n", "The licence of needed.\n"}


def test_copies_of_a_licence_share_an_origin():
  data = DataConfig(domains=("legal",))
  _, documents, _ = read_documents(data)
  assert len({d.origin for d in documents}) < len(documents)


def test_declared_domains_select_order_and_regroup():
  taxonomy, documents, _ = read_documents(
    DataConfig(
      domains=("data/unicode", "arithmetic"), max_characters_per_domain=9000
    )
  )
  assert taxonomy.names == ("data/unicode", "math/arithmetic")
  assert {d.domain for d in documents} == {"unicode", "arithmetic"}


def test_unknown_embedded_domain_is_named():
  with pytest.raises(UserError, match=r"no domain 'poems'.*math/arithmetic"):
    read_documents(DataConfig(domains=("arithmetic", "poems")))
