"""Evaluate a trained model on benchmarks.

  python -m edl_jax.tasks --workdir=runs/demo --tasks=arc_easy.rc,commonsense

reads task files from benchmarks_data, which python -m data.benchmarks writes,
or from --files=FOLDER. It prints a table and writes tasks.json to the run's
folder: bits per byte of the right answers, accuracy with its standard error,
and the experts that each task uses.
"""

import contextlib
import os
import sys

from edl_jax.command import Command
from edl_jax.config import MeshConfig, UserError

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir", "", "Folder of the run, or of one of its steps.", required=True
)
_FILES = COMMAND.flag(
  "files", "benchmarks_data", "Folder of the task files, NAME.jsonl."
)
_TASKS = COMMAND.flag(
  "tasks",
  (),
  "Tasks, groups or files, such as piqa,mmlu,boolq.rc; all without it.",
)
_DOCUMENTS = COMMAND.flag(
  "documents",
  0,
  "Most documents of a file, taken evenly from it; 0: all.",
  minimum=0,
)
_MAX_LENGTH = COMMAND.flag(
  "max_length",
  0,
  "Most tokens that the model reads in a row; 0: as in training.",
  minimum=0,
)
_BATCH_TOKENS = COMMAND.flag(
  "batch_tokens", 8192, "Tokens of a batch, padding included.", minimum=1
)
_DISTRIBUTED = COMMAND.flag(
  "distributed", False, "Join the other processes, as in edl_jax.main."
)
COMMAND.mesh(otherwise="each device takes rows of its own")


@COMMAND.main
def main() -> None:
  """Evaluates the tasks; refuses wrong ones before it loads the model."""
  config = COMMAND.mesh_config or MeshConfig()
  # Imports no JAX, which --help and errors in flags and files do without.
  from edl_jax.tasks.selection import select_tasks

  selected = select_tasks(_FILES.value, _TASKS.value, _DOCUMENTS.value)
  import jax

  from edl_jax import checkpoint, progress, runtime, sharding, storage
  from edl_jax.tasks.evaluation import encode_tasks, evaluate_tasks, table
  from edl_jax.tasks.routing import read_domain_routing
  from edl_jax.tasks.scoring import check_scoring

  runtime.configure()
  provenance = checkpoint.checkpoint_provenance(_WORKDIR.value)
  experiment, tokenizer = provenance.experiment, provenance.tokenizer
  folder = checkpoint.run_folder(_WORKDIR.value)
  if not storage.in_bucket(folder) and not os.access(folder, os.W_OK):
    raise UserError(f"{folder} cannot be written, and tasks.json belongs there")
  max_length = _MAX_LENGTH.value or experiment.train.sequence_length
  if _DISTRIBUTED.value:
    files = [(name, each.sha256) for name, each in selected.items()]
    settings = [max_length, _DOCUMENTS.value, _BATCH_TOKENS.value]
    runtime.join_processes(
      [provenance.to_dict(), files, settings], "checkpoint, tasks or flags"
    )
  mesh = sharding.make_mesh(config)
  check_scoring(experiment.model, tokenizer)
  encoded = encode_tasks(selected, tokenizer, max_length)
  run = checkpoint.load(_WORKDIR.value, mesh=mesh)
  is_first = jax.process_index() == 0
  if is_first:
    print(
      f"{experiment.name}, checkpoint of step {run.step}:"
      f" {sum(map(len, encoded.texts.values())):,} documents of"
      f" {len(selected)} files, {len(encoded.windows):,} texts of at most"
      f" {max_length} tokens",
      flush=True,
    )
  warnings: list[str] = []
  with progress.elapsed("scoring") if is_first else contextlib.nullcontext():
    result = evaluate_tasks(
      run.model,
      encoded,
      mesh,
      _BATCH_TOKENS.value,
      read_domain_routing(folder, run.step),
      warnings.append,
    )
  if not is_first:
    return
  for warning in warnings:
    print(f"warning: {warning}", file=sys.stderr)
  path = os.path.join(folder, "tasks.json")
  storage.write_json(path, {"step": run.step, **result})
  print("\n".join(table(result)))
  print(f"written to {path}")


if __name__ == "__main__":
  sys.exit(main())
