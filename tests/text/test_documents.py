"""Which domain a label means, and which documents are kept."""

import dataclasses

import pytest

from edl_jax.config import DataConfig, UserError
from edl_jax.text.documents import (
  Document,
  DomainNames,
  Gatherer,
  SupervisedExample,
)
from edl_jax.text.taxonomy import UNLABELLED


@pytest.fixture
def taxonomy_file(tmp_path):
  path = tmp_path / "taxonomy.yaml"
  path.write_text(
    "domains: [{fine: b, coarse: up, weight: 2}, {fine: a}]\n"
    "unlabelled: {weight: 0.5}\n"
  )
  return str(path)


def test_without_a_declaration_every_label_is_a_domain():
  domains = DomainNames(DataConfig())
  labels = ("g/b", "a", "b", "h/c", "g/b")
  assert [domains.add(label, "here") for label in labels] == list("babcb")
  # The coarse name may come with any of a domain's labels; sorted by name.
  assert domains.taxonomy({"b", "a", "c"}, "here").names == ("a", "g/b", "h/c")
  # A domain whose documents were all dropped is none.
  assert domains.taxonomy({"a", "c"}, "here").names == ("a", "h/c")


def test_declared_domains_select_order_and_regroup():
  domains = DomainNames(DataConfig(domains=("x/b", "a")))
  assert domains.add("g/b", "here") == "b"
  assert domains.add("h/a", "here") == "a"
  with pytest.raises(UserError, match=r"here: unknown domain 'c'; .* x/b, a"):
    domains.add("c", "here")
  # The declared coarse name holds; without one, that of the source.
  assert domains.taxonomy({"a", "b"}, "there").names == ("x/b", "h/a")
  with pytest.raises(UserError, match=r"empty domain 'b': no text in there"):
    domains.taxonomy({"a"}, "there")


def test_contradicting_coarse_names_must_be_decided():
  domains = DomainNames(DataConfig())
  domains.add("g/a", "line 1")
  domains.add("a", "line 2")
  with pytest.raises(UserError, match=r"line 3: .*'h' here and to 'g' before"):
    domains.add("h/a", "line 3")
  decided = DomainNames(DataConfig(domains=("h/a",)))
  for label in ("g/a", "a", "h/a"):
    assert decided.add(label, "here") == "a"
  assert decided.taxonomy({"a"}, "here").names == ("h/a",)


def test_taxonomy_file_decides_everything(taxonomy_file):
  domains = DomainNames(DataConfig(taxonomy=taxonomy_file))
  assert domains.add("g/b", "here") == "b"
  for label in (None, "", UNLABELLED):
    assert domains.add(label, "here") == UNLABELLED
  with pytest.raises(
    UserError, match=r"unknown domain 'c'; data\.taxonomy has"
  ):
    domains.add("c", "here")
  whole = domains.taxonomy({"a", "b", UNLABELLED}, "here")
  assert whole.names == ("up/b", "a")
  assert whole.sources == ("b", "a", UNLABELLED)
  assert whole.weights == (2, 1, 0.5)
  labelled = domains.taxonomy({"a", "b"}, "here")
  assert labelled.sources == ("b", "a") and labelled.weights == (2, 1)


@pytest.mark.parametrize("label", [None, "", UNLABELLED, "g/" + UNLABELLED])
def test_text_without_a_label_needs_a_taxonomy(label):
  with pytest.raises(UserError, match=r"^here: "):
    DomainNames(DataConfig()).add(label, "here")


def test_no_text_at_all():
  with pytest.raises(UserError, match=r"data\.files=x: no text in any"):
    DomainNames(DataConfig()).taxonomy([], "x")


def test_gatherer_drops_what_is_empty_known_or_too_much():
  gathered = Gatherer(max_characters=10)
  for text, domain in (
    ("123456", "a"),
    ("", "a"),
    (" \n", "a"),
    ("123456", "b"),
    ("7890abc", "a"),
    ("more", "a"),
    ("other", "b"),
  ):
    gathered.add(Document(text, domain, f"origin of {text}"))
  assert gathered.documents == {
    "a": [
      Document("123456", "a", "origin of 123456"),
      Document("7890", "a", "origin of 7890abc"),
    ],
    "b": [Document("other", "b", "origin of other")],
  }
  assert not gathered.has_room("a") and gathered.has_room("b")


def example(text, *cuts, domain="a"):
  return SupervisedExample(text, domain, text, cuts)


def test_parts_of_examples_are_prompts_and_completions_in_turn():
  assert Document("abc", "a", "").parts() == [("abc", True)]
  assert example("abcdef", 1, 3, 4).parts() == [
    *(("a", False), ("bc", True)),
    *(("d", False), ("ef", True)),
  ]
  assert example("abc", 0).parts() == [("", False), ("abc", True)]
  assert example("abc", 1, 2).parts()[-1] == ("c", False)


def test_digests_tell_apart_what_the_loss_counts():
  same = [example("abc", 1), dataclasses.replace(example("abc", 1), origin="x")]
  other = [
    *(Document("abc", "a", ""), example("abc", 2), example("abd", 1)),
    dataclasses.replace(example("abc", 1), special=True),
    dataclasses.replace(example("abc", 1), end="</s>"),
  ]
  digests = [each.digest() for each in (*same, *other)]
  assert digests[0] == digests[1]
  assert len(set(digests)) == 1 + len(other)


def test_gatherer_keeps_examples_whole():
  gathered = Gatherer(max_characters=5)
  for text in ("abc", "defg", "hij"):
    gathered.add(example(text, 1))
  assert [each.text for each in gathered.documents["a"]] == ["abc", "defg"]
