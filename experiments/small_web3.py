"""The model of small.py on 200 MB of English, Chinese, mathematics and code.

  python -m data.corpora --mixture=web3 --out=corpora
  python -m edl_jax.main --experiment=experiments/small_web3.py \
    --workdir=runs/web3

The divergence loss compares the 39 sources. The variant `small_web3.py:coarse`
compares the four coarse domains in their place, `:shuffled` random labels (a
control), and `:baseline` trains without the loss. They are labels of sources:
what a text is from, not what it is about.

The text is tokenized when a run first meets it, in some minutes; later runs
find it in the cache.
"""

from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)

_VARIANTS = ("fine", "coarse", "shuffled", "baseline")


def get_config(variant: str = "fine") -> Experiment:
  variant = variant or "fine"
  if variant not in _VARIANTS:
    raise ValueError(f"variant {variant!r} must be one of {_VARIANTS}")
  without = variant == "baseline"
  return Experiment(
    name="small_web3",
    model=ModelConfig(
      vocabulary_size=16384,
      num_layers=6,
      width=192,
      num_heads=6,
      num_kv_heads=2,
      head_width=32,
      num_experts=16,
      num_active_experts=2,
      expert_width=288,
    ),
    losses=LossesConfig(divergence_weight=0.0 if without else 0.01),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=TrainConfig(
      num_steps=2000,
      batch_size=32,
      sequence_length=256,
      log_every=20,
      eval_every=250,
      eval_rows=16,
      checkpoint_every=250,
    ),
    data=DataConfig(
      files="corpora/text/*.jsonl.gz",
      taxonomy="corpora/taxonomy.yaml",
      granularity="fine" if without else variant,
      # Sources range from 0.4 to 15 MB: by size alone the largest would be a
      # twelfth of all rows, with equal shares the smallest be read too often.
      mixing="bytes",
      temperature=2.0,
      max_characters_per_domain=20_000_000,
    ),
  )
