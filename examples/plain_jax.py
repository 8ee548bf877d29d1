"""A mixture-of-experts language model in plain JAX, with expert divergence.

  python -m examples.plain_jax

trains two small models on four made-up domains, without and with the loss, and
prints how differently the domains use the experts. It takes less than a minute
on two CPU cores. Only `divergence.py` comes from edl_jax; it can be copied.

Axes: B rows, T positions, V tokens, M width, E experts, F hidden, D domains.
"""

import jax
import jax.numpy as jnp
import optax

from edl_jax.losses import divergence as edl

B, T, V, M, E, F, D = 32, 32, 64, 32, 8, 32, 4
ACTIVE, STEPS, OPTIMIZER = 2, 200, optax.adam(0.01)
SHAPES = {"embedding": (V, M), "router": (M, E), "head": (M, V)}
SHAPES |= {"up": (E, M, F), "down": (E, F, M)}


def batch(key):
  """Draws rows; each domain is a random chain with three ways on per token."""
  domain_B = jnp.arange(B) % D
  next_DV3 = jax.random.randint(jax.random.key(1), (D, V, 3), 0, V)
  tokens = [jnp.zeros(B, jnp.int32)]
  for branch_B in jax.random.randint(key, (T, B), 0, 3):
    tokens.append(next_DV3[domain_B, tokens[-1], branch_B])
  return jnp.stack(tokens, 1), domain_B


def objective(parameters, key, divergence_weight):
  tokens_BT, domain_B = batch(key)
  x_BTM = parameters["embedding"][tokens_BT[:, :-1]]
  # The running mean of the row so far tells its domain.
  x_BTM += jnp.cumsum(x_BTM, 1) / jnp.arange(1, T + 1)[:, None]
  probs_BTE = jax.nn.softmax(x_BTM @ parameters["router"])
  lowest_BT1 = jax.lax.top_k(probs_BTE, ACTIVE)[0][..., -1:]
  gate_BTE = jnp.where(probs_BTE < lowest_BT1, 0, probs_BTE)
  gate_BTE /= gate_BTE.sum(-1, keepdims=True)
  hidden = jax.nn.silu(jnp.einsum("BTM,EMF->BTEF", x_BTM, parameters["up"]))
  x_BTM += jnp.einsum("BTEF,EFM,BTE->BTM", hidden, parameters["down"], gate_BTE)
  log_probs_BTV = jax.nn.log_softmax(x_BTM @ parameters["head"])
  target_BT1 = tokens_BT[:, 1:, None]
  lm_loss = -jnp.take_along_axis(log_probs_BTV, target_BT1, -1).mean()
  # The load-balance loss of Switch Transformer, and expert divergence.
  balance = E * (gate_BTE > 0).mean((0, 1)) @ probs_BTE.mean((0, 1)) / ACTIVE
  p_DE, count_D = edl.domain_routing(probs_BTE, jnp.ones((B, T)), domain_B, D)
  loss = lm_loss + 0.01 * balance
  loss += divergence_weight * edl.expert_divergence_loss(p_DE, count_D)
  return loss, (lm_loss, p_DE)


@jax.jit
def train_step(parameters, state, key, weight):
  gradient, found = jax.grad(objective, has_aux=True)(parameters, key, weight)
  updates, state = OPTIMIZER.update(gradient, state)
  return optax.apply_updates(parameters, updates), state, found


def main():
  keys = jax.random.split(jax.random.key(0), len(SHAPES) + STEPS)
  for weight in (0.0, 0.01):
    parameters = {
      name: jax.random.normal(key, shape) * shape[-2] ** -0.5
      for key, (name, shape) in zip(keys, SHAPES.items())
    }
    state = OPTIMIZER.init(parameters)
    for key in keys[len(SHAPES) :]:
      parameters, state, found = train_step(parameters, state, key, weight)
    lm_loss, p_DE = found
    distance_DD = edl.pairwise_jensen_shannon(p_DE) / jnp.log(2)
    print(f"divergence weight {weight}: LM loss {lm_loss:.2f},", end=" ")
    print(f"routing diversity {distance_DD.sum() / (D * (D - 1)):.2f} of 1")


if __name__ == "__main__":
  main()
