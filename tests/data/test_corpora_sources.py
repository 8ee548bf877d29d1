"""The table of sources: complete, and every entry one that can be used."""

import re

import pytest

from data import corpora_packages
from data.corpora_extract import EXTRACTORS
from data.corpora_sources import MIXTURES, Source


@pytest.mark.parametrize("mixture", MIXTURES)
def test_labels_are_unique(mixture):
  fine = [source.fine for source in MIXTURES[mixture]]
  assert len(set(fine)) == len(fine)


@pytest.mark.parametrize(
  "source",
  [source for sources in MIXTURES.values() for source in sources],
  ids=lambda source: source.fine,
)
def test_source_can_be_used(source):
  assert source.domain.count("/") == 1
  assert source.extractor in EXTRACTORS
  assert source.repeats in ("lines", "paragraphs", "none")
  assert source.megabytes > 0
  re.compile(source.paths)
  for package in source.packages:
    client, _, name = package.partition(":")
    assert client in corpora_packages._COMMANDS and name


def test_fine_and_coarse_labels():
  source = Source("chinese/songs", ("pip:x",), r"\.txt$", "plain")
  assert source.fine == "songs" and source.is_chinese
  assert not Source("english/songs", ("pip:x",), "", "plain").is_chinese
