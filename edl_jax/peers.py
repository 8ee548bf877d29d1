"""The other processes of a run: what happens when one of them is lost."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax

from edl_jax.command import print_error

# How collectives and barriers tell that a process does not answer: Gloo on
# CPUs, NCCL on GPUs, JAX's coordination service everywhere.
_LOST = re.compile(
  r"gloo|nccl|connection (reset|refused|closed)|closed by peer|heartbeat"
  r"|coordination|barrier|socket|unhealthy|^(unavailable|deadline_exceeded)",
  re.IGNORECASE,
)


@contextlib.contextmanager
def needed() -> Iterator[None]:
  """Ends this process if the block fails because another one is lost.

  It ends at once, with one line and exit code 1: an orderly end would wait for
  the lost process, to write a checkpoint and to leave the run together, for
  minutes. A process that runs alone is left alone.

  Raises:
    JaxRuntimeError, ValueError: for another reason.
  """
  try:
    yield
  # Arrays that cannot be computed raise a ValueError where they are read.
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = lost_reason(str(error))
    if jax.process_count() == 1 or reason is None:
      raise
    sys.stdout.flush()
    print_error(
      f"another process of the run has ended or does not answer ({reason});"
      " start all of them again, and they resume from the last checkpoint"
    )
    os._exit(1)


def lost_reason(message: str) -> str | None:
  """Returns what an error says of a lost process, in a line; None if nothing.

  Args:
    message: the text of an error of JAX.
  """
  if _LOST.search(message) is None:
    return None
  return " ".join(message.split())[:160]
