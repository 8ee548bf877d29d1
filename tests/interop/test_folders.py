"""Checks of a folder to write."""

import pytest

from edl_jax.config import UserError
from edl_jax.interop import folders


def test_a_new_folder(tmp_path):
  folders.check_new(str(tmp_path / "new"))
  with pytest.raises(UserError, match="exists; remove it or choose another"):
    folders.check_new(str(tmp_path))
  with pytest.raises(UserError, match="name a folder on this machine"):
    folders.check_new("gs://bucket/new")


def test_room(tmp_path):
  out = str(tmp_path / "deep" / "new")
  folders.check_room(out, 1000)
  with pytest.raises(UserError, match="needs 1,000,000,000,000 MB, but"):
    folders.check_room(out, 10**18)
