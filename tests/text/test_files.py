"""Files by name: brackets, markers, folders that say something."""

import pytest

from edl_jax.config import UserError
from edl_jax.text.files import (
  domain_by_folder,
  find_files,
  partitions,
  suffix_of,
)


def made(tmp_path, *names, content="x"):
  for name in names:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def found(tmp_path, pattern):
  root, paths = find_files(f"{tmp_path}/{pattern}", "data.files")
  return (
    root.removeprefix(str(tmp_path)).lstrip("/"),
    [path.removeprefix(f"{tmp_path}/") for path in paths],
  )


@pytest.mark.parametrize("name", ["a[2024].jsonl", "a?.jsonl", "a*.jsonl"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
  made(tmp_path, name, "ab.jsonl", "a2.jsonl")
  assert found(tmp_path, name) == ("", [name])


def test_folders_that_exist_are_no_pattern(tmp_path):
  made(tmp_path, "x[1]/y*/a.jsonl", "x[1]/yy/b.jsonl", "x1/y/c.jsonl")
  assert found(tmp_path, "x[1]/y*/*.jsonl") == (
    "x[1]/y*",
    ["x[1]/y*/a.jsonl"],
  )
  assert found(tmp_path, "x[1]/**/*.jsonl") == (
    "x[1]",
    ["x[1]/y*/a.jsonl", "x[1]/yy/b.jsonl"],
  )
  # A class of characters still is one where no such folder exists.
  assert found(tmp_path, "x[0-9]/*/*.jsonl") == ("", ["x1/y/c.jsonl"])


def test_markers_and_empty_files_are_left_out(tmp_path):
  made(
    tmp_path,
    "_SUCCESS",
    "_committed_12",
    "part-0",
    ".part-0.crc",
    "part-1.parquet.crc",
    "_own.jsonl",
    "_temporary/0/part-2",
    "_delta_log/000.json",
  )
  made(tmp_path, "part-3", content="")
  assert found(tmp_path, "**")[1] == ["_own.jsonl", "part-0"]
  # Whoever names a file means it.
  assert found(tmp_path, "_SUCCESS")[1] == ["_SUCCESS"]


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("none", "no such file"),
    ("n*", "no such file"),
    ("empty*", "every file is empty"),
    ("folder", "is a folder; name its files, such as .*folder/.*"),
  ],
)
def test_nothing_to_read(tmp_path, pattern, message):
  made(tmp_path, "empty1", "empty2", content="")
  (tmp_path / "folder").mkdir()
  with pytest.raises(UserError, match=rf"data\.files=.*: {message}"):
    find_files(f"{tmp_path}/{pattern}", "data.files")


def test_home(tmp_path, monkeypatch):
  made(tmp_path, "a.txt")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert find_files("~/*.txt", "data.files")[1] == [f"{tmp_path}/a.txt"]


def test_names_say_what_a_file_is():
  names = ("A.JSONL", "b.Parquet", "c.jsonl.GZ", "d", "e.tar.zst")
  assert [suffix_of(f"x.y/{name}") for name in names] == [
    ".jsonl",
    ".parquet",
    ".jsonl",
    "",
    ".tar",
  ]


def test_folders_say_what_a_record_is():
  assert domain_by_folder("r/a/b/c/x.txt", "r") == "a/b"
  assert domain_by_folder("r/x.txt", "r") is None
  assert partitions("r/domain=new%20s/day=/id=3/text=4/=5/x.txt") == {
    "domain": "new s",
    "day": None,
  }
