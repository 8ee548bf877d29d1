"""What a process of a run was made from: git revision and versions.

This module imports no JAX.
"""

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

# The packages whose versions decide what a run computes.
_PACKAGES = (
  "jax",
  "jaxlib",
  "libtpu",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)


def git_revision(root: pathlib.Path | None = None) -> str | None:
  """Returns the commit of a checkout, with "-dirty" if files differ from it.

  Args:
    root: the checkout; by default that of this package. None is returned where
      it is none, as for an installed wheel.
  """
  root = pathlib.Path(__file__).parent.parent if root is None else root
  if not (root / ".git").exists():
    return None

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", "-C", str(root), *arguments],
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.SubprocessError):
    return None
  return f"{commit}-dirty" if changed else commit


def environment() -> dict[str, Any]:
  """Returns git revision, Python's version and those of packages."""
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {"git_revision": git_revision(), "versions": versions}
