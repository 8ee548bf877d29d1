"""Runs whole documents, one in a row, through a model on any mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edl_jax import sharding
from edl_jax.losses import routing
from edl_jax.model.choice import CHOICE_SPECS, Choice, make_choice


def mesh_of(model: Any) -> Mesh | None:
  """Returns the mesh that the parameters are laid out on.

  None stands for a single device, and for parameters that are being traced.
  """
  placed = getattr(model.embedding_VM[...], "sharding", None)
  mesh = placed.mesh if isinstance(placed, NamedSharding) else None
  return mesh if isinstance(mesh, Mesh) else None


def run(
  model: Any,
  tokens_BT: jax.Array,
  summary: Callable[..., Any],
  domain_B: jax.Array | None = None,
  num_domains: int = 0,
) -> tuple[jax.Array, Any]:
  """Runs all but the head.

  On a mesh, which is that of the parameters or, inside of `jax.jit`, that of
  `jax.set_mesh`, devices take rows of their own. Rows and tokens are added
  until the mesh divides both, and cut off again.

  Args:
    model: a `transformer.Model`, which imports this module.
    tokens_BT: one document a row.
    summary: what each mixture-of-experts layer keeps of its routing, see
      `routing.Summaries`; arrays (B, T, ...).
    domain_B, num_domains: fine domain label of each row, and D; only
      `model.router=domain` needs them.

  Returns:
    x_BTM after the final norm, and the summaries, (L, B, T, ...).

  Raises:
    ValueError: labels are needed and missing.
  """
  mesh = mesh_of(model)
  sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
  rows, length = tokens_BT.shape
  shards = math.prod(sizes.get(axis, 1) for axis in sharding.ROW_AXES)
  more_rows, more_tokens = -rows % shards, -length % sizes.get("sequence", 1)
  tokens_BT = jnp.pad(tokens_BT, ((0, more_rows), (0, more_tokens)))
  if domain_B is not None:
    # Rows with -1 may use all experts.
    domain_B = jnp.pad(domain_B, (0, more_rows), constant_values=-1)
  positions_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  ones_BT = jnp.ones_like(tokens_BT)

  def of_shard(
    model: Any,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    weights_BT: jax.Array,
    choice: Choice,
  ) -> tuple[jax.Array, Any]:
    x_BTM, kept, _ = model.hidden(
      *(tokens_BT, segments_BT, positions_BT, weights_BT),
      routing.Summaries(routing=summary),
      choice=choice,
    )
    return x_BTM, kept

  by_token = PartitionSpec(sharding.ROW_AXES, "sequence")
  x_BTM, kept = sharding.per_shard(
    of_shard,
    (sharding.parameter_specs(model), *4 * [by_token], CHOICE_SPECS),
    (by_token, PartitionSpec(None, *by_token)),
    mesh,
  )(
    *(model, tokens_BT, ones_BT, positions_BT, ones_BT.astype(jnp.float32)),
    make_choice(model.config, domain_B, num_domains),
  )
  return x_BTM[:rows, :length], jax.tree.map(
    lambda x: x[:, :rows, :length], kept
  )
