"""A small model on the text of this machine: 4.4M parameters, 0.9M tokens.

  make demo

runs it without and with expert divergence, measures each domain with a quarter
of the experts, and prints both side by side. One run by hand:

  python -m edl_jax.main --experiment=experiments/demo.py --workdir=runs/demo

Takes about two minutes a run on two CPU cores. The held-out LM loss ends at 3.6
nats per token; the divergence loss more than doubles routing diversity, from
0.20 to 0.45, and changes the LM loss by +0.01, and by -0.26 with 4 of 16
experts in each layer (one seed; -0.03 in an earlier run).

The loss compares the fine domains. The variant `demo.py:coarse` compares their
parents (code, math, prose, tables), `:hierarchical` both levels, and
`:shuffled` and `:shuffled_coarse` random labels, as controls.
"""

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  choices,
  choose_variant,
)


def get_config(variant: str = "") -> Experiment:
  return Experiment(
    name="demo",
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
    losses=LossesConfig(divergence_weight=0.01),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=10),
    train=TrainConfig(
      num_steps=300,
      batch_size=24,
      sequence_length=128,
      log_every=5,
      eval_every=100,
      eval_rows=64,
      checkpoint_every=100,
    ),
    data=DataConfig(
      granularity=choose_variant(variant, choices("data.granularity")),
      max_characters_per_domain=1_500_000,
    ),
  )
