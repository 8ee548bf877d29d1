"""Balance without a loss: each expert's bias follows its load."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from edl_jax import sharding
from edl_jax.model.transformer import Model


def balanced(model: Model, assignments_LE: jax.Array, rate: ArrayLike) -> Model:
  """Moves the router biases of a model by one step.

  b_e += rate sign(mean load - load_e), layer by layer (Wang et al.,
  arXiv:2408.15664). DeepSeek-V3, arXiv:2412.19437, takes the same rule.

  Args:
    model: without biases, it stays as it is.
    assignments_LE: tokens sent to each expert, of the global batch, float32.
    rate: change of a bias, a scalar in units of router scores.
  """
  mean_L1 = assignments_LE.mean(-1, keepdims=True)
  step_LE = rate * jnp.sign(mean_L1 - assignments_LE)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf + step_LE if sharding.is_state(path) else leaf,
    model,
  )
