"""An experiment as typed dataclasses: defaults, validation, loading, flat dump.

Experiment files (`experiments/*.py`) import only this module and define
`get_config(variant: str = "") -> Experiment`. Everything here runs before any
device is touched.
"""

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags


class UserError(Exception):
  """Something the user can mend: reported as one line, with exit code 2."""


class Weight:
  """Type of a loss weight: a number, or "auto:TARGET".

  `auto:1e-4` finds the power of ten that brings the weighted loss nearest to
  1e-4 on the first batch, and keeps it.
  """


class _WeightParser(flags.ArgumentParser):
  """Reads numbers as numbers and leaves all else to `validate`."""

  def parse(self, argument: Any) -> Any:
    try:
      return float(argument)
    except ValueError:
      return argument


config_flags.register_flag_parser_for_type(Weight, _WeightParser())


def auto_target(weight: float | str) -> float | None:
  """Returns TARGET of a weight "auto:TARGET", None of a number."""
  if not isinstance(weight, str):
    return None
  return float(weight.removeprefix("auto:"))


# eq and hash by value make configurations usable as static pytree metadata;
# treat them as immutable once `validate` has run.
_config = dataclasses.dataclass(unsafe_hash=True)


@_config
class ModelConfig:
  """Sizes of the transformer (Qwen3-MoE shape)."""

  vocabulary_size: int = 4096
  num_layers: int = 4
  width: int = 128
  num_heads: int = 4
  num_kv_heads: int = 2
  head_width: int = 32
  num_experts: int = 16
  num_active_experts: int = 2
  expert_width: int = 128
  # Always-active experts of the same width, added to the routed ones.
  num_shared_experts: int = 0
  # The first layers may be dense, with a SwiGLU of `dense_width`.
  num_dense_layers: int = 0
  dense_width: int = 512
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-6
  # Compute type of activations and matrix products: "float32" or "bfloat16".
  # Parameters, router and statistics are float32 whatever is chosen.
  dtype: str = "float32"
  # What the backward pass computes again, layer by layer: "none"; "full", all
  # but the layer's input; "attention", all but that and attention's output; or
  # "experts", all but these and the experts' first product.
  remat: str = "none"
  # Elements of the largest array of logits that a device holds at a time. TPUs
  # want 2**27 and more where the vocabulary is large.
  logits_elements: int = 1 << 22
  # Layers unrolled in each turn of the scan over layers. More compile longer;
  # on a CPU the steps of a small model then take less time.
  scan_unroll: int = 1


@_config
class MoEConfig:
  """How tokens meet their experts."""

  # "gather": all experts come to the tokens. "ragged_all_to_all" (TPU v5p,
  # v6e) and "ring": tokens go to the experts, which mesh.expert spreads. These
  # differ in speed and memory alone. "capacity": as an all-to-all of blocks of
  # fixed size; tokens beyond an expert's capacity are dropped in training.
  # Evaluation gathers always.
  dispatch: str = "gather"
  # Places of an expert on each device, over the tokens that it would get if
  # all experts got alike.
  capacity_factor: float = 1.25


@_config
class LossesConfig:
  """Weights of L = L_LM + alpha L_LB + beta L_ED + zeta L_z + AES terms."""

  balance_weight: float = 0.01
  # Load balance over the "global" batch, or, for comparison, of each
  # "sequence" by itself, which suppresses specialisation.
  balance_scope: str = "global"
  divergence_weight: float = 0.0
  # What L_ED takes the logarithm of: a name of `divergence.DIVERGENCES`.
  divergence: str = "jensen_shannon"
  # Added to the divergence inside the logarithm.
  divergence_epsilon: float = 1e-8
  # Share of the coarse level in L_ED under data.granularity=hierarchical.
  coarse_weight: float = 0.5
  z_weight: float = 1e-4
  # Advancing Expert Specialization (arXiv:2505.22323): orthogonality of the
  # active experts' outputs, variance of the routing weights. Numbers, or
  # "auto:1e-4" and "auto:1e-3" as its authors do.
  orthogonality_weight: Weight = 0.0
  variance_weight: Weight = 0.0
  # Both as the "paper" writes them, or as its authors' "released" code does.
  specialization_form: str = "paper"


