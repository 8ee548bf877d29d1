"""The model of small.py on 200 MB of English, Chinese, mathematics and code.

  python -m data.corpora --mixture=web3 --out=corpora
  python -m edl_jax.main --experiment=experiments/small_web3.py \\
    --workdir=runs/web3

Trains on 16M tokens, a few hours on two CPU cores at the rate of small.py. The
first run also tokenizes the text, in some minutes; later runs find it in the
cache.

The divergence loss compares the 39 sources. The variant `small_web3.py:coarse`
compares their four coarse domains, `:shuffled` random labels, as a control, and
`:baseline` trains without the loss. The labels say where a text comes from, not
what it is about.
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
  variant = choose_variant(variant, ("fine", "coarse", "shuffled", "baseline"))
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
      # Sources range from 0.4 to 15 MB. By size alone the largest would make a
      # twelfth of all rows; with equal shares the smallest would be read too
      # often.
      mixing="bytes",
      temperature=2.0,
      max_characters_per_domain=20_000_000,
    ),
  )
