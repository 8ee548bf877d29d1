"""Streams: large windows, names in any case, packages that are missing."""

import gzip

import pytest
import zstandard

from edl_jax.config import UserError
from edl_jax.text.streams import first_bytes, need_package, open_stream


def test_the_largest_window(tmp_path):
  # The header asks for a window of 2 GiB, as `zstd --long=31` writes it; then
  # one raw block, the last, of three bytes.
  content = bytes.fromhex("28b52ffd00a8190000") + b"abc"
  assert zstandard.get_frame_parameters(content).window_size == 2**31
  path = tmp_path / "a.zst"
  path.write_bytes(content)
  with open_stream(str(path)) as stream:
    assert stream.read() == b"abc"


def test_suffixes_in_any_case(tmp_path):
  for name, compress in (
    ("a.GZ", gzip.compress),
    ("a.Zst", zstandard.compress),
    ("a.TXT", bytes),
  ):
    (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf \n{x"))
    assert first_bytes(str(tmp_path / name)) == b"{x"
  (tmp_path / "b.gz").write_bytes(b"no archive")
  assert first_bytes(str(tmp_path / "b.gz")) == b""


def test_missing_package_is_one_line():
  with pytest.raises(
    UserError, match="reading X needs the package no_such: pip"
  ):
    need_package("no_such.part", "reading X")
