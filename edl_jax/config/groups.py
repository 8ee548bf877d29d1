"""The parts of an experiment as typed dataclasses.

Every field carries its help and the values that it allows (see `fields`);
`validation` checks them.
"""

import dataclasses
from typing import Any

from edl_jax.config.model import ModelConfig, MoEConfig
from edl_jax.fields import Weight, field


class UserError(Exception):
  """A mistake that the user can mend: reported in one line, exit code 2."""


# The classes compare and hash by value, so that JAX can take a configuration as
# static metadata. Treat it as immutable once `validation.validate` has run.


@dataclasses.dataclass(unsafe_hash=True)
class LossesConfig:
  """Weights of L = L_LM + alpha L_LB + beta L_ED + zeta L_z + AES terms.

  AES is Advancing Expert Specialization, arXiv:2505.22323.
  """

  balance_weight: float = field(
    0.01, at_least=0, help="Weight of the load-balance loss L_LB, alpha."
  )
  balance_scope: str = field(
    "global",
    choices=("global", "sequence"),
    help="What L_LB balances: the global batch, or each sequence by itself,"
    " which suppresses specialization and serves as a comparison.",
  )
  divergence_weight: float = field(
    0.0, at_least=0, help="Weight of the expert divergence loss L_ED, beta."
  )
  divergence_schedule: str = field(
    "constant",
    choices=("constant", "warmup", "decay"),
    help="divergence_weight over the run: the same at every step (constant),"
    " rising from 0 over the first divergence_fraction of the steps (warmup),"
    " or falling to 0 over the last (decay).",
  )
  divergence_fraction: float = field(
    0.2,
    above=0,
    at_most=1,
    help="Share of the steps in the rise or fall of divergence_schedule.",
  )
  divergence: str = field(
    "jensen_shannon",
    choices=(
      "jensen_shannon",
      "hellinger",
      "total_variation",
      "symmetric_kl",
      "wasserstein",
    ),
    help="Divergence between two domains' mean router probabilities, whose"
    " logarithm L_ED takes.",
  )
  divergence_epsilon: float = field(
    1e-8, above=0, help="Added to the divergence inside the logarithm."
  )
  divergence_pairs: str = field(
    "domains",
    choices=("domains", "tokens"),
    help="What L_ED compares: the mean routing of every two domains, or sampled"
    " pairs of tokens, whose mean divergence within domains it lowers and"
    " between domains raises.",
  )
  num_token_pairs: int = field(
    4096, at_least=1, help="Pairs of tokens sampled per step, if any."
  )
  coarse_weight: float = field(
    0.5, at_least=0, at_most=1, help="Coarse share of hierarchical L_ED."
  )
  z_weight: float = field(
    1e-4, at_least=0, help="Weight of the router z-loss L_z, zeta."
  )
  output_z_weight: float = field(
    0.0,
    at_least=0,
    help="Weight of the z-loss of the output's logits, such as 1e-4, which"
    " keeps them from drifting.",
  )
  orthogonality_weight: Weight = field(
    0.0,
    at_least=0,
    help="Weight of the AES loss L_o, which makes the outputs of a token's"
    " active experts orthogonal. Its authors use auto:1e-4.",
  )
  variance_weight: Weight = field(
    0.0,
    at_least=0,
    help="Weight of the AES loss L_v, which makes routing weights vary. Its"
    " authors use auto:1e-3.",
  )
  specialization_form: str = field(
    "paper",
    choices=("paper", "released"),
    help="Whether L_o and L_v follow the text of the AES paper or its authors'"
    " released code.",
  )


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
  """AdamW or Muon, and the learning rate."""

  algorithm: str = field(
    "adamw",
    choices=("adamw", "muon"),
    help="AdamW for all parameters, or Muon for the matrices of layers and"
    " AdamW for embedding, head and norms. Muon's updates are of AdamW's size,"
    " so that both take the same learning rate.",
  )
  muon_momentum: float = field(
    0.95, at_least=0, below=1, help="Decay of Muon's momentum, per step."
  )

  learning_rate: float = field(1e-3, above=0, help="Peak learning rate.")
  schedule: str = field(
    "cosine",
    choices=("cosine", "wsd", "linear"),
    help="Learning rate after warm-up: half a cosine, stable and then a linear"
    " decay (wsd), or a linear decay.",
  )
  warmup_steps: int = field(
    50, at_least=0, help="Steps of linear warm-up to the peak."
  )
  decay_fraction: float = field(
    0.2, at_least=0, at_most=1, help="Share of steps in the decay of wsd."
  )
  final_fraction: float = field(
    0.1, at_least=0, at_most=1, help="Final rate as a share of the peak."
  )
  weight_decay: float = field(
    0.1, at_least=0, help="Weight decay of all parameters but norm scales."
  )
  beta1: float = field(
    0.9, at_least=0, below=1, help="Decay of Adam's first moment, per step."
  )
  beta2: float = field(
    0.95, at_least=0, below=1, help="Decay of Adam's second moment, per step."
  )
  clip_norm: float = field(
    1.0, above=0, help="Largest global norm of the gradient; it is scaled."
  )
  bias_rate: float = field(
    1e-3,
    above=0,
    help="Change of an expert's bias per step, in units of router scores, where"
    " model.balancing has a bias.",
  )
  bias_schedule: str = field(
    "constant",
    choices=("constant", "learning_rate"),
    help="Whether bias_rate stays (constant), as in DeepSeek-V3 until near the"
    " end, or falls with the learning rate after warm-up (learning_rate), so"
    " that loads come to rest.",
  )
  rates: str = field(
    "",
    help="Factors of the learning rate of parts, as PATTERN=FACTOR entries that"
    " commas separate, such as *router_ME=0.1,head_MV=2. The first pattern"
    " that matches a parameter's name counts; others learn at the rate itself.",
  )
  trainable: str = field(
    "*",
    help="The parameters to train, as patterns of their names that commas"
    " separate, such as blocks/moe/*,head_MV; * stands for any characters. All"
    " others stay as they are and have no moments.",
  )
  offload: bool = field(
    False,
    resumable=True,
    help="Keeps both moments in the host's memory, which frees two thirds of"
    " what a device stores between steps. Each step transfers them twice.",
  )


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
  """The training loop. Batch sizes count rows of the *global* batch."""

  num_steps: int = field(200, at_least=1, help="Optimizer steps of the run.")
  batch_size: int = field(
    16, at_least=1, help="Rows of the global batch of one step, B."
  )
  sequence_length: int = field(256, at_least=1, help="Tokens of a row, T.")
  accumulation_steps: int = field(
    1, at_least=1, help="Micro-batches in the global batch of one step."
  )
  accumulation: str = field(
    "exact",
    choices=("exact", "per_micro_batch"),
    help="Objective of several micro-batches: that of the global batch, for one"
    " more forward pass (exact), or the mean of theirs (per_micro_batch).",
  )
  log_every: int = field(
    10, at_least=1, resumable=True, help="Steps between two lines of metrics."
  )
  eval_every: int = field(
    100, at_least=1, resumable=True, help="Steps between two evaluations."
  )
  eval_rows: int = field(
    16,
    at_least=1,
    also=-1,
    resumable=True,
    help="Largest number of held-out rows that are evaluated per domain. -1"
    " evaluates all of them.",
  )
  task_every: int = field(
    0,
    at_least=0,
    resumable=True,
    help="Steps between two evaluations on benchmark tasks, which also follow"
    " the last step. 0 evaluates none.",
  )
  task_files: str = field(
    "benchmarks_data",
    resumable=True,
    help="Folder of the task files, which python -m data.benchmarks writes.",
  )
  tasks: tuple[str, ...] = field(
    (),
    resumable=True,
    help="The tasks, groups or files, such as piqa.rc, of train.task_files. If"
    " empty, all of them.",
  )
  task_documents: int = field(
    100,
    at_least=0,
    resumable=True,
    help="Most documents of a task file, taken evenly from it. 0 takes all.",
  )
  checkpoint_every: int = field(
    100, at_least=1, resumable=True, help="Steps between two checkpoints."
  )
  keep_checkpoints: int = field(
    2, at_least=1, resumable=True, help="Newest checkpoints that are kept."
  )
  skip_spikes: float = field(
    0.0,
    at_least=1,
    also=0,
    help="Skips a step whose gradient norm is not finite, or exceeds this times"
    " the median of the last 128 steps. A skipped step changes nothing but the"
    " data that were read. 0 skips none.",
  )
  skip_at_most: int = field(
    10, at_least=1, help="Most steps to skip in a row; the next one is taken."
  )
  ema: float = field(
    0.0,
    at_least=0,
    below=1,
    help="Decay per step of the moving average of parameters, such as 0.999."
    " Evaluation, loading and export then use the average. 0 keeps none.",
  )
  initial_checkpoint: str = field(
    "",
    help="Folder of a run, or of one of its checkpoints, whose parameters and"
    " tokenizer this run starts from. If empty, parameters start random.",
  )

  profile_steps: str = field(
    "",
    resumable=True,
    help="First and last step of a trace for XProf, such as 20:25; empty for"
    " none. The run says where it is and how to open it.",
  )


