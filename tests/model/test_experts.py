"""Experts on sorted rows, against a loop over experts in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.model.experts import grouped_swiglu

SIZES = (3, 0, 4, 1)
WIDTH, HIDDEN = 6, 5


def arguments(gated):
  """Returns rows, weights, gates or None, and the outputs' cotangent."""
  random = np.random.default_rng(0)
  rows, experts = sum(SIZES), len(SIZES)
  shapes = [
    (rows, WIDTH),
    (experts, WIDTH, 2, HIDDEN),
    (experts, HIDDEN, WIDTH),
    (rows,),
    (rows, WIDTH),
  ]
  x, gate_up, down, gate, dy = (
    random.standard_normal(shape).astype(np.float32) for shape in shapes
  )
  return x, gate_up, down, gate if gated else None, dy


def naive(x, gate_up, down, gate, dy):
  """Returns outputs and gradients of rows, weights and gates, by hand."""
  x, gate_up, down, dy = (a.astype(np.float64) for a in (x, gate_up, down, dy))
  weight = np.ones(len(x)) if gate is None else gate.astype(np.float64)
  y, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros(len(x))
  dgate_up, ddown = np.zeros_like(gate_up), np.zeros_like(down)
  expert_R = np.repeat(np.arange(len(SIZES)), SIZES)
  for row, expert in enumerate(expert_R):
    g, u = (x[row] @ gate_up[expert, :, part] for part in (0, 1))
    sigmoid = 1 / (1 + np.exp(-g))
    hidden = g * sigmoid * u
    y[row] = weight[row] * hidden @ down[expert]
    dweight[row] = dy[row] @ (hidden @ down[expert])
    ddown[expert] += weight[row] * np.outer(hidden, dy[row])
    dhidden = weight[row] * down[expert] @ dy[row]
    dg = dhidden * u * sigmoid * (1 + g * (1 - sigmoid))
    du = dhidden * g * sigmoid
    for part, d in enumerate((dg, du)):
      dgate_up[expert, :, part] += np.outer(x[row], d)
      dx[row] += gate_up[expert, :, part] @ d
  return y, (dx, dgate_up, ddown, dweight)


@pytest.mark.parametrize("gated", [True, False])
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(gated):
  x, gate_up, down, gate, dy = arguments(gated)
  sizes = jnp.array(SIZES, jnp.int32)

  def of(x, gate_up, down, gate):
    return grouped_swiglu(x, sizes, gate_up, down, gate)

  y, pull_back = jax.vjp(of, x, gate_up, down, gate)
  want, gradients = naive(x, gate_up, down, gate, dy)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  for got, wanted in zip(pull_back(dy), gradients):
    if got is not None:
      np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_the_first_product_and_does_not_round_it():
  x, gate_up, down, gate, dy = arguments(True)
  sizes = jnp.array(SIZES, jnp.int32)
  policy = jax.checkpoint_policies.save_only_these_names("experts")

  @functools.partial(jax.checkpoint, policy=policy)
  def layer(x, gate_up, down, gate):
    return grouped_swiglu(jnp.sin(x), sizes, gate_up, down, gate)

  def loss(*arguments):
    return (layer(*arguments) * dy).sum()

  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
  jaxpr = jax.make_jaxpr(gradient)(x, gate_up, down, gate).jaxpr
  (remat,) = (e for e in jaxpr.eqns if e.primitive.name == "remat2")
  product = (len(x), 2 * HIDDEN)
  assert product in [v.aval.shape for v in remat.invars]
  # It would be an equation before that of the backward pass.
  rounded = [e for e in jaxpr.eqns if e.primitive.name == "reduce_precision"]
  assert product not in [e.outvars[0].aval.shape for e in rounded]
  # The gradient is that of the same function without checkpoint.
  plain = jax.grad(
    lambda x, *rest: (grouped_swiglu(jnp.sin(x), sizes, *rest) * dy).sum(),
    argnums=(0, 1, 2, 3),
  )
  for got, want in zip(
    gradient(x, gate_up, down, gate), plain(x, gate_up, down, gate), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
