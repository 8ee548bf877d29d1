"""Jensen-Shannon divergence and the expert divergence loss.

Stands alone: imports only JAX, so that other codebases can use this file. All
divergences are in nats. Source of the loss: Li et al., *Expert Divergence
Learning for MoE-based Language Models*, ICLR 2026, arXiv:2603.00054. The
derivations of the forms used here are in the docstrings.

Axis letters: B batch row, T position, D domains, E experts.
"""

import math

import jax
import jax.numpy as jnp

LN_2 = math.log(2.0)

# Elements of the largest intermediate array of `pairwise_jensen_shannon`:
# beyond it, pairs are computed row block by row block.
_TILE_ELEMENTS = 1 << 22


def _relative_difference(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns u = (p - q) / (p + q), with 0 where both are 0."""
  total = p + q
  return jnp.where(total > 0, (p - q) / jnp.where(total > 0, total, 1), 0)


@jax.custom_jvp
def _half_log_ratio(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns log(2 p / (p + q)) / 2, the derivative of JSD by p.

  Near p = q it is log1p(u) / 2, which does not cancel. Its value at p = 0 is
  minus infinity: the ratio is floored at the smallest normal number, which in
  float32 bounds the result from below by -43.7.
  """
  u = _relative_difference(p, q)
  near = jnp.abs(u) < 0.5
  total = p + q
  ratio = 2 * p / jnp.where(total > 0, total, 1)
  ratio = jnp.maximum(ratio, jnp.finfo(p.dtype).tiny)
  far_log = jnp.where(total > 0, jnp.log(ratio), 0)
  return jnp.where(near, jnp.log1p(jnp.where(near, u, 0)), far_log) / 2


@_half_log_ratio.defjvp
def _half_log_ratio_jvp(primals, tangents):
  p, q = primals
  # d/dp = q / (2 p (p + q)) and d/dq = -1 / (2 (p + q)) grow without bound as
  # probabilities vanish: bounded so that products with tangents stay finite,
  # and that the squared bound's inverse, which XLA may form, is not flushed
  # to zero. In float32 the bound is 2.6e15.
  bound = jnp.finfo(p.dtype).max ** 0.4
  smallest = 1 / bound
  total = jnp.maximum(p + q, smallest)
  by_p = jnp.minimum(q / total / jnp.maximum(2 * p, smallest), bound)
  by_q = jnp.minimum(0.5 / total, bound)
  return _half_log_ratio(p, q), by_p * tangents[0] - by_q * tangents[1]


@jax.custom_jvp
def _jensen_shannon_terms(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns the non-negative summands of JSD(p, q), elementwise."""
  u = _relative_difference(p, q)
  magnitude = jnp.abs(u)
  near = magnitude < 0.5
  # g(u) = 2 u atanh(u) + log(1 - u^2), twice: for small |u| as it stands, and
  # towards |u| = 1 as (1+u) log(1+u) + (1-u) log(1-u), whose second product
  # vanishes there.
  small = jnp.where(near, u, 0)
  g_small = 2 * small * jnp.arctanh(small) + jnp.log1p(-small * small)
  large = jnp.where(near, 0.5, magnitude)
  total = jnp.where(p + q > 0, p + q, 1)
  # 1 - |u| without cancellation.
  rest = jnp.where(near, 0.5, 2 * jnp.minimum(p, q) / total)
  g_large = (1 + large) * jnp.log1p(large) + jax.scipy.special.xlogy(rest, rest)
  return (p + q) * jnp.where(near, g_small, g_large) / 4


@_jensen_shannon_terms.defjvp
def _jensen_shannon_terms_jvp(primals, tangents):
  p, q = primals
  tangent = _half_log_ratio(p, q) * tangents[0]
  tangent += _half_log_ratio(q, p) * tangents[1]
  return _jensen_shannon_terms(p, q), tangent


def _as_float(x: jax.Array) -> jax.Array:
  """Returns `x` in float32, or in float64 if that is what it is."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def jensen_shannon(p: jax.Array, q: jax.Array, axis: int = -1) -> jax.Array:
  """Jensen-Shannon divergence of distributions along `axis`, in nats.

  JSD(p, q) = KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2. Evaluated as
  1/4 sum_e (p_e+q_e) g(u_e), with u = (p-q)/(p+q) and
  g(u) = 2 u atanh(u) + log(1-u^2) >= 0: all terms are non-negative, so nothing
  cancels where the distributions are close, which is where the loss
  -log(JSD) is steepest. The textbook entropy form is wrong by a factor there.

  Args:
    p, q: distributions, broadcast against each other; any float dtype.
    axis: the axis that sums to one.

  Returns:
    Values in [0, ln 2], float32 (float64 if an input is), without `axis`;
    exactly 0 for p = q. The gradient by p is log(2 p / (p+q)) / 2, bounded
    below by -43.7 in float32 where p = 0.
  """
  p, q = jnp.broadcast_arrays(_as_float(p), _as_float(q))
  dtype = jnp.promote_types(p.dtype, q.dtype)
  terms = _jensen_shannon_terms(p.astype(dtype), q.astype(dtype))
  return jnp.sum(terms, axis=axis)


def pairwise_jensen_shannon(p_DE: jax.Array) -> jax.Array:
  """JSD of every pair of rows of `p_DE`, in nats.

  O(D^2 E) arithmetic; memory O(D^2 + D E) beyond a fixed tile, with gradients
  too, so that thousands of domains fit.

  Returns:
    Symmetric (D, D) with zeros on the diagonal, float32 or float64.
  """
  num_domains, num_experts = p_DE.shape
  row_elements = max(1, num_domains * num_experts)
  tile = max(1, _TILE_ELEMENTS // row_elements)
  if tile >= num_domains:
    return jensen_shannon(p_DE[:, None], p_DE[None, :])
  row = jax.checkpoint(lambda p_E: jensen_shannon(p_E, p_DE))
  return jax.lax.map(row, p_DE, batch_size=tile)


def domain_routing(
  probs_BTE: jax.Array,
  weights_BT: jax.Array,
  domain_B: jax.Array,
  num_domains: int,
) -> tuple[jax.Array, jax.Array]:
  """Averages router probabilities per sequence, then per domain.

  For use of this file alone; training sums the same statistics over layers and
  devices with `routing.collect`.

  arXiv:2603.00054, sections "token to sequence" and "sequence to domain".

  Args:
    probs_BTE: router softmax over all experts, before top-k.
    weights_BT: 1 where a token counts, 0 for padding.
    domain_B: domain label of each sequence, in [0, num_domains).
    num_domains: D.

  Returns:
    p_DE: mean of the sequence means of each domain, float32; zeros for a
      domain that does not occur.
    count_D: sequences of each domain with at least one counted token.
  """
  weights_BT = _as_float(weights_BT)
  tokens_B = weights_BT.sum(-1)
  sequence_BE = (
    jnp.einsum(
      "BTE,BT->BE",
      _as_float(probs_BTE),
      weights_BT,
      precision=jax.lax.Precision.HIGHEST,
    )
    / jnp.maximum(tokens_B, 1)[:, None]
  )
  member_BD = jax.nn.one_hot(domain_B, num_domains, dtype=sequence_BE.dtype)
  member_BD *= (tokens_B > 0)[:, None]
  count_D = member_BD.sum(0)
  sum_DE = jnp.einsum(
    "BE,BD->DE",
    sequence_BE,
    member_BD,
    precision=jax.lax.Precision.HIGHEST,
  )
  return sum_DE / jnp.maximum(count_D, 1)[:, None], count_D


def expert_divergence_loss(
  p_DE: jax.Array, present_D: jax.Array, *, eps: float = 1e-8
) -> jax.Array:
  """Expert divergence loss of one layer (arXiv:2603.00054).

  L_ED = mean over unordered pairs j < k of present domains of
  -log(JSD(p_j, p_k) + eps).

  Args:
    p_DE: mean router probabilities of each domain over the *global* batch.
    present_D: true (or positive) where the domain occurs in the batch.
    eps: added to the divergence inside the logarithm; with 0, domains that
      route exactly alike have an infinite loss.

  Returns:
    A scalar in [-log(ln 2 + eps), -log(eps)]; 0 with a gradient of exactly
    zero when fewer than two domains are present.
  """
  present_D = jnp.asarray(present_D) > 0
  num_domains = p_DE.shape[0]
  pair_DD = present_D[:, None] & present_D[None, :]
  pair_DD &= ~jnp.eye(num_domains, dtype=bool)
  divergence_DD = pairwise_jensen_shannon(p_DE)
  # Pairs that do not count, such as the diagonal, must not reach a logarithm
  # whose derivative may be infinite.
  loss_DD = -jnp.log(jnp.where(pair_DD, divergence_DD + eps, 1))
  # Every unordered pair stands twice in both sums.
  return loss_DD.sum() / jnp.maximum(pair_DD.sum(), 1)
