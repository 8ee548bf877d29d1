"""The shapes that benchmarks compare speed on: seconds of training, not more.

  python -m benchmarks.peers

times this experiment's training step beside other libraries' at the same
shapes. It is an ordinary experiment too, which trains on the text of this
machine:

  python -m edl_jax.main --experiment=experiments/bench.py --workdir=runs/bench
"""

from edl_jax.config import (
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)


def get_config(variant: str = "") -> Experiment:
  if variant:
    raise ValueError(f"variant {variant!r} must be left out")
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
