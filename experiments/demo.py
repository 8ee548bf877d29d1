"""A small model on the text of this machine: 4.4M parameters, 0.3M tokens.

  make demo

runs it without and with expert divergence and prints both side by side. One
run by hand:

  python -m edl_jax.main --experiment=experiments/demo.py --workdir=runs/demo

Takes about two minutes a run on two CPU cores. The held-out LM loss ends at 4.8
nats per token; the divergence loss doubles routing diversity, from 0.20 to
0.44, and changes the LM loss by +0.03 (means of three seeds).

The loss compares the fine domains. The variant `demo.py:coarse` compares their
parents (code, math, prose, tables), `:hierarchical` both levels, and
`:shuffled` random labels, as a control.
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
      num_steps=100,
      batch_size=24,
      sequence_length=128,
      log_every=5,
      eval_every=50,
      eval_rows=32,
      checkpoint_every=50,
    ),
    data=DataConfig(
      granularity=choose_variant(variant, choices("data.granularity")),
      max_characters_per_domain=1_500_000,
    ),
  )
