"""A mixture-of-experts language model in plain JAX, with expert divergence.

  python -m examples.plain_jax

trains two small models on four made-up domains, without and with the loss, and
prints how differently the domains use the experts. It takes less than a minute
on two CPU cores; routing diversity ends at 0.05 without the loss and at 0.15
with it. Only the functions of `divergence.py` come from edl_jax, and that file
can be copied.

Axis letters: B rows, T positions, V vocabulary, M width, E experts, F hidden
width, D domains.
"""

import jax
import jax.numpy as jnp
import optax

from edl_jax.losses.divergence import (
  domain_routing,
  expert_divergence_loss,
  pairwise_jensen_shannon,
)

B, T, V, M, E, F, D = 32, 32, 64, 32, 8, 32, 4
ACTIVE, STEPS = 2, 200
OPTIMIZER = optax.adam(0.01)


def batch(key):
  """Draws rows; each domain is a random chain with three ways on per token."""
  domain_B = jnp.arange(B) % D
  next_DV3 = jax.random.randint(jax.random.key(1), (D, V, 3), 0, V)

  def step(token_B, branch_B):
    token_B = next_DV3[domain_B, token_B, branch_B]
    return token_B, token_B

  branch_TB = jax.random.randint(key, (T + 1, B), 0, 3)
  _, tokens_TB = jax.lax.scan(step, jnp.zeros(B, jnp.int32), branch_TB)
  return tokens_TB.T, domain_B


def initial(key):
  shapes = {"embedding": (V, M), "router": (M, E), "head": (M, V)}
  shapes |= {"up": (E, M, F), "down": (E, F, M)}
  keys = jax.random.split(key, len(shapes))
  return {
    name: jax.random.normal(k, shape) * shape[-2] ** -0.5
    for k, (name, shape) in zip(keys, shapes.items())
  }


def objective(parameters, tokens_BT, domain_B, divergence_weight):
  inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
  x_BTM = parameters["embedding"][inputs_BT]
  # The running mean of the row so far tells its domain.
  x_BTM += jnp.cumsum(x_BTM, 1) / jnp.arange(1, T + 1)[:, None]
  probs_BTE = jax.nn.softmax(x_BTM @ parameters["router"])
  top_BTA, expert_BTA = jax.lax.top_k(probs_BTE, ACTIVE)
  gate_BTA = top_BTA / top_BTA.sum(-1, keepdims=True)
  gate_BTE = (jax.nn.one_hot(expert_BTA, E) * gate_BTA[..., None]).sum(-2)
  hidden = jax.nn.silu(jnp.einsum("BTM,EMF->BTEF", x_BTM, parameters["up"]))
  x_BTM += jnp.einsum("BTEF,EFM,BTE->BTM", hidden, parameters["down"], gate_BTE)
  log_probs_BTV = jax.nn.log_softmax(x_BTM @ parameters["head"])
  lm_loss = -jnp.take_along_axis(
    log_probs_BTV, targets_BT[..., None], -1
  ).mean()
  # The load-balance loss of Switch Transformer, and expert divergence.
  balance = E * (gate_BTE > 0).mean((0, 1)) @ probs_BTE.mean((0, 1)) / ACTIVE
  p_DE, count_D = domain_routing(probs_BTE, jnp.ones((B, T)), domain_B, D)
  divergence = expert_divergence_loss(p_DE, count_D)
  loss = lm_loss + 0.01 * balance + divergence_weight * divergence
  return loss, (lm_loss, p_DE)


@jax.jit
def train_step(parameters, state, key, divergence_weight):
  gradient, aux = jax.grad(objective, has_aux=True)(
    parameters, *batch(key), divergence_weight
  )
  updates, state = OPTIMIZER.update(gradient, state)
  return optax.apply_updates(parameters, updates), state, aux


def train(divergence_weight):
  """Returns the LM loss and the routing of each domain at the last step."""
  parameters = initial(jax.random.key(0))
  state = OPTIMIZER.init(parameters)
  for key in jax.random.split(jax.random.key(2), STEPS):
    parameters, state, (lm_loss, p_DE) = train_step(
      parameters, state, key, divergence_weight
    )
  return lm_loss, p_DE


def main():
  for weight in (0.0, 0.01):
    lm_loss, p_DE = train(weight)
    diversity = pairwise_jensen_shannon(p_DE).sum() / (D * (D - 1) * jnp.log(2))
    print(
      f"divergence weight {weight}: LM loss {lm_loss:.2f}, routing diversity"
      f" {diversity:.2f} of 1"
    )


if __name__ == "__main__":
  main()
