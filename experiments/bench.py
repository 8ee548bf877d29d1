"""Shapes that benchmarks compare speed on.

  python -m benchmarks.peers

times this training step beside those of other libraries at the same shapes, on
CPU cores; benchmarks/RESULTS.md has the results. As an ordinary experiment, it
trains on the text of this machine, for some minutes on two CPU cores:

  python -m edl_jax.main --experiment=experiments/bench.py --workdir=runs/bench
"""

from edl_jax.config import (
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  choose_variant,
)


def get_config(variant: str = "") -> Experiment:
  choose_variant(variant)
  return Experiment(
    name="bench",
    model=ModelConfig(
      vocabulary_size=4096,
      num_layers=4,
      width=256,
      num_heads=4,
      num_kv_heads=4,
      head_width=64,
      num_experts=8,
      num_active_experts=2,
      expert_width=512,
      scan_unroll=4,
    ),
    losses=LossesConfig(divergence_weight=0.01),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    train=TrainConfig(num_steps=100, batch_size=8, sequence_length=256),
  )
