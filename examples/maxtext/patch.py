"""Puts expert divergence into MaxText's training step, from outside of MaxText.

  from examples.maxtext import patch
  from maxtext.trainers.pre_train import train

  patch.apply(num_domains=4, weight=0.01)
  train.main(["train", "base.yml", "..."])

Batches need one more array, "targets_domain": int32 (B, T), the domain label of
each row in all of its positions. The README beside this file explains each
change. Only the functions of `divergence.py` come from edl_jax, and that file
can be copied.

Axis letters: B rows, T positions, L layers, E experts.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers import moe
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils

from edl_jax.losses.divergence import domain_routing, expert_divergence_loss

DOMAIN = "targets_domain"
_ROWS = "row_probs_BE"
_APPLIED = "edl_jax_divergence"

# Which tokens count, (B, T), while MaxText computes the loss of a batch.
_counted: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
  "counted_BT", default=None
)


def apply(num_domains: int, weight: float) -> None:
  """Changes MaxText in this process; call it before training starts.

  A second call would add the loss twice. With the same values it changes
  nothing.

  Args:
    num_domains: labels in batches are in [0, num_domains).
    weight: what the divergence loss counts in the loss.

  Raises:
    ValueError: it was called with other values before.
  """
  values = (num_domains, weight)
  # Kept at MaxText, so that a second copy of this module sees it too.
  before = getattr(train, _APPLIED, None)
  if before == values:
    return
  if before is not None:
    raise ValueError(
      "patch.apply: MaxText already has the divergence loss, with num_domains"
      f" and weight {before}; {values} need a process of their own"
    )
  setattr(train, _APPLIED, values)
  moe.GateLogit.__call__ = _keeping_rows(moe.GateLogit.__call__)
  train.loss_fn = _with_divergence(train.loss_fn, num_domains, weight)
  train.record_activation_metrics = _with_metric(
    train.record_activation_metrics
  )
  maxtext_utils.get_shaped_batch = _with_domain(maxtext_utils.get_shaped_batch)


def _keeping_rows(call: Callable[..., Any]) -> Callable[..., Any]:
  """Makes the router keep each row's mean probabilities, (B, E)."""

  @functools.wraps(call)
  def wrapped(gate: Any, *args: Any, **kwargs: Any) -> Any:
    logits_BTE, *rest = call(gate, *args, **kwargs)
    counted_BT = _counted.get()
    if counted_BT is not None:
      if gate.score_func:
        raise ValueError(f"routers by {gate.score_func}: only softmax is known")
      probs_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32))
      sum_BE = jnp.where(counted_BT[..., None], probs_BTE, 0).sum(1)
      mean_BE = sum_BE / jnp.maximum(counted_BT.sum(1), 1)[:, None]
      setattr(gate, _ROWS, nnx.Intermediate(mean_BE))
    return logits_BTE, *rest

  return wrapped


def _with_divergence(
  loss_fn: Callable[..., Any], num_domains: int, weight: float
) -> Callable[..., Any]:
  """Adds the mean over layers of the divergence loss to the training loss."""

  @functools.wraps(loss_fn)
  def wrapped(
    model: Any, config: Any, data: Any, *args: Any, is_train: bool = True
  ) -> Any:
    if not is_train:
      return loss_fn(model, config, data, *args, is_train=False)
    if config.gradient_accumulation_steps > 1:
      raise ValueError("the divergence of micro-batches is not the batch's")
    rows = config.micro_batch_size_to_train_on
    counted_BT = data["targets_segmentation"][:rows] != 0
    domain_B = data[DOMAIN][:rows, 0]
    token = _counted.set(counted_BT)
    try:
      loss, aux = loss_fn(model, config, data, *args, is_train=True)
    finally:
      _counted.reset(token)
    kept = aux["intermediate_outputs"]
    rows_LBE = jnp.concatenate(
      [
        # (B, E) of a layer, or (L, B, E) of layers that MaxText scans.
        leaf.reshape(-1, *leaf.shape[-2:])
        for path, leaf in jax.tree.leaves_with_path(kept)
        if _ROWS in jax.tree_util.keystr(path)
      ]
    )

    def of_layer(rows_BE: jax.Array) -> jax.Array:
      # A row's mean stands for the row, as one position.
      rows_B1E, counted_B1 = rows_BE[:, None], counted_BT.any(1)[:, None]
      return expert_divergence_loss(
        *domain_routing(rows_B1E, counted_B1, domain_B, num_domains)
      )

    divergence = jax.vmap(of_layer)(rows_LBE).mean()
    kept["divergence_loss"] = divergence
    return loss + weight * divergence, aux

  return wrapped


def _with_metric(record: Callable[..., None]) -> Callable[..., None]:
  """Adds the divergence loss to the metrics of a step.

  MaxText calls `record` where record_internal_nn_metrics is set.
  """

  @functools.wraps(record)
  def wrapped(metrics: Any, intermediates: Any, config: Any) -> None:
    record(metrics, intermediates, config)
    value = intermediates["divergence_loss"]
    metrics["scalar"]["learning/divergence_loss"] = value

  return wrapped


def _with_domain(shaped_batch: Callable[..., Any]) -> Callable[..., Any]:
  """Tells MaxText, which compiles before it reads, of the array of labels."""

  @functools.wraps(shaped_batch)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    batch = shaped_batch(*args, **kwargs)
    return {**batch, DOMAIN: batch["targets"]}

  return wrapped
