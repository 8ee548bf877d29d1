"""The command line of lm-evaluation-harness, with runs as its models.

  python -m edl_jax.interop.lm_eval --model=edl_jax \\
    --model_args=checkpoint=runs/demo --tasks=arc_easy,race,ceval-valid

The harness finds models by name in a registry, which it fills from its own
files alone. This command adds the model `edl_jax` and leaves all flags to the
harness: `python -m edl_jax.interop.lm_eval run -h` lists them. `--model_args`
takes, separated by commas:

  checkpoint=FOLDER   a run, or one of its steps
  step=50             one of the run's steps, in place of the newest
  max_length=512      tokens that the model reads of a request; by default those
                      of a training row
  batch_tokens=8192   tokens of a batch of log-likelihoods, padding included
  batch_prompts=16    prompts that are continued at a time
  domain=law          domain of all texts, for model.router=domain alone
  expert=4,tensor=2   mesh over the devices; by default one device

Batches follow from these, and devices from JAX: the harness's --batch_size and
--device have no effect. The command needs the packages of
requirements-lm-eval.txt. Tasks and their data come from the hub, or from files
by --include_path.
"""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from edl_jax.command import Command
from edl_jax.config import UserError


class _Harness(Command):
  """A command whose flags are the harness's."""

  arguments: Sequence[str] = ()

  def parse(self, arguments: Sequence[str]) -> None:
    self.arguments = list(arguments)

  def help(self) -> str:
    return self._documentation


COMMAND = _Harness(__doc__)


@COMMAND.main
def main() -> None:
  """Registers the model, and runs the harness."""
  if importlib.util.find_spec("lm_eval") is None:
    raise UserError(
      "lm-evaluation-harness is not installed: pip install -r"
      " requirements-lm-eval.txt"
    )
  from edl_jax import runtime

  runtime.configure()
  # Registers itself.
  importlib.import_module("edl_jax.interop.harness")
  harness: Any = importlib.import_module("lm_eval.__main__")
  # It reads its flags from there.
  sys.argv = ["lm_eval", *COMMAND.arguments]
  harness.cli_evaluate()


if __name__ == "__main__":
  sys.exit(main())
