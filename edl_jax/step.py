"""One training step: objective, gradient, update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax import sharding
from edl_jax.config import Experiment, LossesConfig, TrainConfig
from edl_jax.losses import routing, token_pairs
from edl_jax.losses.objective import (
  LossContext,
  auto_weights,
  objective,
  summaries,
  weight_factors,
)
from edl_jax.model.balancing import balanced
from edl_jax.model.choice import draw_pool_sizes
from edl_jax.model.transformer import Model, abstract_model, training_flops
from edl_jax.optim import (
  make_bias_schedule,
  make_optimizer,
  make_schedule,
  merged,
  rate_factors,
  trained,
)
from edl_jax.runtime import peak_flops
from edl_jax.spikes import Spikes, judge, no_spikes
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy

# The value of `model.remat` that `rematerialization.resolve` replaces.
AUTO = "auto"


class TrainState(NamedTuple):
  """The state that a training step maps to the next state."""

  # Optimizer steps taken, int32 scalar.
  step: jax.Array
  model: Model
  optimizer: Any
  # The "auto:TARGET" loss weights that the first batch set, float32 scalars.
  auto_weights: dict[str, jax.Array]
  # Moving average of the trained parameters; None without `train.ema`.
  ema: Any = None
  # What `train.skip_spikes` remembers; None without it.
  spikes: Spikes | None = None


class StepOutput(NamedTuple):
  """What a training step reports; arrays stay on the device until read."""

  # Scalars: the loss terms, "grad_norm" and "learning_rate"; with
  # `train.skip_spikes` also "grad_norm_median", "skipped", whether the step
  # was, and "skipped_steps", the number of steps that were.
  scalars: dict[str, jax.Array]
  routing: routing.RoutingStats


def averaged(state: TrainState) -> Model:
  """Returns the model to evaluate: that of averages, where there are some."""
  return state.model if state.ema is None else merged(state.ema, state.model)


def starting_from(
  state: TrainState, model: Model, experiment: Experiment
) -> TrainState:
  """Returns a new run's state with another model, and averages from it on.

  The model is computed as the state's own was, such as in its `model.dtype`.
  """
  arrays = jax.tree.leaves(model)
  model = jax.tree.unflatten(jax.tree.structure(state.model), arrays)
  state = state._replace(model=model)
  if state.ema is None:
    return state
  # A copy: the training step donates both.
  ema = jax.tree.map(jnp.copy, trained(experiment.optimizer, model))
  return state._replace(ema=ema)


def _coarse_weight(experiment: Experiment) -> float:
  """Returns the share of the coarse level in the divergence loss."""
  by_granularity = {
    "coarse": 1.0,
    "shuffled_coarse": 1.0,
    "hierarchical": experiment.losses.coarse_weight,
  }
  return by_granularity.get(experiment.data.granularity, 0.0)


def _losses(experiment: Experiment) -> LossesConfig:
  """Returns the weights in use: biases alone balance without L_LB."""
  if experiment.model.balancing == "bias":
    return dataclasses.replace(experiment.losses, balance_weight=0.0)
  return experiment.losses


def _loss_context(
  experiment: Experiment,
  taxonomy: Taxonomy,
  rows: int,
  step: jax.Array | int,
) -> LossContext:
  return LossContext(
    _losses(experiment),
    taxonomy.parent,
    _coarse_weight(experiment),
    max_present=rows,
    factors=weight_factors(experiment.losses, experiment.train.num_steps, step),
  )


# The streams of random numbers of steps, apart from that of initialisation.
_PAIRS_STREAM = 1 << 31
_POOLS_STREAM = _PAIRS_STREAM + 1


def _key(
  experiment: Experiment, stream: int, step: jax.Array | int
) -> jax.Array:
  """Returns the key of one step in a stream of random numbers.

  It depends on the experiment's seed and the step alone, so that a run that
  was interrupted draws the same numbers.
  """
  key = jax.random.fold_in(jax.random.key(experiment.seed), stream)
  return jax.random.fold_in(key, step)


def _token_pairs(
  batch: Batch,
  experiment: Experiment,
  taxonomy: Taxonomy,
  step: jax.Array | int,
) -> token_pairs.TokenPairs | None:
  """Samples the token pairs of a step; None if the loss compares domains."""
  if experiment.losses.divergence_pairs != "tokens":
    return None
  domain_B = batch.domain_B
  if experiment.data.granularity in ("coarse", "shuffled_coarse"):
    # The label -1, of rows without a domain, reads the last element.
    domain_B = jnp.array([*taxonomy.parent, -1])[domain_B]
  return token_pairs.sample(
    batch.tokens_BT,
    batch.weights_BT,
    domain_B,
    _key(experiment, _PAIRS_STREAM, step),
    experiment.losses.num_token_pairs,
  )


def _pool_sizes(
  batch: Batch, experiment: Experiment, step: jax.Array | int
) -> jax.Array | None:
  """Draws the sizes of a step's pools, if documents have pools."""
  key = _key(experiment, _POOLS_STREAM, step)
  return draw_pool_sizes(experiment.model, batch, key)


