"""Verifies the checkpoints of a run.

  python -m edl_jax.checkpoint verify runs/demo

Reads every array of every checkpoint, and compares it with the digest that was
saved with it. Prints a line for each checkpoint and changes nothing. The exit
code is 1 if one is damaged.
"""

import sys
from collections.abc import Sequence

from absl import logging

from edl_jax.command import Command, print_error
from edl_jax.config import UserError

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir",
  "",
  "Folder of the run; the same as writing it after verify.",
  required=True,
)


@COMMAND.main
def _verify() -> int:
  """Prints what is intact, and on stderr what is not."""
  # Imports JAX, which --help and wrong flags do without.
  from edl_jax.checkpoint.verify import verify_run

  damaged = False
  # Orbax warns of metadata that it has no need of.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    for line in verify_run(_WORKDIR.value):
      if isinstance(line, UserError):
        print_error(line)
        damaged = True
      else:
        print(line, flush=True)
  finally:
    logging.set_verbosity(verbosity)
  return int(damaged)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs `verify RUN`; returns the exit code, see `Command.main`."""
  words = list(sys.argv[1:] if arguments is None else arguments)
  if words[:1] == ["verify"]:
    words = [
      word if word.startswith("-") else f"--workdir={word}"
      for word in words[1:]
    ]
  return _verify(words)


if __name__ == "__main__":
  sys.exit(main())
