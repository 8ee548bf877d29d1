"""Muon: momentum with orthogonalised matrices.

Jordan et al., 2024 (kellerjordan.github.io/posts/muon); scaled to the size of
AdamW's updates as in Liu et al., arXiv:2502.16982.

A parameter here is a stack of matrices, such as those of all experts of all
layers. `optax.contrib.muon` merges the axes of a stack into one, for which a
mesh that spreads experts must gather them, and its other parameters follow
Adam with Nesterov momentum. Here axes stay apart, so each device works on its
own experts.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from edl_jax.sharding import PARAMETER_RULES, last_name

# Of the quintic iteration, chosen by Jordan et al. for a steep slope at 0.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The root mean square of AdamW's updates, which arXiv:2502.16982 matches.
_RMS = 0.2


class MuonState(NamedTuple):
  """The momentum of every matrix, like the parameters."""

  momentum: Any


def orthogonalized(x: jax.Array) -> jax.Array:
  """Returns U S' V^T of each matrix U S V^T, with singular values S' near 1.

  Five Newton-Schulz iterations bring singular values into about [0.7, 1.2].

  Args:
    x: float32; the last two axes are a matrix, the others number matrices.
  """
  is_tall = x.shape[-2] > x.shape[-1]
  if is_tall:
    x = x.swapaxes(-1, -2)
  x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8
  linear, cubic, quintic = _COEFFICIENTS
  for _ in range(_ITERATIONS):
    gram = x @ x.swapaxes(-1, -2)
    x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
  return x.swapaxes(-1, -2) if is_tall else x


def is_matrix(path: Sequence[Any]) -> bool:
  """Says whether Muon updates a parameter: it is a stack of matrices."""
  return PARAMETER_RULES[last_name(path)].matrix is not None


def direction(path: Sequence[Any], x: jax.Array) -> jax.Array:
  """Orthogonalises every matrix of a parameter's momentum, and scales it.

  The result has a root mean square of about 0.2 in each matrix of full rank.

  Args:
    path: of a parameter for which `is_matrix` holds.
    x: of its shape, with or without a leading axis of layers.
  """
  name = last_name(path)
  matrix = PARAMETER_RULES[name].matrix
  assert matrix is not None, name
  letters = name.rpartition("_")[2]
  first = x.ndim - len(letters)
  axes = [[first + letters.index(letter) for letter in side] for side in matrix]
  of_matrix = [*axes[0], *axes[1]]
  stack = [axis for axis in range(x.ndim) if axis not in of_matrix]
  order = [*stack, *of_matrix]
  moved = x.transpose(order)
  rows, columns = (math.prod(x.shape[axis] for axis in side) for side in axes)
  made = orthogonalized(
    moved.reshape(*moved.shape[: len(stack)], rows, columns)
  )
  made *= _RMS * max(rows, columns) ** 0.5
  inverse = sorted(range(x.ndim), key=order.__getitem__)
  return made.reshape(moved.shape).transpose(inverse)


def scale_by_muon(decay: float) -> optax.GradientTransformation:
  """Returns the transformation from gradients to directions of Muon.

  m = decay m + (1 - decay) g; the direction is that of decay m + (1 - decay) g,
  as in Nesterov momentum.
  """

  # Optax names the arguments.
  def init(params: Any) -> MuonState:
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(updates: Any, state: Any, params: Any = None):
    del params

    def mix(momentum: jax.Array, gradient: jax.Array) -> jax.Array:
      return decay * momentum + (1 - decay) * gradient

    momentum = jax.tree.map(mix, state.momentum, updates)
    ahead = jax.tree.map(mix, momentum, updates)
    with jax.named_scope("muon"):
      directions = jax.tree_util.tree_map_with_path(direction, ahead)
    return directions, MuonState(momentum)

  return optax.GradientTransformation(init, update)
