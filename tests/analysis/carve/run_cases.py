"""Small runs to carve, trained for real."""

import json
import random
from typing import Any

from edl_jax import config_files, main

DOMAINS = ("words/low", "words/high", "digits")
_ALPHABETS = ("abcdefgh ", "stuvwxyz ", "0123456789 ")


def write_texts(path) -> str:
  """Writes 20 documents of 200 characters for each domain."""
  rng = random.Random(0)
  with open(path, "w") as file:
    for domain, alphabet in zip(DOMAINS, _ALPHABETS):
      for _ in range(20):
        text = "".join(rng.choices(alphabet, k=200))
        file.write(json.dumps({"text": text, "domain": domain}) + "\n")
  return str(path)


def overrides_of(files: str, **more: Any) -> dict[str, str]:
  """Returns the overrides of experiments/tiny.py that make it a tiny run."""
  return {
    "data.files": files,
    "data.held_out_fraction": "0.2",
    "train.num_steps": "4",
    "train.checkpoint_every": "4",
    "train.eval_every": "4",
    "train.sequence_length": "32",
    "optimizer.warmup_steps": "1",
    "optimizer.learning_rate": "0.02",
    "model.num_layers": "3",
    "model.num_dense_layers": "1",
    "model.dense_width": "32",
    "model.num_experts": "8",
    # Biases that decide some choices: all of carving is tried with them.
    "model.balancing": "both",
    "optimizer.bias_rate": "0.05",
    **{key: str(value) for key, value in more.items()},
  }


def train_run(workdir, files: str, **more: Any) -> str:
  """Trains a run of experiments/tiny.py; returns its folder."""
  experiment = config_files.load(
    "experiments/tiny.py", overrides_of(files, **more)
  )
  run = main.prepare(experiment, str(workdir), "train")
  assert main.execute(run, main._make_mesh(experiment)) == 0
  return str(workdir)
