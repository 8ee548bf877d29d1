"""One trained run for all tests of carving."""

import pytest

from tests.analysis.carve.run_cases import train_run, write_texts


@pytest.fixture(scope="session")
def carve_files(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("carve_text") / "texts.jsonl")


@pytest.fixture(scope="session")
def carve_workdir(tmp_path_factory, carve_files):
  return train_run(tmp_path_factory.mktemp("carve") / "run", carve_files)
