"""Compares the speed of generation with Transformers' `generate`.

  python -m benchmarks.generation

Both continue the same prompts greedily, with a cache of keys and values, from
texts to texts. The model has the shapes of an experiment and random weights in
float32; Transformers loads them from our export, and runs experts in the
fastest of its three ways, tried before.

They take turns in processes of their own, which compile before the first turn.
The ratio is our new tokens per second over theirs: median, least and greatest
of the rounds.
"""

import random
import statistics
import sys
import tempfile

from benchmarks import inference_peers, measure, peers
from edl_jax.command import Command

COMMAND = Command(__doc__)
_MODELS = inference_peers.model_flag(COMMAND)
_PROMPTS = COMMAND.flag(
  "prompts", ("1", "16"), "Numbers of prompts to continue at a time."
)
_NUM_TOKENS = COMMAND.flag("num_tokens", 64, "New tokens.", minimum=1)
_FLAGS = peers.comparison_flags(COMMAND)

_WORDS = "def return value class import the of and is not for in with"


def _prompts(count: int) -> list[str]:
  """Returns prompts of about 30 words."""
  generator = random.Random(0)
  return [
    " ".join(generator.choices(_WORDS.split(), k=generator.randint(24, 36)))
    for _ in range(count)
  ]


def _compare(
  name: str, count: int, running: dict[str, inference_peers.Contestant]
) -> dict[str, object]:
  """Returns the figures of one model and number of prompts."""
  print(f"{name}, {count} prompts:", flush=True)
  task = {"prompts": _prompts(count), "num_tokens": _NUM_TOKENS.value}
  modes = {
    key: each.best_mode("generate", task, count)
    for key, each in running.items()
  }

  def turn(key: str) -> float:
    seconds, lengths = running[key].ask("generate", mode=modes[key], **task)
    return sum(lengths) / seconds

  rates = measure.take_turns(
    {key: lambda key=key: turn(key) for key in running}, _FLAGS.rounds.value
  )
  ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"])]
  return {
    "model": name,
    "prompts": count,
    "ours (tokens/s)": statistics.median(rates["ours"]),
    "Transformers (tokens/s)": statistics.median(rates["transformers"]),
    "its experts": modes["transformers"]["experts"],
    "ratio": statistics.median(ratios),
    "least": min(ratios),
    "greatest": max(ratios),
  }


@COMMAND.main
def main() -> None:
  """Times both on each model."""
  rows = []
  for name in _MODELS.value:
    experiment = inference_peers.load_experiment(name)
    with (
      tempfile.TemporaryDirectory() as folder,
      inference_peers.contestants(
        inference_peers.write_models(experiment, folder),
        *(_FLAGS.environments.value, _FLAGS.threads.value),
      ) as running,
    ):
      rows += [_compare(name, int(count), running) for count in _PROMPTS.value]
  measure.report(rows, _FLAGS.json.value, num_tokens=_NUM_TOKENS.value)


if __name__ == "__main__":
  sys.exit(main())
