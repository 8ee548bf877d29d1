"""Computes MaxText's loss without and with the patch; see test_maxtext.py.

It runs in MaxText's environment, and writes to the file that the command line
names.
"""

import sys
import tempfile

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.trainers.pre_train import train as maxtext_train
from maxtext.utils import maxtext_utils, model_creation_utils

from examples.maxtext import patch, train

WEIGHT, ROWS = 0.5, 8


def batch():
  """Returns rows of three of four domains, half of it padding."""
  found = {name: array[:ROWS] for name, array in next(train.batches()).items()}
  counted_BT = np.random.default_rng(1).integers(2, size=(ROWS, train.T))
  counted_BT[1] = 0
  domain_BT = found[patch.DOMAIN]
  return found | {
    "targets_segmentation": counted_BT.astype(np.int32),
    patch.DOMAIN: np.where(domain_BT == 3, 0, domain_BT),
  }


def record_logits(logits):
  """Makes MaxText's routers append their logits to a list."""
  call = moe.GateLogit.__call__

  def recorded(gate, *args, **kwargs):
    found = call(gate, *args, **kwargs)
    jax.debug.callback(lambda x: logits.append(np.asarray(x)), found[0])
    return found

  moe.GateLogit.__call__ = recorded


def main(path):
  with tempfile.TemporaryDirectory() as folder:
    rows = ROWS // jax.device_count()
    config = pyconfig.initialize(
      train.arguments(folder, per_device_batch_size=rows)
    )
  mesh = maxtext_utils.get_mesh_from_config(config)
  with jax.set_mesh(mesh), mesh, logical_axis_rules(config.logical_axis_rules):
    model = model_creation_utils.from_config(
      config, mesh=mesh, rngs=nnx.Rngs(params=0, dropout=1)
    )
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(parameters):
      own = nnx.merge(graph, parameters, rest, copy=True)
      loss, aux = maxtext_train.loss_fn(
        own, config, batch(), None, None, is_train=True
      )
      return loss, aux["intermediate_outputs"].get("divergence_loss", 0.0)

    def computed(parameters):
      return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(parameters)

    (plain, _), plain_gradient = computed(parameters)
    logits = []
    record_logits(logits)
    patch.apply(num_domains=train.D, weight=WEIGHT)
    jax.clear_caches()
    patched, _ = jax.jit(loss_of)(parameters)
    jax.effects_barrier()
    # What follows appends more.
    logits_LBTE = np.stack(logits)
    (_, divergence), gradient = computed(parameters)
    # The loss rises along its gradient by the gradient's length.
    added = jax.tree.map(lambda a, b: a - b, gradient, plain_gradient)
    length = sum(float((x**2).sum()) for x in jax.tree.leaves(added)) ** 0.5

    def divergence_at(distance):
      there = jax.tree.map(
        lambda x, d: x + distance * d / length, parameters, added
      )
      return computed(there)[0][1]

    rise = divergence_at(1e-2) - divergence_at(-1e-2)
  np.savez(
    path,
    logits=logits_LBTE,
    counted=batch()["targets_segmentation"],
    domain=batch()[patch.DOMAIN][:, 0],
    added=patched - plain,
    divergence=divergence,
    slope=WEIGHT * rise / 2e-2,
    length=length,
  )


if __name__ == "__main__":
  main(sys.argv[1])
