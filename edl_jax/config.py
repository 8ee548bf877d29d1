"""An experiment as typed dataclasses: fields, defaults, flat form.

Experiment files (`experiments/*.py`) import only this module and define
`get_config(variant: str = "") -> Experiment`. Every field carries its help and
the values that it allows (see `fields`); `validation` checks them. Nothing here
touches a device.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from edl_jax.fields import Weight, field, nearest, rule_of


class UserError(Exception):
  """A mistake that the user can mend: reported in one line, exit code 2."""


# The classes compare and hash by value, so that JAX can take a configuration as
# static metadata. Treat it as immutable once `validation.validate` has run.


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """Sizes of the transformer (Qwen3-MoE shape), and how it is computed.

  Every option that changes the function that the model computes belongs here:
  training, evaluation and inspection of a checkpoint all see these fields.
  """

  vocabulary_size: int = field(
    4096, at_least=1, help="Vocabulary, V; a tokenizer may have fewer tokens."
  )
  num_layers: int = field(
    4, at_least=1, help="Layers of the transformer, dense ones included, L."
  )
  width: int = field(128, at_least=1, help="Width of the residual stream, M.")
  num_heads: int = field(
    4, at_least=1, help="Query heads, N, a multiple of num_kv_heads."
  )
  num_kv_heads: int = field(2, at_least=1, help="Key and value heads, K.")
  head_width: int = field(
    32, at_least=1, help="Width of an attention head, H. It must be even."
  )
  num_experts: int = field(
    16, at_least=1, help="Routed experts of a mixture-of-experts layer, E."
  )
  num_active_experts: int = field(
    2, at_least=1, help="Experts that the router chooses for each token, A."
  )
  router: str = field(
    "learned",
    choices=("learned", "domain"),
    help="Experts that a token's router may choose: all (learned), or the fixed"
    " ones of its row's fine domain (domain), as a reference.",
  )
  pool_min: int = field(
    0,
    at_least=0,
    help="Fewest experts in the pool that a document's tokens choose from in"
    " training. 0 for both bounds: no pools.",
  )
  pool_max: int = field(
    0, at_least=0, help="Most experts in the pool of a document."
  )
  expert_width: int = field(
    128, at_least=1, help="Hidden width of an expert, F."
  )
  num_shared_experts: int = field(
    0, at_least=0, help="Further experts, which every token passes through."
  )
  num_dense_layers: int = field(
    0, at_least=0, help="First layers, which have a SwiGLU in place of experts."
  )
  dense_width: int = field(
    512, at_least=1, help="Hidden width of the SwiGLU of a dense layer."
  )
  rope_theta: float = field(
    10_000.0, above=0, help="Base of the rotary position embedding."
  )
  norm_epsilon: float = field(
    1e-6, above=0, help="Added to the mean square inside RMSNorm."
  )
  dtype: str = field(
    "float32",
    choices=("float32", "bfloat16"),
    help="Type of activations and matrix products. Parameters, router and"
    " statistics are always float32.",
  )
  remat: str = field(
    "none",
    choices=("none", "full", "attention", "experts"),
    resumable=True,
    help="What the backward pass computes again. It keeps everything (none),"
    " the input of each layer (full), that and the output of attention"
    " (attention), or these and the first product of the experts (experts).",
  )
  logits_elements: int = field(
    1 << 22,
    at_least=1,
    resumable=True,
    help="Elements of the largest array of logits that a device holds at a"
    " time. With a large vocabulary, TPUs want 2**27 or more.",
  )
  scan_unroll: int = field(
    1,
    at_least=1,
    resumable=True,
    help="Layers in each iteration of the loop over layers. More layers take"
    " longer to compile and speed up small models on a CPU.",
  )


@dataclasses.dataclass(unsafe_hash=True)
class MoEConfig:
  """How devices bring tokens and experts together.

  These fields decide speed and memory. Options that change how tokens are
  routed change the function of the model and belong in `ModelConfig`:
  evaluation uses the defaults of this group whatever the experiment says.
  """

  dispatch: str = field(
    "gather",
    choices=("gather", "ragged_all_to_all", "ring", "capacity"),
    help="How tokens reach their experts. All experts come to the tokens"
    " (gather), or tokens travel to the devices of their experts, which"
    " mesh.expert spreads (ragged_all_to_all on TPU v5p and v6e, ring). These"
    " three compute the same function. In blocks of fixed size (capacity),"
    " training drops the tokens beyond an expert's capacity. Evaluation always"
    " gathers and drops none.",
  )
  capacity_factor: float = field(
    1.25,
    above=0,
    help="Places of an expert on each device under capacity dispatch, as a"
    " multiple of the tokens that it would get under perfect balance.",
  )


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
  """AdamW and its schedule."""

  learning_rate: float = field(1e-3, above=0, help="Peak learning rate.")
  schedule: str = field(
    "cosine",
    choices=("cosine", "wsd"),
    help="Learning rate after warm-up: half a cosine, or stable and then a"
    " linear decay (wsd).",
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
  checkpoint_every: int = field(
    100, at_least=1, resumable=True, help="Steps between two checkpoints."
  )
  keep_checkpoints: int = field(
    2, at_least=1, resumable=True, help="Newest checkpoints that are kept."
  )
  initial_checkpoint: str = field(
    "",
    help="Folder of a run, or of one of its checkpoints, whose parameters and"
    " tokenizer this run starts from. If empty, parameters start random.",
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
    " .zst too), Parquet, ArrayRecord, or plain text in a folder per domain. If"
    " empty, the text of this machine's Python packages is read.",
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
    choices=("fine", "coarse", "hierarchical", "shuffled"),
    help="Domain labels that L_ED compares: fine, coarse, or both"
    " (hierarchical, see losses.coarse_weight). As a control, shuffled gives"
    " every training row a random fine label.",
  )
  tokenizer: str = field(
    "bpe",
    help="bpe trains a byte-level BPE of model.vocabulary_size on the mixture,"
    " byte makes each byte a token, and a path names a tokenizer.json or a"
    " SentencePiece .model.",
  )
  max_characters_per_domain: int = field(
    3_000_000, at_least=1, help="Most characters that are read per domain."
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
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)


# The parts of an experiment, such as `losses`, by name.
GROUPS = {
  declared.name: declared.type
  for declared in dataclasses.fields(Experiment)
  if isinstance(declared.type, type) and dataclasses.is_dataclass(declared.type)
}

# Every field that can be set, by its dotted path.
FIELDS = {
  f"{group}.{declared.name}".lstrip("."): declared
  for group, holder in {"": Experiment, **GROUPS}.items()
  for declared in dataclasses.fields(holder)
  if group or declared.name not in GROUPS
}


def choose_variant(variant: str, known: tuple[str, ...] = ()) -> str:
  """Returns the variant of an experiment file; the first of `known` if empty.

  Raises:
    UserError: no such variant, or the file has none.
  """
  if variant and variant not in known:
    allowed = f"must be one of {', '.join(known)}" if known else "leave it out"
    raise UserError(f"variant {variant!r}: {allowed}")
  return variant or next(iter(known), "")


def choices(key: str) -> tuple[str, ...]:
  """Returns the values that the field `key` may take, such as "model.remat"."""
  return rule_of(FIELDS[key]).choices


def flatten(experiment: Experiment) -> dict[str, Any]:
  """Returns every leaf of `experiment` by its dotted path, in field order."""
  return {key: operator.attrgetter(key)(experiment) for key in FIELDS}


def unflatten(flat: Mapping[str, Any]) -> Experiment:
  """Inverse of `flatten`; lists (as JSON gives them) become tuples.

  Keys that are missing keep their defaults, so that a newer version reads the
  checkpoints of an older one.

  Raises:
    UserError: a key does not exist in this version.
  """
  experiment = Experiment()
  for key, value in flat.items():
    check_key(key)
    group, _, name = key.rpartition(".")
    holder = getattr(experiment, group) if group else experiment
    setattr(holder, name, _as_tuples(value))
  return experiment


def _as_tuples(value: Any) -> Any:
  """Turns lists into tuples, at any depth."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_as_tuples, value))
  return value


def check_key(key: str) -> None:
  """Raises UserError, naming the nearest right key, unless `key` exists."""
  if key in GROUPS:
    raise UserError(
      f"experiment.{key} is a group: set one of its fields, which"
      f" --describe={key} lists"
    )
  if key not in FIELDS:
    raise UserError(f"unknown key experiment.{key}; {nearest(key, FIELDS)}")


def differing_keys(
  saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
  """Lists `key: saved -> current` for keys that forbid resuming."""

  # Fields that an older version did not have take their defaults.
  saved = {**flatten(Experiment()), **saved}
  differing = []
  for key in dict.fromkeys([*current, *saved]):
    before, now = (_as_tuples(flat.get(key)) for flat in (saved, current))
    may_change = key in FIELDS and rule_of(FIELDS[key]).resumable
    if before != now and not may_change:
      differing.append(f"{key}: {before!r} -> {now!r}")
  return differing
