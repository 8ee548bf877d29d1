"""A run's text is read again, and must be what it was."""

import dataclasses

import pytest

from edl_jax.analysis.run_text import read_corpus
from edl_jax.checkpoint import Provenance
from edl_jax.config import DataConfig, Experiment, UserError
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import byte_tokenizer

EXPERIMENT = Experiment(
  data=DataConfig(domains=("legal", "unicode"), max_characters_per_domain=9_000)
)


@pytest.fixture(scope="module")
def provenance():
  corpus = load_corpus(EXPERIMENT.data)
  return Provenance(
    EXPERIMENT, corpus.taxonomy, byte_tokenizer(), corpus.content_hash
  )


def test_the_same_text(provenance):
  assert read_corpus(provenance, "x") == load_corpus(EXPERIMENT.data)


def test_text_that_has_changed(provenance):
  other = dataclasses.replace(provenance, content_hash="other")
  with pytest.raises(UserError) as raised:
    read_corpus(other, "x")
  assert str(raised.value) == (
    "the text of --workdir=x (of installed packages) has changed since its"
    " training (content hash differs); restore it, or train again"
  )


def test_text_that_is_gone(provenance):
  data = dataclasses.replace(EXPERIMENT.data, files="/nowhere/*.jsonl")
  gone = dataclasses.replace(
    provenance, experiment=dataclasses.replace(EXPERIMENT, data=data)
  )
  with pytest.raises(UserError) as raised:
    read_corpus(gone, "x")
  message = str(raised.value)
  assert message.startswith(
    "the text of --workdir=x cannot be read: data.files"
  )
  assert "\n" not in message