def loss_and_gradient(
  model: Model,
  batch: Batch,
  experiment: Experiment,
  taxonomy: Taxonomy,
  kept_weights: Mapping[str, jax.Array] | None = None,
  step: jax.Array | int = 0,
) -> tuple[routing.BatchSums, dict[str, jax.Array], Model]:
  """Computes the objective of a global batch, its terms, and its gradient.

  Micro-batches (`train.accumulation_steps` > 1) do not change the result, as
  the objective is a function of sums over rows. A first pass adds up the sums
  of all micro-batches. A second pass back-propagates each micro-batch, starting
  from the objective's gradient by the sums. This costs one more forward pass.

  `train.accumulation` = "per_micro_batch" saves that pass: terms and gradient
  are means over the micro-batches' own objectives. That is another loss, as a
  divergence of means is not a mean of divergences.

  Devices that hold copies of a parameter sum its gradient once, at the end.

  Args:
    model, batch: parameters and the rows of the global batch.
    experiment: losses, accumulation and granularity.
    taxonomy: fine domains and their parents.
    kept_weights: see `objective`.
    step: steps taken, skipped ones too; decides random numbers and factors.

  Returns:
    The sums, the terms by name, and the gradient as `optim.trained` of a model.
  """
  context = _loss_context(experiment, taxonomy, len(batch.domain_B), step)

  @jax.named_scope("objective")
  def of_sums(sums: routing.BatchSums):
    return objective(sums, context, kept_weights)

  count = experiment.train.accumulation_steps
  whole_model = model if count == 1 else sharding.apart(model)
  part = trained(experiment.optimizer, whole_model)

  def forward(part: Model, batch: Batch) -> routing.BatchSums:
    sums, _ = merged(part, whole_model).batch_sums(
      batch,
      len(taxonomy.fine),
      summaries(experiment.losses),
      experiment.moe,
      _token_pairs(batch, experiment, taxonomy, step),
      pool_size_LBI=_pool_sizes(batch, experiment, step),
      apart=count > 1,
    )
    return sums

  def whole(part: Model, batch: Batch):
    sums = forward(part, batch)
    loss, terms = of_sums(sums)
    return loss, (sums, terms)

  if count == 1:
    gradient, (sums, terms) = jax.grad(whole, has_aux=True)(part, batch)
    return sums, terms, gradient
  micro = _micro_batches(batch, count)
  if experiment.train.accumulation == "per_micro_batch":

    def of_rows(rows: Batch):
      gradient, (sums, terms) = jax.grad(whole, has_aux=True)(part, rows)
      return sums, terms, gradient

    sums, terms, gradient = _sum_over_parts(of_rows, micro)
    mean = functools.partial(jax.tree.map, lambda x: x / count)
    return sums, mean(terms), mean(sharding.together(gradient))

  sums = _sum_over_parts(functools.partial(forward, part), micro)
  by_sums, terms = jax.grad(of_sums, has_aux=True)(sums)

  def gradient_of_rows(rows: Batch) -> Model:
    return jax.vjp(lambda part: forward(part, rows), part)[1](by_sums)[0]

  gradient = _sum_over_parts(gradient_of_rows, micro)
  return sums, terms, sharding.together(gradient)


