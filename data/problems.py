"""Writes worked problems of arithmetic and algebra as supervised examples.

  python -m data.problems --out=problems

writes a file of JSON lines for each kind, problems/<kind>.jsonl.gz, which is a
domain. A prompt is the question, and a completion the steps to its answer:

  {"prompt": "Find the greatest common divisor of 12 and 9.\\n",
   "completion": "12 = 1 * 9 + 3\\n9 = 3 * 3 + 0\\ngcd(12, 9) = 3",
   "domain": "greatest_common_divisors"}

An experiment reads them by data.files='problems/*.jsonl.gz'.
"""

import json
import sys
from itertools import islice
from pathlib import Path

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text.arithmetic import KINDS, worked_examples

COMMAND = Command(__doc__)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)
_PROBLEMS = COMMAND.flag(
  "problems",
  2000,
  "Problems of each kind to draw. A question that comes again is left out.",
  minimum=1,
)
_SEED = COMMAND.flag("seed", 0, "Seed of the problems.", minimum=0)


def write(out: Path, problems: int, seed: int) -> None:
  """Writes the examples of every kind, each question once.

  Raises:
    UserError: `out` cannot be written.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
      examples = dict(islice(worked_examples(kind, seed), problems))
      with storage.whole_gzip_file(out / f"{kind}.jsonl.gz") as file:
        for prompt, completion in examples.items():
          record = {"prompt": prompt, "completion": completion, "domain": kind}
          file.write(json.dumps(record).encode() + b"\n")
  except OSError as error:
    where = error.filename or out
    raise UserError(f"{where}: {error.strerror}") from error


@COMMAND.main
def main() -> None:
  """Writes the problems that the flags describe.

  Raises:
    UserError: the folder cannot be written.
  """
  write(Path(_OUT.value), _PROBLEMS.value, _SEED.value)
  print(f"written to {_OUT.value}: {', '.join(KINDS)}")


if __name__ == "__main__":
  sys.exit(main())
