"""Post-trains a checkpoint with the AES losses (Guo et al., arXiv:2505.22323).

  python -m edl_jax.main --experiment=experiments/aes_post_training.py:both \\
    --experiment.train.initial_checkpoint=RUN --workdir=runs/aes_both

The variants differ in the losses alone:

- `:both`: orthogonality L_o and variance L_v, each with the weight that brings
  it to its authors' target on the first batch (1e-4 and 1e-3).
- `:orthogonality`, `:variance`: one of the two.
- `:none`: neither.
- `:edl`: expert divergence in their place.

All balance the load of each sequence with weight 1e-3, as the AES authors do.
The model is that of demo.py, for a RUN of it. For another checkpoint, set
`model` to its values; an error names those that differ. `data.files` is the
text to post-train on. Expert divergence needs two domains or more, the others
one. The steps and learning rate are ours, and so is training on whole texts:
AES was published for supervised examples.
"""

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  choose_variant,
)

VARIANTS = ("both", "orthogonality", "variance", "none", "edl")


def get_config(variant: str = "") -> Experiment:
  variant = choose_variant(variant, VARIANTS)
  return Experiment(
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