@_config
class OptimizerConfig:
  """AdamW and its schedule."""

  learning_rate: float = 1e-3
  # "cosine", or "wsd": warm-up, stable, decay.
  schedule: str = "cosine"
  warmup_steps: int = 50
  # Share of all steps in the final linear decay of "wsd".
  decay_fraction: float = 0.2
  # Final learning rate over the peak.
  final_fraction: float = 0.1
  weight_decay: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0
  # Keeps both moments in the memory of the host, two thirds of what a device
  # stores between steps; each step fetches them and sends them back.
  offload: bool = False


@_config
class TrainConfig:
  """The loop. Batch sizes count rows of the *global* batch."""

  num_steps: int = 200
  batch_size: int = 16
  sequence_length: int = 256
  accumulation_steps: int = 1
  # "exact": the objective of the global batch, for one more forward pass.
  # "per_micro_batch": the mean of the objectives of the micro-batches.
  accumulation: str = "exact"
  log_every: int = 10
  eval_every: int = 100
  # Rows evaluated per domain at most; -1 takes all that was held out.
  eval_rows: int = 16
  checkpoint_every: int = 100
  keep_checkpoints: int = 2
  # A run's folder, or a checkpoint in it, whose parameters and tokenizer this
  # run starts from, for post-training; empty: random parameters.
  initial_checkpoint: str = ""


@_config
class MeshConfig:
  """Devices along each mesh axis; at most one -1 takes what is left."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  # Spreads the tokens of each row, for sequences too long for one device.
  sequence: int = 1


@_config
class DataConfig:
  """Where text comes from and how its domains are named and mixed."""

  # A glob of files: JSON lines with the keys "text" and "domain" (.gz, .zst
  # too), Parquet, ArrayRecord, or plain text in a folder per domain. Empty:
  # the embedded mixture `python_install`.
  files: str = ""
  # A folder that `python -m data.prepare` wrote, read in place of `files` and
  # with its own tokenizer; empty: none.
  prepared: str = ""
  # A taxonomy file (YAML): domains, their coarse parents, their weights.
  taxonomy: str = ""
  # Domain names as "fine" or "coarse/fine". Empty: the embedded taxonomy, or
  # with `files` every domain found in them.
  domains: tuple[str, ...] = ()
  # Share of rows by domain, in the order of `domains` (or of the taxonomy,
  # where unlabelled rows come last); empty: as the taxonomy file has them, or
  # equal.
  weights: tuple[float, ...] = ()
  # What weights multiply: "equal" shares, or the domain's training text in
  # "tokens" or "bytes" to the power of 1 / `temperature`.
  mixing: str = "equal"
  # 1: in proportion to size; the larger, the more alike the shares.
  temperature: float = 1.0
  # Later weights, each phase (F, weights...): in use from the fraction F of
  # train.num_steps on.
  weight_phases: tuple[tuple[float, ...], ...] = ()
  # What the divergence loss calls a domain: "fine", "coarse", "hierarchical"
  # (both, see losses.coarse_weight), or the control "shuffled", which gives
  # every training row a random fine label.
  granularity: str = "fine"
  # "bpe": byte-level BPE of model.vocabulary_size trained on the mixture;
  # "byte": one token a byte; or the path of a tokenizer.json or of a
  # SentencePiece .model.
  tokenizer: str = "bpe"
  # Characters read per domain at most.
  max_characters_per_domain: int = 3_000_000
  # Share of documents, by hash, that is held out for evaluation.
  held_out_fraction: float = 0.05


@_config
class Experiment:
  """All that decides a run."""

  name: str = "experiment"
  seed: int = 0
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
  losses: LossesConfig = dataclasses.field(default_factory=LossesConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)


# Fields that may change between a checkpoint and its continuation: they alter
# where or how often something happens, not what is computed.
RESUMABLE_KEYS = frozenset(
  {
    "name",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
    "mesh.sequence",
    "model.remat",
    "model.scan_unroll",
    "model.logits_elements",
    "optimizer.offload",
    "train.log_every",
    "train.eval_every",
    "train.eval_rows",
    "train.checkpoint_every",
    "train.keep_checkpoints",
  }
)

_CHOICES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "attention", "experts"),
  "moe.dispatch": ("gather", "ragged_all_to_all", "ring", "capacity"),
  "losses.balance_scope": ("global", "sequence"),
  "losses.divergence": (
    "jensen_shannon",
    "hellinger",
    "total_variation",
    "symmetric_kl",
    "wasserstein",
  ),
  "losses.specialization_form": ("paper", "released"),
  "optimizer.schedule": ("cosine", "wsd"),
  "train.accumulation": ("exact", "per_micro_batch"),
  "data.mixing": ("equal", "tokens", "bytes"),
  "data.granularity": ("fine", "coarse", "hierarchical", "shuffled"),
}

_POSITIVE = (
  "model.vocabulary_size",
  "model.num_layers",
  "model.width",
  "model.num_heads",
  "model.num_kv_heads",
  "model.head_width",
  "model.num_experts",
  "model.num_active_experts",
  "model.expert_width",
  "model.dense_width",
  "model.rope_theta",
  "model.norm_epsilon",
  "model.scan_unroll",
  "model.logits_elements",
  "moe.capacity_factor",
  "losses.divergence_epsilon",
  "optimizer.learning_rate",
  "optimizer.clip_norm",
  "train.num_steps",
  "train.batch_size",
  "train.sequence_length",
  "train.accumulation_steps",
  "train.log_every",
  "train.eval_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "data.max_characters_per_domain",
  "data.temperature",
)

_NOT_NEGATIVE = (
  "model.num_shared_experts",
  "model.num_dense_layers",
  "losses.balance_weight",
  "losses.divergence_weight",
  "losses.z_weight",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
)

_FRACTION = (
  "losses.coarse_weight",
  "optimizer.decay_fraction",
  "optimizer.final_fraction",
  "optimizer.beta1",
  "optimizer.beta2",
)


def flatten(experiment: Experiment) -> dict[str, Any]:
  """Returns every leaf of `experiment` by its dotted path, in field order."""
  flat = {}
  for field in dataclasses.fields(experiment):
    value = getattr(experiment, field.name)
    if dataclasses.is_dataclass(value):
      for key, leaf in flatten(value).items():
        flat[f"{field.name}.{key}"] = leaf
    else:
      flat[field.name] = value
  return flat


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
    *parents, name = key.split(".")
    holder = experiment
    for parent in parents:
      holder = getattr(holder, parent)
    setattr(holder, name, _as_tuples(value))
  return experiment


def _as_tuples(value: Any) -> Any:
  """Turns lists into tuples, at any depth."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_as_tuples, value))
  return value


