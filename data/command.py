"""What the commands in this folder share: options, and errors of one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from edl_jax.config import UserError


class Parser(argparse.ArgumentParser):
  """Options of a command, whose errors are user errors.

  Not absl flags: these are global, and two commands with an option of the same
  name could not be imported by one process.
  """

  def __init__(self, documentation: str):
    """Takes the module's docstring for the text of --help."""
    super().__init__(
      description=documentation,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(message)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Calls `main` with the arguments; a user error is one line, exit code 2."""
  try:
    main(sys.argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
