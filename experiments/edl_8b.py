"""8B-A0.8B on 100B tokens: 8.13B parameters, 0.816B active per token.

  python -m edl_jax.main --experiment=experiments/edl_8b.py:fine --distributed \
    --workdir=gs://BUCKET/edl_8b --experiment.data.prepared=gs://BUCKET/corpus

Compiled for TPU slices (`python -m edl_jax.aot`; nothing has run on a TPU), rows
and figures of a chip:

  slice, settings                 rows  peak memory  a step takes at least
  v6e:8x8  mesh.expert=8            16          43%  0.53 s (products)

Settings are --experiment.KEY=VALUE.

The variants are those of Li et al., arXiv:2603.00054: `:baseline` without the
divergence loss, `:coarse` with domains by their parents in the taxonomy (there
English, Chinese and mathematics), `:fine`, the default, with all 49.
"""

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)

_VARIANTS = ("baseline", "coarse", "fine")


def get_config(variant: str = "fine") -> Experiment:
  variant = variant or "fine"
  if variant not in _VARIANTS:
    raise ValueError(f"variant {variant!r} must be one of {_VARIANTS}")
  return Experiment(
    name=f"edl_8b_{variant}",
    # The paper does not publish the shapes of its layers: these are chosen for
    # its totals. Active parameters do not count the embedding.
    model=ModelConfig(
      vocabulary_size=152_064,
      num_layers=20,
      width=1536,
      num_heads=12,
      num_kv_heads=2,
      head_width=128,
      num_experts=64,
      num_active_experts=4,
      expert_width=1280,
      rope_theta=1_000_000.0,
      dtype="bfloat16",
      remat="full",
      logits_elements=1 << 28,
    ),
    losses=LossesConfig(
      divergence_weight=0.0 if variant == "baseline" else 0.01
    ),
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000),
    # 4.2M tokens a step, 100B in all.
    train=TrainConfig(
      num_steps=23_842,
      batch_size=1024,
      sequence_length=4096,
      log_every=10,
      eval_every=1000,
      eval_rows=1024,
      checkpoint_every=500,
      keep_checkpoints=3,
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=4),
    data=DataConfig(
      prepared="prepared",
      granularity="coarse" if variant == "coarse" else "fine",
      mixing="tokens",
    ),
  )