def _micro_batches(batch: Batch, count: int) -> Batch:
  """Splits a batch into `count` micro-batches along a new leading axis.

  Row i goes to micro-batch i % count, so that no row changes its device.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch
  )


def _sum_over_parts(function: Callable[[Batch], Any], micro: Batch) -> Any:
  """Sums `function` over micro-batches, one at a time."""
  zero = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(function, jax.tree.map(lambda x: x[0], micro)),
  )
  total, _ = jax.lax.scan(
    lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None),
    zero,
    micro,
  )
  return total


def make_train_step(
  experiment: Experiment,
  optimizer: optax.GradientTransformation,
  taxonomy: Taxonomy,
  mesh: Mesh,
) -> jax.stages.Wrapped:
  """Returns the jitted training step, which donates the state's buffers.

  It maps a TrainState and a global Batch to the next TrainState and a
  StepOutput.

  Raises:
    ValueError: `model.remat` is "auto".
  """
  if experiment.model.remat == AUTO:
    raise ValueError("model.remat='auto': call rematerialization.resolve first")
  everywhere = NamedSharding(mesh, PartitionSpec())
  shardings = state_shardings(experiment, optimizer, mesh)
  on_device = jax.tree.map(lambda x: x.with_memory_kind("device"), shardings)
  steps = experiment.train.num_steps
  schedule = make_schedule(experiment.optimizer, steps)
  bias_schedule = make_bias_schedule(experiment.optimizer, steps)

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere)
  )
  def train_step(state: TrainState, batch: Batch):
    # Any: Optax's types know trees of dicts and lists, not Flax modules.
    part: Any = trained(experiment.optimizer, state.model)
    gradient: Any
    sums, terms, gradient = loss_and_gradient(
      state.model,
      batch,
      experiment,
      taxonomy,
      state.auto_weights,
      state.step,
    )
    norm = optax.tree.norm(gradient)
    # The optimizer has not seen the steps that were skipped.
    skipped = 0 if state.spikes is None else state.spikes.skipped
    taken = state.step - skipped
    with jax.named_scope("optimizer"):
      moments = state.optimizer
      if experiment.optimizer.offload:
        moments = jax.device_put(moments, on_device.optimizer)
      updates, optimizer_state = optimizer.update(gradient, moments, part)
      learned: Any = optax.apply_updates(part, updates)
      model = balanced(
        merged(learned, state.model),
        sums.routing.assignments_LE,
        bias_schedule(taken),
      )
    scalars = {
      **terms,
      "grad_norm": norm,
      "learning_rate": schedule(taken),
    }
    new = TrainState(
      state.step + 1,
      model,
      optimizer_state,
      {key: terms[key] for key in state.auto_weights},
      _average(state.ema, learned, experiment.train.ema),
      state.spikes,
    )
    if state.spikes is not None:
      # The old moments on the device, where the new ones are.
      old = state._replace(optimizer=moments)
      new, told = _unless_spike(old, new, norm, experiment.train)
      scalars |= told
    return new, StepOutput(scalars, sums.routing)

  return train_step


def _average(average: Any, learned: Any, decay: float) -> Any:
  """Moves the average of parameters, if there is one, by one step."""
  if average is None:
    return None
  return jax.tree.map(
    lambda old, new: decay * old + (1 - decay) * new, average, learned
  )


def _unless_spike(
  old: TrainState, new: TrainState, norm: jax.Array, train: TrainConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns the next state, and what to report of spikes."""
  assert old.spikes is not None, "the caller checks"
  skip, median, spikes = judge(
    old.spikes, norm, train.skip_spikes, train.skip_at_most
  )
  kept = jax.tree.map(lambda a, b: jnp.where(skip, a, b), old, new)
  told = {
    "grad_norm_median": median,
    "skipped": skip.astype(jnp.float32),
    "skipped_steps": spikes.skipped.astype(jnp.float32),
  }
  return kept._replace(step=new.step, spikes=spikes), told


