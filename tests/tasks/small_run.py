"""Untrained runs of the small model, and files of tasks for them."""

import json
import pathlib

import jax

from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import Experiment, TrainConfig
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer
from tests.tasks.naive import CONFIG, LENGTH


def write_run(folder: pathlib.Path, seed: int = 0) -> Experiment:
  """Writes a checkpoint of step 1 and its routing report."""
  experiment = Experiment(
    seed=seed, model=CONFIG, train=TrainConfig(sequence_length=LENGTH)
  )
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  provenance = Provenance(
    experiment, Taxonomy.from_names(["a", "b"]), byte_tokenizer(), "hash"
  )
  checkpointer = Checkpointer(str(folder), keep=1)
  with jax.set_mesh(mesh):
    optimizer = make_optimizer(experiment.optimizer, 1)
    checkpointer.save(
      1, init_state(experiment, optimizer, mesh), {}, provenance
    )
  checkpointer.close()
  report = {
    "domains": ["a", "b"],
    "probabilities": [[[0.25] * 4, [0.7, 0.1, 0.1, 0.1]]],
  }
  (folder / "eval.json").write_text(json.dumps({"step": 1, "report": report}))
  return experiment


def write_files(folder: pathlib.Path) -> None:
  """Writes the task files sums.jsonl and more.jsonl."""
  for name, sign in (("sums", "+"), ("more", "-")):
    lines = [
      {"context": f"{i} {sign}", "continuations": [" 1", " 2"], "gold": i % 2}
      for i in range(6)
    ]
    content = "\n".join(map(json.dumps, lines)) + "\n"
    (folder / f"{name}.jsonl").write_text(content)
