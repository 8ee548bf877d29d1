import json

import pytest

from edl_jax.config import UserError
from edl_jax.text.taxonomy import Taxonomy, load_taxonomy


def load(tmp_path, text):
  path = tmp_path / "taxonomy.yaml"
  path.write_text(text, encoding="utf-8")
  return load_taxonomy(str(path))


def test_file(tmp_path):
  taxonomy = load(
    tmp_path,
    """
domains:
  - {fine: wordnet, coarse: english, weight: 2.5}
  - {fine: sympy, coarse: math}
  - {fine: code, weight: 0}
  - {fine: austen, coarse: english}
unlabelled: {weight: 3}
""",
  )
  assert taxonomy.fine == ("wordnet", "sympy", "code", "austen")
  assert taxonomy.coarse == ("english", "math", "code")
  assert taxonomy.parent == (0, 1, 2, 0)
  assert taxonomy.weights == (2.5, 1, 0, 1, 3)
  assert taxonomy.sources == (*taxonomy.fine, "unlabelled")
  assert taxonomy.labels == (0, 1, 2, 3, -1)
  assert taxonomy.names == (
    "english/wordnet",
    "math/sympy",
    "code",
    "english/austen",
  )
  saved = json.loads(json.dumps(taxonomy.to_dict()))
  assert Taxonomy.from_dict(saved) == taxonomy


@pytest.mark.parametrize(
  ("line", "unlabelled"),
  [("", False), ("unlabelled: false", False), ("unlabelled: true", True)],
)
def test_unlabelled_rows_are_a_choice(tmp_path, line, unlabelled):
  taxonomy = load(tmp_path, f"domains: [{{fine: a}}]\n{line}")
  assert taxonomy.unlabelled is unlabelled
  assert len(taxonomy.weights) == len(taxonomy.labels) == 1 + unlabelled


def test_without_a_file_it_is_saved_as_before():
  saved = {"fine": ["c", "d"], "coarse": ["code", "d"], "parent": [0, 1]}
  taxonomy = Taxonomy.from_names(["code/c", "d"])
  assert taxonomy.to_dict() == saved
  assert Taxonomy.from_dict(saved) == taxonomy


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("domains: [", r"yaml:1: not YAML"),
    ("a: 1\nb: {\n", r"yaml:3: not YAML"),
    ("- a", "must hold 'key: value' lines, not list"),
    ("", "must hold 'key: value' lines, not NoneType"),
    ("domain: [a]", "unknown key 'domain'; known: domains, unlabelled"),
    ("domains: []", "'domains' must be a list"),
    ("unlabelled: true", "'domains' must be a list"),
    ("domains: [{fine: a}, b]", "domain 2: must be .* not 'b'"),
    ("domains: [{coarse: a}]", "domain 1: 'fine' must be a name"),
    ("domains: [{fine: ''}]", "domain 1: 'fine' must be a name"),
    ("domains: [{fine: 3}]", "domain 1: 'fine' must be a name .* not 3"),
    ("domains: [{fine: a/b}]", "domain 1: 'fine' must be a name without '/'"),
    ("domains: [{fine: a, coarse: b/c}]", "'coarse' must be a name"),
    ("domains: [{fine: a, wait: 1}]", "domain 1: unknown key 'wait'"),
    ("domains: [{fine: a}, {fine: a, coarse: b}]", "domain 2: 'a' occurs"),
    ("domains: [{fine: unlabelled}]", "the name 'unlabelled' is reserved"),
    ("domains: [{fine: a, weight: -1}]", "domain 1: weight must be .* not -1"),
    ("domains: [{fine: a, weight: .inf}]", "weight must be .* not inf"),
    ("domains: [{fine: a, weight: true}]", "weight must be .* not True"),
    ("domains: [{fine: a, weight: 0}]", "all weights are zero"),
    ("domains: [{fine: a}]\nunlabelled: 3", "'unlabelled' must be .* not 3"),
    ("domains: [{fine: a}]\nunlabelled: {w: 3}", "unlabelled: unknown key 'w'"),
  ],
)
def test_errors_name_file_and_entry(tmp_path, text, message):
  with pytest.raises(UserError, match=message) as error:
    load(tmp_path, text)
  assert "taxonomy.yaml" in str(error.value)
  assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
  with pytest.raises(UserError, match=r"none\.yaml: No such file"):
    load_taxonomy(str(tmp_path / "none.yaml"))
