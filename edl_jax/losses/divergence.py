"""Divergences of routing distributions, and the losses made of them.

This file imports only JAX, so that other codebases can copy it.
Logarithms are natural. Source of the loss: Li et al., *Expert Divergence
Learning for MoE-based Language Models*, ICLR 2026, arXiv:2603.00054.

Axis letters: B batch row, T position, D domains, G coarse domains (groups),
E experts, P tokens, I items of a list (pairs, tiles), J domains of a tile.
Digits are axes of that size.
"""

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer

LN_2 = math.log(2.0)

# Elements of the largest intermediate array; more pairs are computed in tiles.
_TILE_ELEMENTS = 1 << 20


@jax.custom_jvp
def _half_log_ratio(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns log(2 p / (p + q)) / 2, the derivative of JSD by p.

  Near p = q it is evaluated as log1p(u) / 2, which does not cancel. At p = 0 it
  would be minus infinity, so the ratio has a floor, the smallest normal number.
  """
  total = jnp.where(p + q > 0, p + q, 1)
  u = (p - q) / total
  near = jnp.abs(u) < 0.5
  far_log = jnp.log(jnp.maximum(2 * p / total, jnp.finfo(p.dtype).tiny))
  return jnp.where(near, jnp.log1p(jnp.where(near, u, 0)), far_log) / 2


@_half_log_ratio.defjvp
def _half_log_ratio_jvp(primals, tangents):
  p, q = primals
  # d/dp = q / (2 p (p + q)) and d/dq = -1 / (2 (p + q)). A bound, 2.6e15 in
  # float32, keeps products with tangents finite. XLA may form the inverse of
  # its square, which must not be flushed to zero.
  bound = jnp.finfo(p.dtype).max ** 0.4
  smallest = 1 / bound
  total = jnp.maximum(p + q, smallest)
  by_p = jnp.minimum(q / total / jnp.maximum(2 * p, smallest), bound)
  by_q = jnp.minimum(0.5 / total, bound)
  return _half_log_ratio(p, q), by_p * tangents[0] - by_q * tangents[1]


@jax.custom_jvp
def _jensen_shannon_terms(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns (p + q) g(u) / 4, the summands of JSD(p, q), elementwise."""
  total = jnp.where(p + q > 0, p + q, 1)
  u = jnp.abs(p - q) / total
  # g(u) = sum_k u^2k / (k (2k-1)), to the precision of float64 where near.
  g_near = 0
  for k in range(12, 0, -1):
    g_near = (g_near + 1 / (k * (2 * k - 1))) * (u * u)
  # Far from 0, g = (1+u) log(1+u) + (1-u) log(1-u); `rest` is 1 - u, evaluated
  # without cancellation.
  rest = 2 * jnp.minimum(p, q) / total
  g_far = (1 + u) * jnp.log1p(u) + jax.scipy.special.xlogy(rest, rest)
  return total * jnp.where(u < 0.25, g_near, g_far) / 4


@_jensen_shannon_terms.defjvp
def _jensen_shannon_terms_jvp(primals, tangents):
  p, q = primals
  tangent = _half_log_ratio(p, q) * tangents[0]
  tangent += _half_log_ratio(q, p) * tangents[1]
  return _jensen_shannon_terms(p, q), tangent


def _as_float(x: jax.Array) -> jax.Array:
  """Returns `x` in float32; float64 stays float64."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _distributions(p: jax.Array, q: jax.Array) -> list[jax.Array]:
  """Returns both in one float dtype and shape."""
  dtype = jnp.promote_types(jnp.result_type(p, q), jnp.float32)
  return jnp.broadcast_arrays(jnp.asarray(p, dtype), jnp.asarray(q, dtype))


def _absolute(x: jax.Array) -> jax.Array:
  """Returns |x|, with derivative 0 at 0 where that of `jnp.abs` is 1."""
  return x * jax.lax.stop_gradient(jnp.sign(x))


def jensen_shannon(p: jax.Array, q: jax.Array, axis: int = -1) -> jax.Array:
  """Jensen-Shannon divergence of distributions along `axis`, in nats.

  JSD(p, q) = KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2. Evaluated as
  1/4 sum_e (p_e+q_e) g(u_e), with u = (p-q)/(p+q) and
  g(u) = 2 u atanh(u) + log(1-u^2) >= 0. All terms are non-negative, so nothing
  cancels where the distributions are close and the loss -log(JSD) is steepest.
  There the float32 result of the textbook entropy form is wrong by a factor.

  Args:
    p, q: distributions, broadcast against each other; any float dtype.
    axis: the axis that sums to one.

  Returns:
    Values in [0, ln 2], float32 (float64 if an input is), without `axis`;
    exactly 0 for p = q. The gradient by p is log(2 p / (p+q)) / 2, bounded
    below by -43.7 in float32 where p = 0.
  """
  p, q = _distributions(p, q)
  return jnp.sum(_jensen_shannon_terms(p, q), axis=axis)


def pairwise_jensen_shannon(p_DE: jax.Array) -> jax.Array:
  """JSD of every pair of rows of `p_DE`, in nats: (D, D), float32 or float64.

  O(D^2 E) arithmetic; memory O(D^2 + D E) beyond a fixed tile, with gradients
  too, so that thousands of domains fit.
  """
  row = jax.checkpoint(lambda p_E: jensen_shannon(p_E, p_DE))
  rows = max(1, min(len(p_DE), _TILE_ELEMENTS // max(1, p_DE.size)))
  return jax.lax.map(row, p_DE, batch_size=rows)


def hellinger(p: jax.Array, q: jax.Array) -> jax.Array:
  """Hellinger distance along the last axis, in [0, 1] (Hellinger 1909).

  H = sqrt(sum_e (sqrt p_e - sqrt q_e)^2 / 2). Each difference of roots is
  evaluated as (p-q) / (sqrt p + sqrt q), which does not cancel. The derivative
  by p_e, (1 - sqrt(q_e/p_e)) / (4 H), is infinite at p_e = 0 and undefined at
  p = q. Therefore probabilities below 1e-16 count as 1e-16, and H^2 / 1e-10,
  whose gradient at p = q is 0, replaces an H below 1e-10.
  """
  p, q = (jnp.maximum(x, 1e-16) for x in _distributions(p, q))
  gap = (p - q) / (jnp.sqrt(p) + jnp.sqrt(q))
  square = jnp.sum(gap**2, axis=-1) / 2
  return square / jnp.sqrt(jnp.maximum(square, 1e-20))


def total_variation(p: jax.Array, q: jax.Array) -> jax.Array:
  """Total variation distance along the last axis, in [0, 1] (Jordan 1881).

  TV = sum_e |p_e - q_e| / 2, the largest difference in the probability of any
  set of experts. The derivative where p_e = q_e is 0.
  """
  p, q = _distributions(p, q)
  return jnp.sum(_absolute(p - q), axis=-1) / 2


def symmetric_kl(p: jax.Array, q: jax.Array) -> jax.Array:
  """Jeffreys divergence along the last axis, in nats (Jeffreys 1946).

  J = KL(p||q) + KL(q||p) = sum_e (p_e - q_e) log(p_e/q_e), a sum of
  non-negative terms. Near p = q the logarithm is evaluated as
  2 atanh((p-q) / (p+q)). Probabilities below 1e-12 count as 1e-12, so J is at
  most 55.3 and derivatives are at least -1e12.
  """
  p, q = (jnp.maximum(x, 1e-12) for x in _distributions(p, q))
  u = (p - q) / (p + q)
  near = jnp.abs(u) < 0.5
  log_ratio = 2 * jnp.arctanh(jnp.where(near, u, 0))
  log_ratio = jnp.where(near, log_ratio, jnp.log(p) - jnp.log(q))
  return jnp.sum((p - q) * log_ratio, axis=-1)


def wasserstein(p: jax.Array, q: jax.Array) -> jax.Array:
  """Wasserstein-1 distance along the last axis, in [0, 1] (Kantorovich 1942).

  The least cost of moving mass until p becomes q. The experts stand in their
  order on a line, and moving a unit from expert i to expert j costs
  |i-j|/(E-1). In closed form the distance is sum_e |P_e - Q_e| / (E-1), with P
  and Q the cumulative sums.
  """
  p, q = _distributions(p, q)
  surplus = jnp.cumsum(p - q, axis=-1)[..., :-1]
  return jnp.sum(_absolute(surplus), axis=-1) / max(1, p.shape[-1] - 1)


_DIVERGENCES = {
  "jensen_shannon": jensen_shannon,
  "hellinger": hellinger,
  "total_variation": total_variation,
  "symmetric_kl": symmetric_kl,
  "wasserstein": wasserstein,
}
DIVERGENCES = tuple(_DIVERGENCES)


def domain_routing(
  probs_BTE: jax.Array,
  weights_BT: jax.Array,
  domain_B: jax.Array,
  num_domains: int,
) -> tuple[jax.Array, jax.Array]:
  """Averages router probabilities per sequence, then per domain.

  For codebases that copy this file. The training of edl_jax sums the same
  statistics over layers and devices (`routing.collect`). arXiv:2603.00054.

  Args:
    probs_BTE: router softmax over all experts, before top-k.
    weights_BT: 1 where a token counts, 0 for padding.
    domain_B: domain label of each sequence, in [0, num_domains). Traced labels
      cannot be checked, so the caller must check them before `jax.jit`; a
      sequence with another label counts for no domain.

  Returns:
    p_DE: mean of the sequence means of each domain, float32; zeros for a
      domain that does not occur.
    count_D: sequences of each domain with at least one counted token.

  Raises:
    ValueError: a label outside the range.
  """
  if not isinstance(domain_B, Tracer):
    with jax.ensure_compile_time_eval():
      outside_B = (domain_B < 0) | (domain_B >= num_domains)
      if outside_B.any():
        label = int(domain_B[outside_B.argmax()])
        raise ValueError(f"domain label {label} is not in [0, {num_domains})")
  weights_BT = _as_float(weights_BT)
  tokens_B = weights_BT.sum(-1)
  member_BD = jax.nn.one_hot(domain_B, num_domains, dtype=weights_BT.dtype)
  member_BD *= (tokens_B > 0)[:, None]
  count_D = member_BD.sum(0)
  with jax.default_matmul_precision("highest"):
    sum_BE = jnp.einsum("BTE,BT->BE", _as_float(probs_BTE), weights_BT)
    sequence_BE = sum_BE / jnp.maximum(tokens_B, 1)[:, None]
    sum_DE = jnp.einsum("BE,BD->DE", sequence_BE, member_BD)
  return sum_DE / jnp.maximum(count_D, 1)[:, None], count_D


def expert_divergence_loss(
  p_DE: jax.Array,
  present_D: jax.Array,
  *,
  eps: float = 1e-8,
  divergence: str = "jensen_shannon",
  max_present: int | None = None,
) -> jax.Array:
  """Expert divergence loss of one layer (arXiv:2603.00054).

  L_ED = mean over unordered pairs j < k of present domains of
  -log(divergence(p_j, p_k) + eps); the paper's is Jensen-Shannon.

  O(min(D, max_present)^2 E) arithmetic. Memory O(D E) beyond a fixed tile, with
  gradients too.

  Args:
    p_DE: mean router probabilities of each domain over the *global* batch.
    present_D: true (or positive) where the domain occurs in the batch. The
      values in rows of absent domains have no influence.
    eps: added to the divergence inside the logarithm; with 0, domains that
      route exactly alike have an infinite loss.
    divergence: one of `DIVERGENCES`; see the function of that name.
    max_present: largest number of domains that can be present, such as the
      number of rows in the batch. The loss leaves out any further domains. By
      default, all can be present.

  Returns:
    A scalar in [-log(largest divergence + eps), -log(eps)]; 0 with a gradient
    of exactly zero when fewer than two domains or experts are present.

  Raises:
    ValueError: no such divergence.
  """
  if divergence not in DIVERGENCES:
    names = ", ".join(DIVERGENCES)
    raise ValueError(f"no divergence {divergence!r}: it must be one of {names}")
  p_DE, present_D = _as_float(p_DE), jnp.asarray(present_D) > 0
  if max_present is not None and max_present < len(p_DE):
    first = jnp.argsort(~present_D, stable=True)[:max_present]
    p_DE, present_D = p_DE[first], present_D[first]
  num_domains, num_experts = p_DE.shape
  if num_domains < 2 or num_experts < 2:
    return jnp.zeros((), p_DE.dtype)
  tile = max(1, math.isqrt(_TILE_ELEMENTS // num_experts))
  num_tiles = -(-num_domains // tile)
  # Tiles of equal size, with absent domains for padding.
  tile = -(-num_domains // num_tiles)
  padding = num_tiles * tile - num_domains
  present_D = jnp.pad(present_D, (0, padding))
  p_DE = jnp.pad(p_DE, ((0, padding), (0, 0)))
  p_DE = jnp.where(present_D[:, None], p_DE, 1 / num_experts)
  p_IJE = p_DE.reshape(num_tiles, tile, num_experts)
  present_IJ = present_D.reshape(num_tiles, tile)
  upper_JJ = jnp.triu(jnp.ones((tile, tile), bool), 1)

  def add_tile_pair(total, pair):
    j, k = pair
    counts_JJ = present_IJ[j][:, None] & present_IJ[k] & (upper_JJ | (j < k))
    d_JJ = _DIVERGENCES[divergence](p_IJE[j][:, None], p_IJE[k])
    # Pairs that do not count could have an infinite derivative.
    loss_JJ = -jnp.log(jnp.where(counts_JJ, d_JJ + eps, 1))
    return total + loss_JJ.sum(), None

  total, _ = jax.lax.scan(
    jax.checkpoint(add_tile_pair, prevent_cse=False),
    jnp.zeros((), p_DE.dtype),
    jnp.array([(j, k) for k in range(num_tiles) for j in range(k + 1)]),
  )
  num_present = present_D.sum().astype(p_DE.dtype)
  return total / jnp.maximum(num_present * (num_present - 1) / 2, 1)


def hierarchical_divergence_loss(
  p_DE: jax.Array,
  count_D: jax.Array,
  parent_D: tuple[int, ...],
  *,
  coarse_weight: float = 0.5,
  eps: float = 1e-8,
  divergence: str = "jensen_shannon",
  max_present: int | None = None,
) -> jax.Array:
  """Weighted sum of the expert divergence losses of two levels of labels.

  coarse_weight * L_coarse + (1 - coarse_weight) * L_fine. The mean of a coarse
  domain is over all its sequences: its fine means, weighted by their counts.

  Args:
    p_DE, count_D: of the fine domains, as from `domain_routing`.
    parent_D: the coarse domain of each fine domain, from 0.
    coarse_weight: in [0, 1]; with 0 or 1 the other level is not computed.
    eps, divergence, max_present: as in `expert_divergence_loss`.

  Raises:
    ValueError: parents that do not fit; see also `expert_divergence_loss`.
  """

  def loss(p: jax.Array, count: jax.Array) -> jax.Array:
    return expert_divergence_loss(
      p, count, eps=eps, divergence=divergence, max_present=max_present
    )

  if not coarse_weight:
    return loss(p_DE, count_D)
  if len(parent_D) != len(p_DE) or min(parent_D) < 0:
    raise ValueError(
      f"parent_D is {parent_D}: {len(p_DE)} domains need as many labels from 0"
    )
  count_D1 = jnp.asarray(count_D)[:, None]
  sum_DE = jnp.where(count_D1 > 0, count_D1 * _as_float(p_DE), 0)
  parents = (jnp.array(parent_D), max(parent_D) + 1)
  count_G = jax.ops.segment_sum(count_D1[:, 0], *parents)
  sum_GE = jax.ops.segment_sum(sum_DE, *parents)
  p_GE = sum_GE / jnp.maximum(count_G, 1)[:, None]
  coarse = loss(p_GE, count_G)
  if coarse_weight == 1:
    return coarse
  return coarse_weight * coarse + (1 - coarse_weight) * loss(p_DE, count_D)


def sample_token_pairs(
  weights_P: jax.Array, key: jax.Array, num_pairs: int = 4096
) -> tuple[jax.Array, jax.Array]:
  """Draws pairs of two different counted tokens, uniformly with replacement.

  Args:
    weights_P: positive where a token counts.
    key: of `jax.random`.
    num_pairs: I.

  Returns:
    index_I2, int32, the two tokens of each pair; and counted_I, bool, which is
    false for every pair if fewer than two tokens count.
  """
  rank_P = jnp.cumsum(weights_P > 0)
  num_tokens = rank_P[-1]
  first_key, second_key = jax.random.split(key)
  first_I = jax.random.randint(first_key, (num_pairs,), 0, num_tokens)
  # The second token is uniform over all counted tokens but the first: ranks
  # from the first token's on move up by one.
  second_I = jax.random.randint(second_key, (num_pairs,), 0, num_tokens - 1)
  second_I += second_I >= first_I
  # The counted token of rank r, from 0, is the first whose sum exceeds r.
  index_I2 = jnp.searchsorted(
    rank_P, jnp.stack([first_I, second_I], -1), side="right"
  )
  return index_I2, jnp.broadcast_to(num_tokens > 1, first_I.shape)


def token_pair_sums(
  probs_I2E: jax.Array, domain_I2: jax.Array, counted_I: jax.Array
) -> jax.Array:
  """Sums the divergence of token pairs, of one domain and of two.

  Args:
    probs_I2E: router softmax of both tokens; may have leading axes, which the
      sums keep.
    domain_I2: domain labels of both tokens.
    counted_I: true where a pair counts.

  Returns:
    Sums (..., 2, 2), which add over batches. The first axis of size 2: pairs of
    one domain, pairs of two domains. The second: summed JSD in nats, pairs.
  """
  divergence_I = jensen_shannon(probs_I2E[..., 0, :], probs_I2E[..., 1, :])
  same_I = domain_I2[:, 0] == domain_I2[:, 1]
  kinds_2I = counted_I & jnp.stack([same_I, ~same_I])
  total_2 = divergence_I[..., None, :].sum(-1, where=kinds_2I)
  pairs_2 = kinds_2I.sum(-1).astype(total_2.dtype)
  return jnp.stack([total_2, jnp.broadcast_to(pairs_2, total_2.shape)], -1)


def token_pair_divergence_loss(sums_22: jax.Array) -> jax.Array:
  """Mean JSD of token pairs of one domain less that of two domains, in nats.

  After a press account of expert divergence learning: sample pairs of tokens,
  maximise JSD for different domains and minimise it for the same. No formula
  is published. This one is linear in JSD, so that tokens that route alike do
  not dominate.

      index_I2, counted_I = sample_token_pairs(weights_P, key)
      loss = token_pair_divergence_loss(
        token_pair_sums(probs_PE[index_I2], domain_P[index_I2], counted_I)
      )

  Args:
    sums_22: from `token_pair_sums`, with any leading axes.

  Returns:
    Values in [-ln 2, ln 2], without the last two axes. A mean over no pairs is
    0: with fewer than two counted tokens, the loss and its gradient are 0.
  """
  mean_2 = sums_22[..., 0] / jnp.maximum(sums_22[..., 1], 1)
  return mean_2[..., 0] - mean_2[..., 1]
