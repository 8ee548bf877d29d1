"""Compares the speed of scoring with lm-evaluation-harness on Transformers.

  python -m data.benchmarks --out=benchmarks_data --tasks=arc_easy
  python -m benchmarks.scoring --task=benchmarks_data/arc_easy.rc.jsonl

Both score the first requests of a file, such as ARC-Easy's: five examples, a
question, and one of its answers. The model has the shapes of an experiment and
random weights in float32; Transformers loads them from our export. The harness
asks `HFLM`, its class for Transformers, in the fastest of its modes: experts
"eager" and "grouped_mm", and batches of 8 and 32 requests, tried before. We
take the better of two sizes of batches.

Both start from texts and end with log-likelihoods, which must agree. They take
turns in processes of their own, which compile before the first turn. The ratio
is our requests per second over theirs: median, least and greatest of the
rounds.
"""

import statistics
import sys
import tempfile

from benchmarks import inference_peers, measure, peers
from edl_jax.command import Command
from edl_jax.text.task_files import read_task

COMMAND = Command(__doc__)
_TASK = COMMAND.flag("task", "", "File of a task.", required=True)
_MODELS = inference_peers.model_flag(COMMAND)
_REQUESTS = COMMAND.flag("requests", 256, "Requests to score.", minimum=1)
_MAX_LENGTH = COMMAND.flag(
  "max_length", 512, "Most tokens that the model reads.", minimum=1
)
_FLAGS = peers.comparison_flags(COMMAND)

# Requests that a mode is tried on.
_TRIED = 32
# Largest difference between the two log-likelihoods of a request, in nats.
_TOLERANCE = 1e-3


def _compare(name: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
  """Returns the figures of one model."""
  print(f"{name}:", flush=True)
  experiment = inference_peers.load_experiment(name)
  task = {"pairs": pairs, "max_length": _MAX_LENGTH.value}
  with (
    tempfile.TemporaryDirectory() as folder,
    inference_peers.contestants(
      inference_peers.write_models(experiment, folder),
      *(_FLAGS.environments.value, _FLAGS.threads.value),
    ) as running,
  ):
    modes = {
      key: each.best_mode("score", task, _TRIED)
      for key, each in running.items()
    }
    found: dict[str, list[float]] = {}

    def turn(key: str) -> float:
      seconds, found[key] = running[key].ask("score", mode=modes[key], **task)
      return len(pairs) / seconds

    rates = measure.take_turns(
      {key: lambda key=key: turn(key) for key in running}, _FLAGS.rounds.value
    )
  worst = max(
    abs(a - b)
    for a, b in zip(found["ours"], found["transformers"], strict=True)
  )
  assert worst < _TOLERANCE, f"log-likelihoods differ by {worst}"
  ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"])]
  return {
    "model": name,
    "ours (requests/s)": statistics.median(rates["ours"]),
    "harness (requests/s)": statistics.median(rates["transformers"]),
    "ratio": statistics.median(ratios),
    "least": min(ratios),
    "greatest": max(ratios),
    "largest difference (nats)": worst,
    "modes": modes,
  }


@COMMAND.main
def main() -> None:
  """Times both on each model."""
  pairs = [
    pair
    for document in read_task(_TASK.value).documents
    for pair in zip(document.contexts, document.continuations)
  ][: _REQUESTS.value]
  rows = [_compare(name, pairs) for name in _MODELS.value]
  shown = [{k: v for k, v in row.items() if k != "modes"} for row in rows]
  modes = {row["model"]: row["modes"] for row in rows}
  measure.report(shown, _FLAGS.json.value, requests=len(pairs), modes=modes)


if __name__ == "__main__":
  sys.exit(main())
