"""How the next token is drawn from the model's logits."""

import jax
import jax.numpy as jnp

from edl_jax.generation.settings import Sampling


def sample_keys(seed: int, indices_B: jax.Array) -> jax.Array:
  """Returns the key of each sample; it depends on nothing but its index."""
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), indices_B
  )


def draw(
  logits_BV: jax.Array, keys_B: jax.Array, step: jax.Array, sampling: Sampling
) -> jax.Array:
  """Draws a token for each row.

  Args:
    logits_BV: float32; minus infinity excludes a token.
    keys_B: from `sample_keys`.
    step: tokens drawn before.
    sampling: how to draw.

  Returns:
    token_B, int32.
  """
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  order_BV = None
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k or sampling.top_p < 1:
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    logits_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if sampling.top_k:
      logits_BV = jnp.where(
        jnp.arange(logits_BV.shape[1]) < sampling.top_k, logits_BV, -jnp.inf
      )
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # Rounding may bring the sum before the first token below 0, never above.
    logits_BV = jnp.where(before_BV < sampling.top_p, logits_BV, -jnp.inf)
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
  token_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
  if order_BV is not None:
    token_B = jnp.take_along_axis(order_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B.astype(jnp.int32)