def check_key(key: str) -> None:
  """Raises UserError, naming the nearest right key, unless `key` exists."""
  known = list(flatten(Experiment()))
  if key in known:
    return
  # Compare whole paths first, then last names, which finds a right name under
  # a wrong parent.
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
  if not near:
    by_last = {path.rsplit(".")[-1]: path for path in known}
    last = difflib.get_close_matches(
      key.rsplit(".")[-1], by_last, n=1, cutoff=0.6
    )
    near = [by_last[name] for name in last]
  hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
  raise UserError(f"unknown key experiment.{key}; {hint}")


def differing_keys(
  saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
  """Lists `key: saved -> current` for keys that forbid resuming."""

  def plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
      return list(map(plain, value))
    return value

  # As `unflatten` reads what an older version saved.
  saved = {**flatten(Experiment()), **saved}
  keys = [*current, *(key for key in saved if key not in current)]
  return [
    f"{key}: {plain(saved.get(key))!r} -> {plain(current.get(key))!r}"
    for key in keys
    if key not in RESUMABLE_KEYS
    and plain(saved.get(key)) != plain(current.get(key))
  ]


def validate(experiment: Experiment) -> Experiment:
  """Checks all that can be checked without data or devices.

  Returns:
    The same experiment.

  Raises:
    UserError: one line that names the dotted path and the values.
  """
  flat = flatten(experiment)
  _check_types(experiment)
  if not 0 <= experiment.seed < 2**32:
    raise UserError(f"seed={experiment.seed}: must lie in [0, 2**32)")
  for key, value in flat.items():
    if not all(math.isfinite(x) for x in _leaves(value)):
      raise UserError(f"{key}={value}: must be finite")
  for key, choices in _CHOICES.items():
    if flat[key] not in choices:
      raise UserError(
        f"{key}={flat[key]!r}: must be one of {', '.join(choices)}"
      )
  for key in _POSITIVE:
    if flat[key] <= 0:
      raise UserError(f"{key}={flat[key]}: must be positive")
  for key in _NOT_NEGATIVE:
    if flat[key] < 0:
      raise UserError(f"{key}={flat[key]}: must not be negative")
  for key in _FRACTION:
    if not 0 <= flat[key] <= 1:
      raise UserError(f"{key}={flat[key]}: must lie in [0, 1]")
  for key in ("optimizer.beta1", "optimizer.beta2"):
    if flat[key] == 1:
      raise UserError(f"{key}=1: must be less than 1")
  _validate_model(experiment.model)
  _validate_specialization(experiment)
  _validate_train(experiment)
  _validate_data(experiment)
  return experiment


def _leaves(value: Any) -> Iterator[float]:
  """Yields every float of a value, at any depth of tuples."""
  if isinstance(value, tuple):
    for item in value:
      yield from _leaves(item)
  elif isinstance(value, float):
    yield value


def _check_types(holder: Any, prefix: str = "") -> None:
  """Checks every field against its annotation; an int is a float too."""
  for name, wanted in typing.get_type_hints(type(holder)).items():
    value, key = getattr(holder, name), f"{prefix}{name}"
    element = next(iter(typing.get_args(wanted)), None)
    if dataclasses.is_dataclass(wanted) and isinstance(value, wanted):
      _check_types(value, f"{key}.")
    elif element is not None:
      if not _is_tuple_of(value, element):
        nested = typing.get_args(element)
        shown = (
          f"tuples of {nested[0].__name__}" if nested else element.__name__
        )
        raise UserError(f"{key}={value!r}: must be a tuple of {shown}")
    elif wanted is Weight:
      _check_weight(key, value)
    elif not _is_a(value, wanted):
      raise UserError(f"{key}={value!r}: must be of type {wanted.__name__}")


def _check_weight(key: str, value: Any) -> None:
  """Raises UserError unless `value` is a number >= 0 or "auto:TARGET"."""
  number = value
  if isinstance(value, str) and value.startswith("auto:"):
    with contextlib.suppress(ValueError):
      number = auto_target(value) or -1.0
  if not _is_a(number, float) or not 0 <= number < math.inf:
    raise UserError(
      f"{key}={value!r}: must be a number that is not negative, or auto:TARGET"
      " such as auto:1e-4"
    )


def _is_tuple_of(value: Any, element: Any) -> bool:
  inner = next(iter(typing.get_args(element)), None)
  return isinstance(value, tuple) and all(
    _is_tuple_of(item, inner) if inner else _is_a(item, element)
    for item in value
  )


def _is_a(value: Any, wanted: type) -> bool:
  accepted = (int, float) if wanted is float else wanted
  # bool is an int to Python, but never meant as a number here.
  is_bool = isinstance(value, bool)
  return isinstance(value, accepted) and is_bool == (wanted is bool)


def _validate_model(model: ModelConfig) -> None:
  if model.num_heads % model.num_kv_heads:
    raise UserError(
      f"model.num_heads={model.num_heads} is not a multiple of"
      f" model.num_kv_heads={model.num_kv_heads}"
    )
  if model.head_width % 2:
    raise UserError(
      f"model.head_width={model.head_width}: must be even, rotary position"
      " embedding turns pairs"
    )
  if model.num_active_experts > model.num_experts:
    raise UserError(
      f"model.num_active_experts={model.num_active_experts} exceeds"
      f" model.num_experts={model.num_experts}"
    )
  if model.num_dense_layers >= model.num_layers:
    raise UserError(
      f"model.num_dense_layers={model.num_dense_layers} leaves no"
      f" mixture-of-experts layer in model.num_layers={model.num_layers}"
    )


def _validate_specialization(experiment: Experiment) -> None:
  model, losses = experiment.model, experiment.losses
  if losses.orthogonality_weight and model.num_active_experts < 2:
    raise UserError(
      f"losses.orthogonality_weight={losses.orthogonality_weight}: compares"
      " active experts, of which there is"
      f" model.num_active_experts={model.num_active_experts}"
    )
  if losses.orthogonality_weight and experiment.moe.dispatch == "ring":
    raise UserError(
      f"losses.orthogonality_weight={losses.orthogonality_weight}: needs each"
      " expert's output of a token, which moe.dispatch='ring' adds up on the"
      " way; choose another dispatch"
    )
  for key in ("orthogonality_weight", "variance_weight"):
    weight = getattr(losses, key)
    if isinstance(weight, str) and experiment.train.accumulation != "exact":
      raise UserError(
        f"losses.{key}={weight}: needs train.accumulation=exact, not"
        f" {experiment.train.accumulation}"
      )


def _validate_train(experiment: Experiment) -> None:
  train, mesh = experiment.train, experiment.mesh
  if train.batch_size % train.accumulation_steps:
    raise UserError(
      f"train.batch_size={train.batch_size} is not a multiple of"
      f" train.accumulation_steps={train.accumulation_steps}"
    )
  if train.eval_rows < 1 and train.eval_rows != -1:
    raise UserError(
      f"train.eval_rows={train.eval_rows}: must be positive, or -1 for all"
    )
  if experiment.optimizer.warmup_steps > train.num_steps:
    raise UserError(
      f"optimizer.warmup_steps={experiment.optimizer.warmup_steps} exceeds"
      f" train.num_steps={train.num_steps}"
    )
  axes = dataclasses.asdict(mesh)
  for axis, size in axes.items():
    if size < 1 and size != -1:
      raise UserError(
        f"mesh.{axis}={size}: must be positive, or -1 for what is left"
      )
  if list(axes.values()).count(-1) > 1:
    wild = " and ".join(f"mesh.{axis}" for axis, n in axes.items() if n == -1)
    raise UserError(f"{wild} are both -1: at most one axis can be")


def _validate_data(experiment: Experiment) -> None:
  data = experiment.data
  if not 0 < data.held_out_fraction < 1:
    raise UserError(
      f"data.held_out_fraction={data.held_out_fraction}: must lie between"
      " 0 and 1"
    )
  names = [name.rsplit("/", 1)[-1] for name in data.domains]
  for name, full in zip(names, data.domains):
    if not name or full.count("/") > 1 or full.startswith("/"):
      raise UserError(
        f"data.domains: {full!r} must be written as fine or coarse/fine"
      )
    if names.count(name) > 1:
      raise UserError(f"data.domains: {name!r} occurs more than once")
  if data.taxonomy and data.domains:
    raise UserError(
      f"data.taxonomy={data.taxonomy} and data.domains={data.domains} both"
      " name the domains: give one of them"
    )
  if data.prepared and data.files:
    raise UserError(
      f"data.prepared={data.prepared} and data.files={data.files} both name the"
      " text: give one of them"
    )
  if data.mixing == "equal" and data.temperature != 1:
    raise UserError(
      f"data.temperature={data.temperature}: needs data.mixing=tokens or"
      " bytes, not equal"
    )
  _validate_weights(data)
  if data.tokenizer not in ("bpe", "byte") and not data.tokenizer.endswith(
    (".json", ".model")
  ):
    raise UserError(
      f"data.tokenizer={data.tokenizer!r}: must be bpe, byte, or the path of a"
      " file that ends in .json or .model"
    )
  if data.tokenizer == "byte" and experiment.model.vocabulary_size < 257:
    raise UserError(
      f"model.vocabulary_size={experiment.model.vocabulary_size}:"
      " data.tokenizer='byte' needs at least 257"
    )
  if data.tokenizer == "bpe" and experiment.model.vocabulary_size < 300:
    raise UserError(
      f"model.vocabulary_size={experiment.model.vocabulary_size}:"
      " data.tokenizer='bpe' needs at least 300 (256 bytes, and merges)"
    )


def _validate_weights(data: DataConfig) -> None:
  """Checks the weights of every phase, and when phases begin."""
  sets = [("data.weights", data.weights)] if data.weights else []
  earlier = 0.0
  for number, (start, *weights) in enumerate(
    (phase or (0.0,) for phase in data.weight_phases), start=1
  ):
    name = f"data.weight_phases: phase {number}"
    if not earlier < start < 1:
      raise UserError(
        f"{name} begins at {start}, which must lie between {earlier} and 1"
      )
    earlier = start
    sets.append((name, tuple(weights)))
  for name, weights in sets:
    if any(weight < 0 for weight in weights):
      raise UserError(f"{name}={weights}: must not be negative")
    if sum(weights) <= 0:
      raise UserError(f"{name}={weights}: must not all be zero")
    if data.domains and len(weights) != len(data.domains):
      raise UserError(
        f"{name} has {len(weights)} entries for {len(data.domains)}"
        " data.domains"
      )
