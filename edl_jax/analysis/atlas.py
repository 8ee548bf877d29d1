"""Writes the atlas of a run: one HTML file that shows who routes what where.

  python -m edl_jax.analysis.atlas --workdir=runs/demo/divergence_weight=0.01

It loads the newest checkpoint, routes the held-out text of the run's own
evaluation, and writes a page that needs no network and opens from the disk. A
second --workdir puts another run of the same domains beside the first.
"""

import os
import sys
from typing import TYPE_CHECKING

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import UserError

if TYPE_CHECKING:
  from edl_jax.checkpoint import Loaded

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir",
  [],
  "Folder of a run with a checkpoint; give it twice to compare two runs.",
  required=True,
)
_OUT = COMMAND.flag(
  "out",
  "",
  "The file to write. Default: report/atlas.html in the first --workdir.",
)


def _load(workdirs: list[str]) -> "list[Loaded]":
  """Loads the newest checkpoints, which must have the same domains.

  Raises:
    UserError: more than two runs, a run without a checkpoint, or two runs of
      different domains.
  """
  from edl_jax.checkpoint import load

  if len(workdirs) > 2:
    raise UserError(f"--workdir: at most two runs, not {len(workdirs)}")
  runs = [load(workdir) for workdir in workdirs]
  domains = [run.taxonomy.names for run in runs]
  if domains[0] != domains[-1]:
    one_sided = sorted(set(domains[0]) ^ set(domains[-1]))
    difference = (
      f"only one has {', '.join(one_sided)}"
      if one_sided
      else "their order differs"
    )
    raise UserError(
      f"--workdir={workdirs[0]} and --workdir={workdirs[-1]} have different"
      f" domains ({difference}); compare runs of one taxonomy"
    )
  return runs


def _names(workdirs: list[str]) -> list[str]:
  """Returns the folders' own names, or their paths where these are equal."""
  names = [os.path.basename(storage.absolute(path)) for path in workdirs]
  return names if len(set(names)) == len(names) else workdirs


def _check_out(path: str) -> None:
  """Makes the folder of the page.

  Raises:
    UserError: the page cannot be written there.
  """
  if os.path.isdir(path):
    raise UserError(f"--out={path} is a folder; name a file in it")
  try:
    storage.make_folder(os.path.dirname(path) or ".")
  except OSError as error:
    raise UserError(f"cannot write --out={path}: {error.strerror}") from error


@COMMAND.main
def main() -> None:
  """Writes the page; checks the runs and their text before it uses a model."""
  workdirs = _WORKDIR.value
  # Imports JAX, which --help and errors in flags do without.
  from edl_jax import runtime
  from edl_jax.analysis.atlas_data import collect
  from edl_jax.analysis.atlas_page import build_page
  from edl_jax.analysis.run_text import read_corpus

  runtime.configure()
  runs = _load(workdirs)
  texts = list(map(read_corpus, runs, workdirs))
  out = _OUT.value or os.path.join(workdirs[0], "report", "atlas.html")
  _check_out(out)
  page = build_page(
    [
      collect(run, text, name)
      for run, text, name in zip(runs, texts, _names(workdirs))
    ]
  )
  try:
    storage.write_bytes(out, page)
  except OSError as error:
    raise UserError(f"cannot write --out={out}: {error.strerror}") from error
  print(f"{out}: {len(page) / 2**20:.2f} MiB, opens in any browser")


if __name__ == "__main__":
  sys.exit(main())
