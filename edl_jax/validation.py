"""Checks of an experiment that need neither data nor devices.

Every field is checked against its own rule (see `fields`), and then the fields
that must fit each other, one function for each group.
"""

import dataclasses

from edl_jax import config, fields
from edl_jax.config import DataConfig, Experiment, ModelConfig, UserError
from edl_jax.metric_writers import writer_names
from edl_jax.profiling import parse_steps

# Tokens that each kind of trained tokenizer needs at least: a byte tokenizer
# has 256 bytes and the end of a document, BPE has merges beside them.
_LEAST_VOCABULARY = {"byte": 257, "bpe": 300}


def validate(experiment: Experiment) -> Experiment:
  """Checks all that can be checked without data or devices.

  Returns:
    The same experiment.

  Raises:
    UserError: one line that names the dotted path, the value and what is
      allowed.
  """
  for name, group in config.GROUPS.items():
    value = getattr(experiment, name)
    if type(value) is not group:
      raise UserError(f"{name}={value!r}: must be of type {group.__name__}")
  for key, value in config.flatten(experiment).items():
    if required := fields.requirement(value, config.FIELDS[key]):
      raise UserError(f"{key}={value!r}: must be {required}")
  _check_model(experiment.model)
  _check_router(experiment)
  _check_specialization(experiment)
  _check_token_pairs(experiment)
  _check_train(experiment)
  _check_mesh(experiment)
  _check_domains(experiment.data)
  _check_text(experiment.data)
  _check_weights(experiment.data)
  _check_tokenizer(experiment)
  return experiment


def _check_model(model: ModelConfig) -> None:
  if model.num_heads % model.num_kv_heads:
    raise UserError(
      f"model.num_heads={model.num_heads} is not a multiple of"
      f" model.num_kv_heads={model.num_kv_heads}"
    )
  if model.head_width % 2:
    raise UserError(
      f"model.head_width={model.head_width}: must be even, because rotary"
      " position embeddings rotate pairs of elements"
    )
  if model.num_active_experts > model.num_experts:
    raise UserError(
      f"model.num_active_experts={model.num_active_experts} exceeds"
      f" model.num_experts={model.num_experts}"
    )
  if model.shared_expert_gate and not model.num_shared_experts:
    raise UserError(
      "model.shared_expert_gate=True needs model.num_shared_experts of at"
      " least 1"
    )
  if model.rope_scaling == "none" and model.rope_factor != 1:
    raise UserError(
      f"model.rope_factor={model.rope_factor} needs model.rope_scaling=linear"
      " or yarn, not none"
    )
  if model.num_dense_layers >= model.num_layers:
    raise UserError(
      f"model.num_dense_layers={model.num_dense_layers} leaves no"
      f" mixture-of-experts layer in model.num_layers={model.num_layers}"
    )


def _check_router(experiment: Experiment) -> None:
  model = experiment.model
  least, most = model.pool_min, model.pool_max
  shown = f"model.pool_min={least}, model.pool_max={most}"
  if bool(least) != bool(most):
    raise UserError(f"{shown}: set both, or leave both 0")
  if least and not (
    model.num_active_experts <= least <= most <= model.num_experts
  ):
    raise UserError(
      f"{shown}: must rise from at least model.num_active_experts="
      f"{model.num_active_experts} to at most model.num_experts="
      f"{model.num_experts}"
    )
  if model.router != "domain":
    return
  name = "model.router='domain'"
  if experiment.train.task_every:
    raise UserError(
      f"{name} with train.task_every={experiment.train.task_every}: documents"
      " of tasks have no domain; set it to 0"
    )
  if least:
    raise UserError(
      f"{name} with {shown}: domains have fixed experts already; set"
      " model.pool_min and model.pool_max to 0, or model.router to learned"
    )
  if experiment.losses.divergence_weight:
    raise UserError(
      f"{name} with losses.divergence_weight="
      f"{experiment.losses.divergence_weight}: labels decide how far domains"
      " diverge, so the loss has nothing to teach; set it to 0"
    )
  if experiment.data.granularity.startswith("shuffled"):
    raise UserError(
      f"{name}: training would choose experts by random labels and evaluation"
      " by true ones; choose another data.granularity than"
      f" {experiment.data.granularity}"
    )


def _check_specialization(experiment: Experiment) -> None:
  model, losses = experiment.model, experiment.losses
  if losses.orthogonality_weight and model.num_active_experts < 2:
    raise UserError(
      f"losses.orthogonality_weight={losses.orthogonality_weight}: compares the"
      " active experts of a token and needs at least 2, not"
      f" model.num_active_experts={model.num_active_experts}"
    )
  if losses.orthogonality_weight and experiment.moe.dispatch == "ring":
    raise UserError(
      f"losses.orthogonality_weight={losses.orthogonality_weight}: needs the"
      " output of each expert by itself, but moe.dispatch='ring' only keeps"
      " their sum; choose another dispatch"
    )
  for key in ("orthogonality_weight", "variance_weight"):
    weight = getattr(losses, key)
    if isinstance(weight, str) and experiment.train.accumulation != "exact":
      raise UserError(
        f"losses.{key}={weight}: needs train.accumulation=exact, not"
        f" {experiment.train.accumulation}"
      )