def _new_state(
  experiment: Experiment, optimizer: optax.GradientTransformation
) -> TrainState:
  # Any: see `make_train_step`.
  model: Any = Model(experiment.model, jax.random.key(experiment.seed))
  part = trained(experiment.optimizer, model)
  return TrainState(
    jnp.int32(0),
    model,
    optimizer.init(part),
    auto_weights(experiment.losses),
    # A copy: the training step donates both.
    jax.tree.map(jnp.copy, part) if experiment.train.ema else None,
    no_spikes() if experiment.train.skip_spikes else None,
  )


def state_shardings(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Returns the sharding of every leaf of the state.

  Moments have the sharding of their parameters, in the host's memory with
  `optimizer.offload`. Every device holds the whole of all other leaves.
  """
  abstract = jax.eval_shape(lambda: _new_state(experiment, optimizer))
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_parameter = sharding.parameter_shardings(abstract.model, mesh)
  offload = experiment.optimizer.offload

  def place(path: Any, leaf: Any) -> NamedSharding:
    # A moment is named after its parameter. optax.tree.map_params cannot tell
    # where several algorithms share out the parameters.
    if sharding.last_name(path) not in sharding.PARAMETER_RULES:
      return everywhere
    spec = sharding.parameter_spec(path, leaf)
    kind = "pinned_host" if offload else None
    return NamedSharding(mesh, spec, memory_kind=kind)

  return abstract._replace(
    step=everywhere,
    model=by_parameter,
    optimizer=jax.tree_util.tree_map_with_path(place, abstract.optimizer),
    auto_weights={key: everywhere for key in abstract.auto_weights},
    ema=None
    if abstract.ema is None
    else trained(experiment.optimizer, by_parameter),
    spikes=jax.tree.map(lambda _: everywhere, abstract.spikes),
  )


def abstract_state(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Returns shapes, dtypes and shardings of the state; allocates nothing."""
  return jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=placed
    ),
    jax.eval_shape(lambda: _new_state(experiment, optimizer)),
    state_shardings(experiment, optimizer, mesh),
  )


def init_state(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Initialises parameters and optimizer on the devices that keep them."""
  return jax.jit(
    lambda: _new_state(experiment, optimizer),
    out_shardings=state_shardings(experiment, optimizer, mesh),
  )()


def learned_names(experiment: Experiment) -> set[str]:
  """Returns the names of the parameters that have a gradient."""
  kept = trained(experiment.optimizer, abstract_model(experiment.model))
  leaves = jax.tree_util.tree_leaves_with_path(kept)
  return {sharding.path_name(path) for path, _ in leaves}


def state_bytes(experiment: Experiment) -> int:
  """Returns the bytes of a checkpoint's arrays.

  Raises:
    UserError: a pattern of `optimizer` matches no parameter.
  """
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  state = jax.eval_shape(lambda: _new_state(experiment, optimizer))
  rate_factors(experiment.optimizer, trained(experiment.optimizer, state.model))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def peak_rate(experiment: Experiment, mesh: Mesh) -> float | None:
  """Returns the steps per second of devices at their peak, None if unknown."""
  peak = peak_flops(mesh.devices.flat[0])
  if peak is None:
    return None
  train = experiment.train
  flops = training_flops(
    experiment.model,
    train.batch_size,
    train.sequence_length,
    learned_names(experiment),
  )
  return mesh.size * peak / sum(flops.values())
