"""The runs of the study: when does expert divergence make better models?

The model of demo.py on the 39 sources of `data.corpora --mixture=web3`, 2.5M
tokens a run. docs/study/run.sh has the commands. The variant sets what a run
compares. The grid of a sweep sets the rest, such as the weight of the loss, the
scope of the balance loss and the seed.

- `study.py:fine`: L_ED compares the 39 sources.
- `:coarse`: their four coarse domains; `:hierarchical`: both levels.
- `:shuffled`: random labels, as a control; `:shuffled_coarse`: the coarse ones
  of these.
- `:pools`: no labels; each document draws a pool of 2 to 16 experts.
- `:router`: each source has fixed experts, as a reference.
- `:micro_batches`: the losses of micro-batches of 8 rows, averaged, as trainers
  compute them that do not sum statistics over the global batch.
- `:finer`: as `:fine`, with 64 experts of a quarter of the width, 8 of them
  active, so that as many parameters of experts are active.
- `:layers_2`, `:layers_3`, `:layers_6`, `:layers_8`: as `:fine`, in other
  sizes. 0.34M, 0.64M, 2.8M and 5.8M parameters are active, where the model of
  demo.py has 1.12M; tokens are in proportion.
- `:large`: as `:fine`, with 105M active parameters on 1.0B tokens, for a GPU.

A smaller model on text of Markov sources, whose best loss is known (`python -m
data.markov`), 2.5M tokens a run:

- `:truth`: L_ED compares the sources.
- `:truth_pools` and `:truth_router`: as `:pools` and `:router` above.

The same model on the embedded mixture without its mathematics, for
post-training on worked problems (`python -m data.problems`):

- `:post_training_base`: no L_ED.
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

LABELS = choices("data.granularity")
TRUTH = ("truth", "truth_pools", "truth_router")
BASE = "post_training_base"
# Layers and steps of each size; 1.12M active parameters take 400 steps.
SIZES = {
  "layers_2": (2, 120),
  "layers_3": (3, 227),
  "layers_6": (6, 996),
  "layers_8": (8, 2066),
}
VARIANTS = (
  *LABELS,
  *("pools", "router", "micro_batches", "finer"),
  *SIZES,
  "large",
  *TRUTH,
  BASE,
)


def get_config(variant: str = "") -> Experiment:
  variant = choose_variant(variant, VARIANTS)
  if variant in TRUTH:
    return _truth(variant)
  if variant == BASE:
    return _post_training_base()
  experiment = _web3(variant)
  if variant == "finer":
    experiment.model.num_experts = 64
    experiment.model.num_active_experts = 8
    experiment.model.expert_width = 32
  elif variant in SIZES:
    layers, steps = SIZES[variant]
    _resize(experiment, layers, head_width=32)
    experiment.optimizer.warmup_steps = steps // 20
    experiment.train.num_steps = steps
    experiment.train.eval_every = steps
    experiment.train.checkpoint_every = steps
  elif variant == "large":
    _resize(experiment, 14, head_width=64, width=896)
    experiment.model.dtype = "bfloat16"
    experiment.optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=200)
    experiment.train.num_steps = 3_900
    experiment.train.batch_size = 512
    experiment.train.sequence_length = 512
    experiment.train.eval_every = 1_300
    experiment.train.checkpoint_every = 1_300
    # All of the text, 13 times on average.
    experiment.data.max_characters_per_domain = 100_000_000
  return experiment


def _resize(
  experiment: Experiment, layers: int, head_width: int, width: int = 0
) -> None:
  """Sets the shape of the model; a width of 0 stands for 32 for each layer."""
  model = experiment.model
  model.num_layers = layers
  model.width = model.expert_width = width or 32 * layers
  model.head_width = head_width
  model.num_heads = model.width // head_width
  model.num_kv_heads = max(1, model.num_heads // 2)


def _web3(variant: str) -> Experiment:
  pools, micro = variant == "pools", variant == "micro_batches"
  return Experiment(
    name=f"study_{variant}",
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
      pool_min=2 if pools else 0,
      pool_max=16 if pools else 0,
      router="domain" if variant == "router" else "learned",
    ),
    losses=LossesConfig(
      divergence_weight=0.0 if variant in ("pools", "router") else 0.01
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
    train=TrainConfig(
      num_steps=400,
      batch_size=48,
      sequence_length=128,
      accumulation_steps=6 if micro else 1,
      accumulation="per_micro_batch" if micro else "exact",
      log_every=20,
      eval_every=400,
      eval_rows=32,
      checkpoint_every=400,
      keep_checkpoints=1,
    ),
    data=DataConfig(
      files="corpora/text/*.jsonl.gz",
      taxonomy="corpora/taxonomy.yaml",
      granularity=variant if variant in LABELS else "fine",
      mixing="bytes",
      temperature=2.0,
      max_characters_per_domain=1_500_000,
    ),
  )


def _truth(variant: str) -> Experiment:
  pools, router = variant == "truth_pools", variant == "truth_router"
  return Experiment(
    name=f"study_{variant}",
    model=ModelConfig(
      vocabulary_size=257,
      num_layers=2,
      width=64,
      num_heads=4,
      num_kv_heads=2,
      head_width=16,
      num_experts=16,
      num_active_experts=2,
      expert_width=64,
      pool_min=2 if pools else 0,
      pool_max=16 if pools else 0,
      router="domain" if router else "learned",
    ),
    losses=LossesConfig(divergence_weight=0.01 if variant == "truth" else 0.0),
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20),
    train=TrainConfig(
      num_steps=400,
      batch_size=48,
      sequence_length=128,
      log_every=20,
      eval_every=100,
      eval_rows=64,
      checkpoint_every=400,
      keep_checkpoints=1,
    ),
    data=DataConfig(files="markov/0.5/text/*.jsonl.gz", tokenizer="byte"),
  )


def _post_training_base() -> Experiment:
  experiment = _truth("truth")
  experiment.name = f"study_{BASE}"
  experiment.losses = LossesConfig(
    balance_scope="sequence", divergence_weight=0.0
  )
  experiment.train.num_steps = 300
  experiment.train.batch_size = 12
  experiment.train.sequence_length = 512
  experiment.train.eval_every = 300
  experiment.train.eval_rows = 32
  experiment.train.checkpoint_every = 300
  experiment.data = DataConfig(
    tokenizer="byte",
    domains=(
      "code/python_source",
      "code/c_headers",
      "prose/documentation",
      "prose/legal",
      "tables/unicode",
    ),
    max_characters_per_domain=500_000,
  )
  return experiment
