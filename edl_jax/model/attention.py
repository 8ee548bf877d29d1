"""Grouped-query attention with rotary positions and QK normalisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from edl_jax import sharding
from edl_jax.config import ModelConfig
from edl_jax.model import cudnn, splash
from edl_jax.model.layers import HeadsRMSNorm, RMSNorm, fan_in_normal
from edl_jax.model.rope import rotary_embedding

# Blocks of queries. With n blocks, (n + 1) / 2n of all pairs are computed.
_QUERY_BLOCKS = 4
# Shorter blocks make matrix products too small to run fast.
_SHORTEST_QUERY_BLOCK = 32


def _attend_primal(
  q_BKQTH, k_BKSH, v_BKSH, segments_BT, segments_BS, blocks, sequence_axis
) -> jax.Array:
  """Softmax attention with one pass over (T, S) for each of its formulas.

  The derivative is written by hand: autodiff's takes twice the time on a CPU.

  Args:
    q_BKQTH: scaled queries.
    k_BKSH, v_BKSH: keys and values.
    segments_BT, segments_BS: int32 document of each query and of each key.
    blocks: of queries: first query, end, and number of keys that it sees.
    sequence_axis: as in `causal_attention`.
  """
  return _attend_forward(
    q_BKQTH, k_BKSH, v_BKSH, segments_BT, segments_BS, blocks, sequence_axis
  )[0]


def _attend_forward(
  q_BKQTH, k_BKSH, v_BKSH, segments_BT, segments_BS, blocks, sequence_axis
):
  dtype = q_BKQTH.dtype
  positions_T = jnp.arange(segments_BT.shape[1])
  if sequence_axis is not None:
    positions_T += jax.lax.axis_index(sequence_axis) * len(positions_T)
  results, softmax = [], []
  for start, end, seen in blocks:
    mask_BTS = segments_BT[:, start:end, None] == segments_BS[:, None, :seen]
    mask_BTS &= positions_T[start:end, None] >= jnp.arange(seen)
    logits_BKQTS = jnp.einsum(
      "BKQTH,BKSH->BKQTS",
      q_BKQTH[:, :, :, start:end],
      k_BKSH[:, :, :seen],
      preferred_element_type=jnp.float32,
    )
    logits_BKQTS = jnp.where(mask_BTS[:, None, None], logits_BKQTS, -1e30)
    exp_BKQTS = jnp.exp(logits_BKQTS - logits_BKQTS.max(-1, keepdims=True))
    exp_BKQTS = exp_BKQTS.astype(dtype)
    sum_BKQT1 = exp_BKQTS.sum(-1, keepdims=True, dtype=jnp.float32)
    # Divide after the product: that is H divisions a query instead of S.
    y_BKQTH = jnp.einsum(
      "BKQTS,BKSH->BKQTH",
      exp_BKQTS,
      v_BKSH[:, :, :seen],
      preferred_element_type=jnp.float32,
    )
    results.append((y_BKQTH / sum_BKQT1).astype(dtype))
    softmax.append((exp_BKQTS, sum_BKQT1))
  y_BKQTH = checkpoint_name(jnp.concatenate(results, axis=3), "attention")
  return y_BKQTH, (q_BKQTH, k_BKSH, v_BKSH, softmax, y_BKQTH)


def _attend_backward(blocks, sequence_axis, residuals, dy_BKQTH):
  del sequence_axis
  q_BKQTH, k_BKSH, v_BKSH, softmax, y_BKQTH = residuals
  dtype = q_BKQTH.dtype
  inner_BKQT1 = (dy_BKQTH * y_BKQTH).sum(-1, keepdims=True, dtype=jnp.float32)
  dq = []
  dk_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
  dv_BKSH = jnp.zeros(v_BKSH.shape, jnp.float32)
  for (start, end, seen), (exp_BKQTS, sum_BKQT1) in zip(
    blocks, softmax, strict=True
  ):
    dy_block = (dy_BKQTH[:, :, :, start:end] / sum_BKQT1).astype(dtype)
    dv_BKSH = dv_BKSH.at[:, :, :seen].add(
      jnp.einsum(
        "BKQTS,BKQTH->BKSH",
        exp_BKQTS,
        dy_block,
        preferred_element_type=jnp.float32,
      )
    )
    dexp_BKQTS = jnp.einsum(
      "BKQTH,BKSH->BKQTS",
      dy_block,
      v_BKSH[:, :, :seen],
      preferred_element_type=jnp.float32,
    )
    inner_block = inner_BKQT1[:, :, :, start:end] / sum_BKQT1
    dlogits_BKQTS = (exp_BKQTS * (dexp_BKQTS - inner_block)).astype(dtype)
    dq.append(
      jnp.einsum("BKQTS,BKSH->BKQTH", dlogits_BKQTS, k_BKSH[:, :, :seen])
    )
    dk_BKSH = dk_BKSH.at[:, :, :seen].add(
      jnp.einsum(
        "BKQTS,BKQTH->BKSH",
        dlogits_BKQTS,
        q_BKQTH[:, :, :, start:end],
        preferred_element_type=jnp.float32,
      )
    )
  dq_BKQTH = jnp.concatenate(dq, axis=3)
  return dq_BKQTH, dk_BKSH.astype(dtype), dv_BKSH.astype(dtype), None, None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(5, 6))
_attend.defvjp(_attend_forward, _attend_backward)


def _dense_attention(
  q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, sequence_axis
):
  """Attention by XLA, which holds all logits of a block of queries."""
  rows, length, heads, width = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKQH = q_BTNH.reshape(rows, length, kv_heads, -1, width)
  count = _QUERY_BLOCKS
  if length % count or length // count < _SHORTEST_QUERY_BLOCK:
    count = 1
  if sequence_axis is not None:
    # Blocks skip keys by position, which differs from device to device.
    count = 1
  size = length // count
  blocks = tuple(
    (end - size, end, end if sequence_axis is None else k_BSKH.shape[1])
    for end in range(size, length + 1, size)
  )
  y_BKQTH = _attend(
    q_BTKQH.transpose(0, 2, 3, 1, 4),
    k_BSKH.swapaxes(1, 2),
    v_BSKH.swapaxes(1, 2),
    segments_BT,
    segments_BS,
    blocks,
    sequence_axis,
  )
  return y_BKQTH.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


# The implementation for each platform; "default" is for all others.
BACKENDS = {"tpu": splash.attention, "default": _dense_attention}


def causal_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  sequence_axis: str | None = None,
  backend: str | None = None,
) -> jax.Array:
  """Scaled dot-product attention to earlier tokens of the same segment.

  Vaswani et al., arXiv:1706.03762; query head n reads key head n K // N
  (Ainslie et al., arXiv:2305.13245). Logits and softmax are float32.
  Rematerialisation policies know the output by the name "attention".

  Args:
    q_BTNH: queries.
    k_BSKH, v_BSKH: keys and values, S = T; K divides N.
    segments_BT: int32 document of each token.
    sequence_axis: the manual mesh axis, if any, over which the tokens of a row
      are spread in order. T and S are then a shard's, and this function gathers
      keys, values and segments.
    backend: a name of `BACKENDS`. By default the one of the platform that the
      program is compiled for, if it can run this length.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`.
  """
  length, width = q_BTNH.shape[1], q_BTNH.shape[3]
  shards, segments_BS = 1, segments_BT
  if sequence_axis is not None:
    shards = jax.lax.axis_size(sequence_axis)
    k_BSKH, v_BSKH, segments_BS = (
      jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True)
      for x in (k_BSKH, v_BSKH, segments_BT)
    )
  arrays = (q_BTNH * width**-0.5, k_BSKH, v_BSKH, segments_BT, segments_BS)
  attend = {
    name: functools.partial(function, sequence_axis=sequence_axis)
    for name, function in BACKENDS.items()
  }
  if backend is not None:
    return attend[backend](*arrays)
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu":
    if cudnn.fits(q_BTNH, sequence_axis):
      return cudnn.attention(*arrays)
    return attend["default"](*arrays)
  if not splash.fits(shards * length, shards):
    return attend["default"](*arrays)
  # A mesh names the platform that the program is compiled for. Without one,
  # trace every backend and let the compiler choose.
  if device is None:
    return jax.lax.platform_dependent(*arrays, **attend)
  return attend.get(device.platform, attend["default"])(*arrays)


class KVCache(NamedTuple):
  """Keys and values of layers of a kind, at the slots of their positions."""

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array


def cached_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  positions_BT: jax.Array,
) -> jax.Array:
  """Computes what `causal_attention` does, over keys that a cache holds.

  Args:
    q_BTNH: queries.
    k_BSKH, v_BSKH: keys and values; that of position s is in slot s.
    positions_BT: position of each query, which sees slots up to its own.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`.
  """
  rows, length, _, width = q_BTNH.shape
  q_BTKQH = q_BTNH.reshape(rows, length, k_BSKH.shape[2], -1, width)
  logits_BKQTS = jnp.einsum(
    "BTKQH,BSKH->BKQTS",
    q_BTKQH * width**-0.5,
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  mask_BTS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[..., None]
  logits_BKQTS = jnp.where(mask_BTS[:, None, None], logits_BKQTS, -1e30)
  exp_BKQTS = jnp.exp(logits_BKQTS - logits_BKQTS.max(-1, keepdims=True))
  exp_BKQTS = exp_BKQTS.astype(q_BTNH.dtype)
  sum_BKQT1 = exp_BKQTS.sum(-1, keepdims=True, dtype=jnp.float32)
  y_BKQTH = jnp.einsum(
    "BKQTS,BSKH->BKQTH",
    exp_BKQTS,
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  y_BKQTH = (y_BKQTH / sum_BKQT1).astype(q_BTNH.dtype)
  return y_BKQTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


# Queries that `branching_attention` takes at a time.
_BRANCHING_QUERIES = 512


def branching_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  branch_BT: jax.Array,
  stem_k_SKH: jax.Array,
  stem_v_SKH: jax.Array,
  stem_length: jax.Array,
) -> jax.Array:
  """Attention to a stem that all rows share, and to a token's own branch.

  Args:
    q_BTNH: queries.
    k_BTKH, v_BTKH: their keys and values.
    branch_BT: a token sees the earlier ones of branch 0 and of its own.
    stem_k_SKH, stem_v_SKH, stem_length: keys and values of the stem; those from
      `stem_length` on are not seen.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`.
  """
  rows, length, _, width = q_BTNH.shape
  kv_heads = k_BTKH.shape[2]
  q_BTKQH = (q_BTNH * width**-0.5).reshape(rows, length, kv_heads, -1, width)
  q_BKQTH = q_BTKQH.transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
  in_stem_S = jnp.arange(len(stem_k_SKH)) < stem_length
  results = []
  for start in range(0, length, _BRANCHING_QUERIES):
    end = min(start + _BRANCHING_QUERIES, length)
    own_BTS = branch_BT[:, start:end, None] == branch_BT[:, None, :end]
    own_BTS |= branch_BT[:, None, :end] == 0
    own_BTS &= jnp.arange(start, end)[:, None] >= jnp.arange(end)
    block_BKQTH = q_BKQTH[:, :, :, start:end]
    own_BKQTS, stem_BKQTS = (
      jnp.where(
        mask,
        jnp.einsum(formula, block_BKQTH, k, preferred_element_type=jnp.float32),
        -1e30,
      )
      for formula, k, mask in (
        ("BKQTH,BKSH->BKQTS", k_BKSH[:, :, :end], own_BTS[:, None, None]),
        ("BKQTH,SKH->BKQTS", stem_k_SKH, in_stem_S),
      )
    )
    largest_BKQT1 = own_BKQTS.max(-1, keepdims=True)
    if len(stem_k_SKH):
      largest_BKQT1 = jnp.maximum(
        largest_BKQT1, stem_BKQTS.max(-1, keepdims=True)
      )
    y_BKQTH, sum_BKQT1 = 0.0, 0.0
    for formula, logits_BKQTS, v in (
      ("BKQTS,BKSH->BKQTH", own_BKQTS, v_BKSH[:, :, :end]),
      ("BKQTS,SKH->BKQTH", stem_BKQTS, stem_v_SKH),
    ):
      exp_BKQTS = jnp.exp(logits_BKQTS - largest_BKQT1).astype(q_BTNH.dtype)
      sum_BKQT1 += exp_BKQTS.sum(-1, keepdims=True, dtype=jnp.float32)
      y_BKQTH += jnp.einsum(
        formula, exp_BKQTS, v, preferred_element_type=jnp.float32
      )
    results.append((y_BKQTH / sum_BKQT1).astype(q_BTNH.dtype))
  y_BKQTH = jnp.concatenate(results, axis=3)
  return y_BKQTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _heads_norm(
  config: ModelConfig, heads: int
) -> RMSNorm | HeadsRMSNorm | None:
  if config.qk_norm == "none":
    return None
  if config.qk_norm == "full":
    return HeadsRMSNorm(heads, config.head_width, config.norm_epsilon)
  return RMSNorm(config.head_width, config.norm_epsilon)


class Attention(nnx.Module):
  """Causal attention within documents."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    m, h = config.width, config.head_width
    n, k = config.num_heads, config.num_kv_heads
    query, key_, value, out = jax.random.split(key, 4)
    self.config = config
    self.query_MNH = nnx.Param(fan_in_normal(query, (m, n, h), m))
    self.key_MKH = nnx.Param(fan_in_normal(key_, (m, k, h), m))
    self.value_MKH = nnx.Param(fan_in_normal(value, (m, k, h), m))
    # Residual branches start small: Radford et al., 2019 (GPT-2), section 2.3.
    residual_scale = (2 * config.num_layers) ** -0.5
    self.out_NHM = nnx.Param(
      fan_in_normal(out, (n, h, m), n * h, residual_scale)
    )
    self.query_norm = _heads_norm(config, n)
    self.key_norm = _heads_norm(config, k)
    if config.attention_bias != "none":
      self.query_bias_NH = nnx.Param(jnp.zeros((n, h)))
      self.key_bias_KH = nnx.Param(jnp.zeros((k, h)))
      self.value_bias_KH = nnx.Param(jnp.zeros((k, h)))
    if config.attention_bias == "all":
      self.out_bias_M = nnx.Param(jnp.zeros((m,)))

  def __call__(
    self, x_BTM: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array
  ) -> jax.Array:
    """Returns the attention branch's output, (B, T, M), dtype of `x_BTM`."""
    is_spread = sharding.spread_axes(("sequence",))
    y_BTNH = causal_attention(
      *(*self._projections(x_BTM, positions_BT), segments_BT),
      sequence_axis="sequence" if is_spread else None,
    )
    return self._output(y_BTNH)

  def cached(
    self,
    x_BTM: jax.Array,
    positions_BT: jax.Array,
    cache: KVCache,
    layer: jax.Array,
  ) -> tuple[jax.Array, KVCache]:
    """Attends as `__call__` does, and keeps keys and values in the cache.

    Every device along `sequence` computes the same.

    Args:
      x_BTM: one token of each row; or its first T, which see only each other.
      positions_BT: positions of the tokens within their documents.
      cache: keys and values of the tokens before.
      layer: index of this layer in the cache.

    Returns:
      The branch's output, and the cache with these tokens.
    """
    q_BTNH, k_BTKH, v_BTKH = self._projections(x_BTM, positions_BT)
    rows_B1 = jnp.arange(len(x_BTM))[:, None]
    cache = KVCache(
      cache.k_LBSKH.at[layer, rows_B1, positions_BT].set(k_BTKH),
      cache.v_LBSKH.at[layer, rows_B1, positions_BT].set(v_BTKH),
    )
    if x_BTM.shape[1] > 1:
      ones_BT = jnp.ones(positions_BT.shape, jnp.int32)
      y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, ones_BT)
    else:
      y_BTNH = cached_attention(
        q_BTNH, cache.k_LBSKH[layer], cache.v_LBSKH[layer], positions_BT
      )
    return self._output(y_BTNH), cache

  def branching(
    self,
    x_BTM: jax.Array,
    positions_BT: jax.Array,
    branch_BT: jax.Array,
    stem_k_SKH: jax.Array,
    stem_v_SKH: jax.Array,
    stem_length: jax.Array,
  ) -> tuple[jax.Array, KVCache]:
    """Attends as `branching_attention` does.

    Returns:
      The branch's output, and keys and values of these tokens, (B, T, K, H).
    """
    q_BTNH, k_BTKH, v_BTKH = self._projections(x_BTM, positions_BT)
    y_BTNH = branching_attention(
      *(q_BTNH, k_BTKH, v_BTKH, branch_BT),
      *(stem_k_SKH, stem_v_SKH, stem_length),
    )
    return self._output(y_BTNH), KVCache(k_BTKH, v_BTKH)

  def _gathered(self, name: str, dtype: jnp.dtype) -> jax.Array:
    return sharding.gather(name, getattr(self, name)[...].astype(dtype))

  def _projections(self, x_BTM, positions_BT):
    """Returns q_BTNH, k_BSKH and v_BSKH, the first two rotated."""

    dtype = x_BTM.dtype

    def project(name, bias):
      y_BTNH = jnp.einsum("BTM,MNH->BTNH", x_BTM, self._gathered(name, dtype))
      if self.config.attention_bias == "none":
        return y_BTNH
      return y_BTNH + self._gathered(bias, dtype)

    q_BTNH = project("query_MNH", "query_bias_NH")
    k_BSKH = project("key_MKH", "key_bias_KH")
    v_BSKH = project("value_MKH", "value_bias_KH")
    if self.query_norm is not None and self.key_norm is not None:
      q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
    q_BTNH = rotary_embedding(q_BTNH, positions_BT, self.config)
    k_BSKH = rotary_embedding(k_BSKH, positions_BT, self.config)
    return q_BTNH, k_BSKH, v_BSKH

  def _output(self, y_BTNH):
    out_NHM = self._gathered("out_NHM", y_BTNH.dtype)
    y_BTM = jnp.einsum("BTNH,NHM->BTM", y_BTNH, out_NHM)
    y_BTM = sharding.sum_over(y_BTM, ("tensor",))
    if self.config.attention_bias == "all":
      # Behind the sum, which would add the bias once for each device.
      y_BTM += self._gathered("out_bias_M", y_BTM.dtype)
    return y_BTM
