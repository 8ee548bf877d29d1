"""Post-trains a checkpoint with the AES losses (Guo et al., arXiv:2505.22323).

  python -m edl_jax.main --workdir=runs/aes_both \\
    --experiment=experiments/aes_post_training.py:both,RUN \\
    --experiment.data.files='chats/*.jsonl'

RUN is a folder that edl_jax.interop.import_weights wrote; the model and its
tokenizer are that folder's. `data.files` is what to post-train on: supervised
examples, of which the loss counts completions alone, as AES was published, or
whole texts. See docs/post-training.md.

The variants differ in the losses alone:

- `:both`: orthogonality L_o and variance L_v, each with the weight that brings
  it to its authors' target on the first batch (1e-4 and 1e-3).
- `:orthogonality`, `:variance`: one of the two.
- `:none`: neither.
- `:edl`: expert divergence in their place.

All balance the load of each sequence with weight 1e-3, as the AES authors do.
Expert divergence needs two domains or more, the others one. Steps, rows and
learning rates are ours.

Without ",RUN" the model is that of demo.py; name a run of it by
`train.initial_checkpoint`. For another checkpoint, set `model` to its values;
an error names those that differ.
"""

import os
import runpy

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  UserError,
  choose_variant,
)

VARIANTS = ("both", "orthogonality", "variance", "none", "edl")


def get_config(variant: str = "") -> Experiment:
  variant, _, run = variant.partition(",")
  variant = choose_variant(variant, VARIANTS)
  experiment = Experiment(
    name=f"aes_post_training_{variant}",
    model=ModelConfig(
      vocabulary_size=4096,
      num_layers=4,
      width=128,
      num_heads=4,
      num_kv_heads=2,
      head_width=32,
      num_experts=16,
      num_active_experts=2,
      expert_width=128,
    ),
    losses=LossesConfig(
      balance_weight=1e-3,
      balance_scope="sequence",
      divergence_weight=0.01 if variant == "edl" else 0.0,
      orthogonality_weight=(
        "auto:1e-4" if variant in ("both", "orthogonality") else 0.0
      ),
      variance_weight="auto:1e-3" if variant in ("both", "variance") else 0.0,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=10),
    train=TrainConfig(
      num_steps=100,
      batch_size=24,
      sequence_length=128,
      log_every=5,
      eval_every=50,
      eval_rows=32,
      checkpoint_every=50,
    ),
    data=DataConfig(max_characters_per_domain=1_500_000),
  )
  if run:
    _start_from(experiment, run)
  return experiment


def _start_from(experiment: Experiment, run: str) -> None:
  """Sets what differs for imported weights, of a model of billions."""
  path = os.path.join(os.path.expanduser(run), "experiment.py")
  if not os.path.isfile(path):
    raise UserError(
      f"variant ',{run}': no {path}; name a folder that python -m"
      " edl_jax.interop.import_weights wrote"
    )
  imported: Experiment = runpy.run_path(path)["get_config"]()
  experiment.model = imported.model
  experiment.train.initial_checkpoint = imported.train.initial_checkpoint
  experiment.train.sequence_length = 1024
  experiment.train.num_steps = 500
  experiment.optimizer.learning_rate = 1e-5
  experiment.data.max_characters_per_domain = 100_000_000
