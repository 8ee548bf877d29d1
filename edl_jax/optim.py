"""AdamW and Muon, their learning rates, gradient clipping, frozen parts."""

import dataclasses
import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from edl_jax.config import OptimizerConfig, UserError
from edl_jax.fields import nearest
from edl_jax.muon import is_matrix, scale_by_muon
from edl_jax.sharding import is_state, last_name, path_name


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate by step (counted from 0).

  All schedules warm up linearly and end at `final_fraction` of the peak.
  After warm-up, "cosine" follows half a cosine (Loshchilov and Hutter,
  arXiv:1608.03983). "wsd" stays at the peak and falls linearly over the last
  `decay_fraction` of all steps (Hu et al., arXiv:2404.06395). "linear" falls
  linearly from warm-up on.
  """
  peak = config.learning_rate
  final = config.final_fraction * peak
  # Start at peak / warmup: a learning rate of 0 would waste the first step.
  warmup = optax.linear_schedule(
    peak / max(1, config.warmup_steps), peak, max(1, config.warmup_steps - 1)
  )
  left = max(1, num_steps - config.warmup_steps)
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, left, alpha=config.final_fraction)
  elif config.schedule == "linear":
    after = optax.linear_schedule(peak, final, left)
  else:
    decay = _decay_steps(config, num_steps)
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
      ],
      [left - decay],
    )
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_bias_schedule(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Returns the rate of router biases by step (counted from 0).

  "constant": `bias_rate`. "learning_rate": the same until warm-up ends, because
  biases start behind the router, and then in proportion to the learning rate.
  """
  if config.bias_schedule == "constant":
    return optax.constant_schedule(config.bias_rate)
  relative = dataclasses.replace(config, learning_rate=1.0)
  share = make_schedule(relative, num_steps)

  def rate(step: Any) -> Any:
    return config.bias_rate * jnp.where(
      step < config.warmup_steps, 1.0, share(step)
    )

  return rate


def _decay_steps(config: OptimizerConfig, num_steps: int) -> int:
  """Returns the steps of the decay of "wsd"."""
  left = max(1, num_steps - config.warmup_steps)
  return min(left, max(1, round(config.decay_fraction * num_steps)))


def steps_at_peak(config: OptimizerConfig, num_steps: int) -> int | None:
  """Returns the number of first steps whose rate `num_steps` has no part in.

  None: of all steps. A run that took no more may become longer or shorter.
  """
  if config.final_fraction == 1:
    return None
  if config.schedule == "cosine":
    return config.warmup_steps
  return num_steps - _decay_steps(config, num_steps)


def decays(parameters: Any) -> Any:
  """Returns a pytree of bools: the parameters to which weight decay applies.

  These are all but the scales of norms and the biases.
  """

  def is_decayed(path: Any, _: Any) -> bool:
    return not {"scale", "bias"} & set(last_name(path).split("_"))

  return jax.tree_util.tree_map_with_path(is_decayed, parameters)


def trained(config: OptimizerConfig, parameters: Any) -> Any:
  """Returns the parameters that `config.trainable` names, and that learn.

  Router biases do not learn: `model.balancing` moves them.

  Args:
    config: for its patterns.
    parameters: a pytree of parameters, or of one value for each of them.

  Returns:
    The same pytree with None, which is no leaf, in place of all others.

  Raises:
    UserError: a pattern matches no parameter.
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(parameters)
  names = [path_name(path) for path, _ in flat]
  learned = [path_name(path) for path, _ in flat if not is_state(path)]
  patterns = [pattern.strip() for pattern in config.trainable.split(",")]
  for pattern in patterns:
    if not fnmatch.filter(learned, pattern):
      raise UserError(
        f"optimizer.trainable={config.trainable}: {pattern!r} matches no"
        f" parameter; {nearest(pattern, learned)}"
      )
  chosen = [
    leaf
    if name in learned
    and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    else None
    for name, (_, leaf) in zip(names, flat)
  ]
  return jax.tree.unflatten(structure, chosen)


def merged(trained: Any, parameters: Any) -> Any:
  """Returns `parameters` with the leaves of `trained` where it has some."""
  leaves, structure = jax.tree.flatten(parameters)
  own = jax.tree.leaves(trained, is_leaf=lambda leaf: leaf is None)
  return jax.tree.unflatten(
    structure,
    [old if new is None else new for new, old in zip(own, leaves, strict=True)],
  )


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """Scales gradients down to a norm of at most `largest`.

  optax.clip_by_global_norm divides each element, for which XLA makes a pass
  over memory. XLA fuses a product into the operations that follow.
  """

  def update(gradient: Any, parameters: Any) -> Any:
    del parameters
    scale = largest / jnp.maximum(optax.tree.norm(gradient), largest)
    return jax.tree.map(lambda x: scale * x, gradient)

  return optax.stateless(update)


def rate_factors(config: OptimizerConfig, parameters: Any) -> Any:
  """Returns the factor of each parameter's learning rate, as the same pytree.

  Args:
    config: for its rates; the first pattern that matches a name counts.
    parameters: a pytree of parameters, or of one value for each of them.

  Raises:
    UserError: an entry has another form than PATTERN=FACTOR, its factor is not
      a number of at least 0, or its pattern matches no parameter.
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(parameters)
  names = [path_name(path) for path, _ in flat]
  factors: dict[str, float] = {}
  for entry in filter(None, map(str.strip, config.rates.split(","))):
    pattern, _, text = entry.rpartition("=")
    shown = f"optimizer.rates={config.rates}: {entry!r}"
    try:
      factor = float(text)
    except ValueError:
      factor = math.nan
    if not pattern or not 0 <= factor < math.inf:
      raise UserError(
        f"{shown} must be PATTERN=FACTOR, such as *router_ME=0.1, with a factor"
        " of at least 0"
      )
    matched = fnmatch.filter(names, pattern)
    if not matched:
      raise UserError(
        f"{shown} matches no trained parameter; {nearest(pattern, names)}"
      )
    for name in matched:
      factors.setdefault(name, factor)
  return jax.tree.unflatten(
    structure, [factors.get(name, 1.0) for name in names]
  )


def _scale_by_rates(config: OptimizerConfig) -> optax.GradientTransformation:
  """Multiplies updates by `rate_factors`."""

  def update(updates: Any, parameters: Any) -> Any:
    del parameters
    return jax.tree.map(
      lambda factor, x: x if factor == 1 else factor * x,
      rate_factors(config, updates),
      updates,
    )

  return optax.stateless(update)


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns clipping by global norm followed by the algorithm's update.

  "adamw" is AdamW (arXiv:1711.05101). "muon" is Muon for the stacks of matrices
  and AdamW for embedding, head and norms.
  """
  schedule = make_schedule(config, num_steps)
  rule = optax.adamw(
    schedule,
    b1=config.beta1,
    b2=config.beta2,
    weight_decay=config.weight_decay,
    mask=decays,
  )
  if config.algorithm == "muon":
    matrices = optax.chain(
      scale_by_muon(config.muon_momentum),
      optax.add_decayed_weights(config.weight_decay),
      optax.scale_by_learning_rate(schedule),
    )
    rule = optax.partition({"adamw": rule, "muon": matrices}, _algorithms)
  parts = [_clip_by_global_norm(config.clip_norm), rule]
  if config.rates:
    parts.append(_scale_by_rates(config))
  return optax.chain(*parts)


def _algorithms(parameters: Any) -> Any:
  """Returns "muon" or "adamw" for each parameter, as the same pytree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "muon" if is_matrix(path) else "adamw", parameters
  )
