"""AdamW, its learning-rate schedule, gradient clipping, frozen parts."""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax

from edl_jax.config import OptimizerConfig, UserError
from edl_jax.fields import nearest
from edl_jax.sharding import is_state, last_name, path_name


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate by step (counted from 0).

  Both schedules warm up linearly and end at `final_fraction` of the peak.
  After warm-up, "cosine" follows half a cosine (Loshchilov and Hutter,
  arXiv:1608.03983). "wsd" stays at the peak and falls linearly over the last
  `decay_fraction` of all steps (Hu et al., arXiv:2404.06395).
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


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns clipping by global norm followed by AdamW (arXiv:1711.05101)."""
  return optax.chain(
    _clip_by_global_norm(config.clip_norm),
    optax.adamw(
      make_schedule(config, num_steps),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=decays,
    ),
  )