@dataclasses.dataclass(unsafe_hash=True)
class MetricsConfig:
  """Where the metrics of a run go."""

  writers: str = field(
    "tensorboard",
    resumable=True,
    help="Places that get metrics beside metrics.jsonl, separated by commas:"
    " tensorboard, and wandb (Weights & Biases), which needs"
    " requirements-wandb.txt. Empty for none.",
  )
  project: str = field(
    "edl_jax", resumable=True, help="Project in Weights & Biases."
  )


def _axis(size: int, help: str) -> Any:
  return field(size, at_least=1, also=-1, resumable=True, help=help)


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
  """Devices along each axis of the mesh; -1 takes those that are left."""

  data: int = _axis(
    -1, "Devices that share out rows and each store all parameters."
  )
  fsdp: int = _axis(
    1, "Devices that share out rows and store the parameters together."
  )
  expert: int = _axis(
    1, "Devices that share out rows and the experts of each layer."
  )
  tensor: int = _axis(
    1, "Devices that share out attention heads, hidden widths and vocabulary."
  )
  sequence: int = _axis(
    1, "Devices that share out the tokens of each row, where rows are long."
  )


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
  """Where text comes from, and how its domains are named and mixed."""

  files: str = field(
    "",
    help="Glob of text files: JSON lines with the keys text and domain (.gz and"
    " .zst too), Parquet, ArrayRecord, or plain text in a folder per domain."
    " Supervised examples are JSON lines or Parquet with prompt and completion,"
    " or with messages, in place of text. If empty, the text of this machine's"
    " Python packages is read.",
  )
  prepared: str = field(
    "",
    help="Folder that python -m data.prepare wrote, with tokens and their"
    " tokenizer. It takes the place of data.files.",
  )
  taxonomy: str = field(
    "", help="YAML file of domains, their coarse parents and weights."
  )
  domains: tuple[str, ...] = field(
    (),
    help="Names of domains as fine or coarse/fine. Empty: those of the text.",
  )
  weights: tuple[float, ...] = field(
    (),
    at_least=0,
    help="Weights of the domains in the mixture, in the order of data.domains"
    " or of the taxonomy, unlabelled rows last. If empty, those of the taxonomy"
    " file, or equal ones.",
  )
  mixing: str = field(
    "equal",
    choices=("equal", "tokens", "bytes"),
    help="What the weights multiply: equal shares, or the size of each domain's"
    " training text to the power of 1 / data.temperature.",
  )
  temperature: float = field(
    1.0,
    above=0,
    help="1 mixes domains in proportion to their size. A higher temperature"
    " makes the shares more alike.",
  )
  weight_phases: tuple[tuple[float, ...], ...] = field(
    (),
    at_least=0,
    help="Later weights, as (F, weights...) for each phase. A phase begins at"
    " the fraction F of train.num_steps.",
  )
  granularity: str = field(
    "fine",
    choices=("fine", "coarse", "hierarchical", "shuffled", "shuffled_coarse"),
    help="Domain labels that L_ED compares: fine, coarse, or both"
    " (hierarchical, see losses.coarse_weight). As controls, shuffled gives"
    " every training row a random fine label, and shuffled_coarse compares the"
    " coarse labels of these.",
  )
  tokenizer: str = field(
    "bpe",
    help="bpe trains a byte-level BPE of model.vocabulary_size on the mixture,"
    " byte makes each byte a token, and a path names a tokenizer.json, a"
    " SentencePiece .model, or the folder of a checkpoint with one of them.",
  )
  chat_template: str = field(
    "",
    help="File of the Jinja template that writes the messages of supervised"
    " examples as text. If empty, the one that came with imported weights.",
  )
  max_characters_per_domain: int = field(
    3_000_000, at_least=1, help="Most characters that are read per domain."
  )
  skip_bad: bool = field(
    False,
    help="Leaves out records of data.files that are wrong, and says how many,"
    " instead of stopping at the first.",
  )
  held_out_fraction: float = field(
    0.05, above=0, below=1, help="Fraction of documents to evaluate on."
  )


@dataclasses.dataclass(unsafe_hash=True)
class Experiment:
  """Everything that decides a run."""

  name: str = field(
    "experiment", resumable=True, help="Name of the run, shown in its reports."
  )
  seed: int = field(
    0, at_least=0, below=2**32, help="Seed of parameters and row order."
  )
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
  losses: LossesConfig = dataclasses.field(default_factory=LossesConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
