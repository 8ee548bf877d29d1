"""What counts as a finding, and that readers take what fuzzing begins with."""

import importlib

import pytest

from edl_jax.config import UserError
from tests.fuzz.__main__ import READERS, feeder


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_in_one_line(name, tmp_path):
  reader = READERS[name]
  read = getattr(importlib.import_module(reader.module), reader.function)
  feed = feeder(reader, read, tmp_path)
  for seed in reader.seeds:
    for content in (seed.encode(), seed.encode()[:-7], b"\xff\x00{"):
      feed(content)


def test_other_errors_and_longer_refusals_are_findings(tmp_path):
  def read(path):
    with open(path) as file:
      text = file.read()
    raise KeyError(text) if text == "key" else UserError(text)

  feed = feeder(READERS["rules"], read, tmp_path)
  feed(b"one line")
  with pytest.raises(KeyError):
    feed(b"key")
  with pytest.raises(AssertionError, match="several lines"):
    feed(b"one\ntwo")
