"""Revision and versions, in a repository made for it."""

import importlib.metadata
import platform
import subprocess

from edl_jax.environment import environment, git_revision


def git(folder, *arguments):
  settings = ("-c", "user.name=a", "-c", "user.email=a@b.c")
  return subprocess.run(
    ["git", "-C", str(folder), *settings, *arguments],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()


def test_revision_says_whether_files_differ_from_it(tmp_path):
  assert git_revision(tmp_path) is None
  git(tmp_path, "init", "--quiet")
  # There is no commit yet.
  assert git_revision(tmp_path) is None
  (tmp_path / "a").write_text("1")
  git(tmp_path, "add", "a")
  git(tmp_path, "commit", "--quiet", "--message=one")
  commit = git(tmp_path, "rev-parse", "HEAD")
  assert len(commit) == 40
  (tmp_path / "untracked").write_text("")
  assert git_revision(tmp_path) == commit
  (tmp_path / "a").write_text("2")
  assert git_revision(tmp_path) == f"{commit}-dirty"


def test_versions_are_those_of_this_process():
  found = environment()
  assert found.keys() == {"git_revision", "versions"}
  versions = found["versions"]
  assert versions["python"] == platform.python_version()
  for name in ("jax", "flax", "optax", "orbax-checkpoint"):
    assert versions[name] == importlib.metadata.version(name)