def _check_token_pairs(experiment: Experiment) -> None:
  if experiment.losses.divergence_pairs != "tokens":
    return
  name, train = "losses.divergence_pairs='tokens'", experiment.train
  if train.accumulation == "exact" and train.accumulation_steps > 1:
    raise UserError(
      f"{name} with train.accumulation_steps={train.accumulation_steps}: pairs"
      " across micro-batches would be lost; set train.accumulation to"
      " per_micro_batch, or train.accumulation_steps to 1"
    )
  if experiment.losses.divergence != "jensen_shannon":
    raise UserError(
      f"{name} needs losses.divergence=jensen_shannon, not"
      f" {experiment.losses.divergence}"
    )
  if experiment.data.granularity == "hierarchical":
    raise UserError(
      f"{name}: two tokens either share a domain or do not, so"
      " data.granularity=hierarchical has no meaning; choose fine or coarse"
    )


def _check_train(experiment: Experiment) -> None:
  train, optimizer = experiment.train, experiment.optimizer
  if train.batch_size % train.accumulation_steps:
    raise UserError(
      f"train.batch_size={train.batch_size} is not a multiple of"
      f" train.accumulation_steps={train.accumulation_steps}"
    )
  if optimizer.warmup_steps > train.num_steps:
    raise UserError(
      f"optimizer.warmup_steps={optimizer.warmup_steps} exceeds"
      f" train.num_steps={train.num_steps}; lower it, or train for more steps"
    )
  try:
    profiled = parse_steps(train.profile_steps)
  except ValueError as error:
    raise UserError(
      f"train.profile_steps={train.profile_steps!r}: must be FIRST:LAST, such"
      " as 20:25, with steps that rise from 1"
    ) from error
  if profiled and profiled[1] > train.num_steps:
    raise UserError(
      f"train.profile_steps={train.profile_steps} ends behind"
      f" train.num_steps={train.num_steps}"
    )
  writer_names(experiment.metrics.writers)


def _check_mesh(experiment: Experiment) -> None:
  sizes = dataclasses.asdict(experiment.mesh)
  open_axes = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1:
    raise UserError(
      f"{' and '.join(open_axes)} are both -1: only one axis can take the"
      " devices that are left"
    )


def _check_domains(data: DataConfig) -> None:
  fine = [full.rpartition("/")[-1] for full in data.domains]
  for name, full in zip(fine, data.domains):
    if not name or full.count("/") > 1 or full.startswith("/"):
      raise UserError(
        f"data.domains: {full!r} must be written as fine or coarse/fine"
      )
    # Coarse names tell fine ones apart; a name without one cannot be told.
    if data.domains.count(full) > 1 or (
      fine.count(name) > 1 and name in data.domains
    ):
      raise UserError(f"data.domains: {name!r} occurs more than once")
  if data.taxonomy and data.domains:
    raise UserError(
      f"data.taxonomy={data.taxonomy} and data.domains={data.domains} both"
      " name the domains: give one of them"
    )


def _check_text(data: DataConfig) -> None:
  if data.prepared and data.files:
    raise UserError(
      f"data.prepared={data.prepared} and data.files={data.files} both name the"
      " text: give one of them"
    )
  if data.chat_template and not data.files:
    raise UserError(
      f"data.chat_template={data.chat_template}: only data.files has messages;"
      " set it too, or leave the template out"
    )
  if data.mixing == "equal" and data.temperature != 1:
    raise UserError(
      f"data.temperature={data.temperature}: needs data.mixing=tokens or"
      " bytes, not equal"
    )


def _check_weights(data: DataConfig) -> None:
  """Checks the weights of every phase, and the order of the phases."""
  sets = [("data.weights", data.weights)] if data.weights else []
  earlier = 0.0
  for number, phase in enumerate(data.weight_phases, start=1):
    name = f"data.weight_phases: phase {number}"
    start, *weights = phase or (0.0,)
    if not earlier < start < 1:
      raise UserError(
        f"{name} begins at {start}, which must lie between {earlier} and 1"
      )
    earlier = start
    sets.append((name, tuple(weights)))
  for name, weights in sets:
    if not any(weights):
      raise UserError(f"{name}={weights}: must not all be zero")
    if data.domains and len(weights) != len(data.domains):
      raise UserError(
        f"{name} has {len(weights)} entries for {len(data.domains)}"
        " data.domains"
      )


def _check_tokenizer(experiment: Experiment) -> None:
  name = experiment.data.tokenizer
  size = experiment.model.vocabulary_size
  is_path = name.endswith((".json", ".model")) or "/" in name
  if name not in _LEAST_VOCABULARY and not is_path:
    raise UserError(
      f"data.tokenizer={name!r}: must be bpe, byte, a file that ends in .json"
      " or .model, or a folder, such as hub/olmoe"
    )
  least = _LEAST_VOCABULARY.get(name, 0)
  # A run that starts from a checkpoint has the checkpoint's tokenizer.
  if size < least and not experiment.train.initial_checkpoint:
    raise UserError(
      f"model.vocabulary_size={size}: data.tokenizer={name!r} needs at least"
      f" {least}"
    )
