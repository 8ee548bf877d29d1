"""The cache folder: where it is, and what happens when it fails."""

from pathlib import Path

import pytest

from edl_jax import cache


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"EDL_JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/edl_jax"),
    ({"HOME": "/c"}, "/c/.cache/edl_jax"),
  ],
)
def test_folder_follows_the_environment(monkeypatch, settings, expected):
  for name in ("EDL_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  for name, value in settings.items():
    monkeypatch.setenv(name, value)
  assert cache.cache_directory() == Path(expected)


def test_key_depends_on_every_part():
  parts = [("a", "b"), ("b", "a"), ("ab",), ("a", "b", 1), ("a", "b", 1.5)]
  keys = [cache.cache_key(*each) for each in parts]
  assert len(set(keys)) == len(parts)
  assert cache.cache_key("a", "b") == keys[0]


def test_files_are_read_back(monkeypatch, tmp_path):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "made" / "here"))
  assert cache.read_cache("a.npz") is None
  cache.write_cache("a.npz", b"first")
  cache.write_cache("a.npz", b"second")
  assert cache.read_cache("a.npz") == b"second"
  assert len(list((tmp_path / "made" / "here").iterdir())) == 1


def test_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
  (tmp_path / "file").write_text("in the way")
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "file"))
  cache.write_cache("a.npz", b"content")
  assert cache.read_cache("a.npz") is None


def test_damaged_and_renamed_files_are_not_read(monkeypatch, tmp_path):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path))
  cache.write_cache("a", b"content")
  whole = (tmp_path / "a").read_bytes()
  for bit in range(8 * len(whole)):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    (tmp_path / "a").write_bytes(damaged)
    assert cache.read_cache("a") is None
  for size in range(len(whole)):
    (tmp_path / "a").write_bytes(whole[:size])
    assert cache.read_cache("a") is None
  (tmp_path / "a").write_bytes(whole)
  assert cache.read_cache("a") == b"content"
  (tmp_path / "a").rename(tmp_path / "b")
  assert cache.read_cache("b") is None
