"""About 20M parameters: an hour on two CPU cores, or a first run on a TPU chip.

  python -m edl_jax.main --experiment=experiments/small.py --workdir=runs/small

The hour is an estimate from the first steps, which run at 1.2k to 1.8k tokens
per second. The variant `small.py:tpu` computes in bfloat16 and takes more and
larger batches; it has not run on a TPU.
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


def get_config(variant: str = "") -> Experiment:
  on_tpu = choose_variant(variant, ("cpu", "tpu")) == "tpu"
  return Experiment(
    name="small",
    model=ModelConfig(
      vocabulary_size=8192,
      num_layers=6,
      width=192,
      num_heads=6,
      num_kv_heads=2,
      head_width=32,
      num_experts=16,
      num_active_experts=2,
      expert_width=288,
      # bfloat16 is slower than float32 on CPUs.
      dtype="bfloat16" if on_tpu else "float32",
    ),
    losses=LossesConfig(divergence_weight=0.01),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=TrainConfig(
      num_steps=3000 if on_tpu else 900,
      batch_size=128 if on_tpu else 24,
      sequence_length=256,
      log_every=20,
      eval_every=150,
      eval_rows=32,
      checkpoint_every=150,
    ),
    data=DataConfig(max_characters_per_domain=3_000_000),
  )
