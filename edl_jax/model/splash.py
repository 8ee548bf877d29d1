"""Causal attention on TPUs, with the splash kernels that come with JAX.

The kernels hold blocks of queries and of keys, never all logits, and skip the
blocks above the diagonal (after Dao et al., arXiv:2205.14135).
"""

import operator

import jax
import jax.numpy as jnp

# What a vector register holds: sizes of blocks are multiples of it.
_LANES = 128
# Steps this large outlast what a step costs; of larger blocks on the diagonal
# more is computed in vain.
_LARGEST_BLOCK = 1024
# The fused backward pass does five products a block instead of seven, but
# writes a part of the queries' gradient for each block of keys.
_MOST_GRADIENT_PARTS = 8


def fits(length: int, shards: int = 1) -> bool:
  """Tells whether the kernels can run on rows of `length` tokens.

  A shard of several holds two chunks, as `attention` says.
  """
  return length % (_LANES * (2 * shards if shards > 1 else 1)) == 0


def _block(length: int, shards: int) -> int:
  """The largest block, in tokens, that divides a row, or a shard's chunks."""
  chunk = length // (2 * shards) if shards > 1 else length
  return next(
    block for block in range(_LARGEST_BLOCK, 0, -_LANES) if chunk % block == 0
  )


def _is_fused(length: int, block: int) -> bool:
  return length // block <= _MOST_GRADIENT_PARTS


def flops(
  rows: int, length: int, heads: int, width: int, shards: int = 1
) -> tuple[int, int]:
  """Counts what one call computes, which XLA's cost analysis leaves out.

  Of n blocks of queries, block i meets i + 1 blocks of keys. A block takes two
  products forward; backward it takes five, or seven in two kernels. Softmax
  does not count.

  Args:
    rows, length: B and the T of whole rows.
    heads, width: query heads N and their width H.
    shards: devices over which the T of a row is spread.

  Returns:
    FLOPs on one device of the forward pass, and of the backward pass without
    it.
  """
  block = _block(length, shards)
  count = length // block
  pairs = block**2 * (count * (count + 1) // 2) // shards
  product = 2 * width * rows * heads * pairs
  return 2 * product, (5 if _is_fused(length, block) else 7) * product


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  segments_BS: jax.Array,
  sequence_axis: str | None,
  interpret: bool = False,
) -> jax.Array:
  """Attention of scaled queries to earlier tokens of the same segment.

  Where late queries meet many keys and early ones few, P devices share the work
  evenly if each takes two of 2P chunks of queries, one as early as the other is
  late. Queries go there and outputs come back, which is far less to send than
  all keys; nothing outside needs to know.

  Args:
    q_BTNH: queries; query head n reads key head n K // N.
    k_BSKH, v_BSKH: keys and values of whole rows; K divides N.
    segments_BT, segments_BS: int32 document of each query and of each key.
    sequence_axis: the mesh axis, manual here, over which T is spread; without,
      S = T.
    interpret: runs the kernels anywhere, slowly, in Pallas's interpreter.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`. Rematerialisation knows it, and what else
    the backward pass needs of the kernel, as "attention".
  """
  length = q_BTNH.shape[1]
  positions_T = jnp.arange(length, dtype=jnp.int32)
  if sequence_axis is None:
    return _attention(
      *(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, positions_T),
      block=_block(length, shards=1),
      interpret=interpret,
    )
  shards = jax.lax.axis_size(sequence_axis)
  positions_T += jax.lax.axis_index(sequence_axis) * length
  y_BTNH = _attention(
    _to_even_shares(q_BTNH, sequence_axis),
    k_BSKH,
    v_BSKH,
    _to_even_shares(segments_BT, sequence_axis),
    segments_BS,
    _to_even_shares(positions_T[None], sequence_axis)[0],
    block=_block(shards * length, shards),
    interpret=interpret,
  )
  return _from_even_shares(y_BTNH, sequence_axis)


# --- Chunks of queries -------------------------------------------------------
# Device i of P holds the chunks 2i and 2i + 1, and works at the chunks i and
# 2P - 1 - i. One of those is even, the other odd; the even one comes first.


def _workers(sequence_axis: str, odd: bool) -> list[tuple[int, int]]:
  """Which device holds an even (an odd) chunk, and which works at it."""
  shards = jax.lax.axis_size(sequence_axis)
  chunks = range(odd, 2 * shards, 2)
  return [(c // 2, min(c, 2 * shards - 1 - c)) for c in chunks]


def _to_even_shares(x_BT: jax.Array, sequence_axis: str) -> jax.Array:
  chunks = [
    jax.lax.ppermute(chunk, sequence_axis, _workers(sequence_axis, odd))
    for odd, chunk in enumerate(jnp.split(x_BT, 2, axis=1))
  ]
  return jnp.concatenate(chunks, axis=1)


def _from_even_shares(x_BT: jax.Array, sequence_axis: str) -> jax.Array:
  chunks = []
  for odd, chunk in enumerate(jnp.split(x_BT, 2, axis=1)):
    back = [(work, hold) for hold, work in _workers(sequence_axis, odd)]
    chunks.append(jax.lax.ppermute(chunk, sequence_axis, back))
  return jnp.concatenate(chunks, axis=1)


# --- Kernel ------------------------------------------------------------------


def _attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  segments_BS: jax.Array,
  positions_T: jax.Array,
  block: int,
  interpret: bool,
) -> jax.Array:
  """Attention of any blocks of queries to the keys of whole rows."""
  # Takes a third of a second, which other platforms need not spend.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_library,
  )

  # Where a block of queries meets none of keys the kernel does not run; what
  # it reads next is what it fetches meanwhile. JAX finds the same from the
  # whole mask, which takes seconds for long rows.
  num_keys = k_BSKH.shape[1]
  key_block = jnp.arange(num_keys // block)
  query_block = positions_T[::block, None] // block
  runs = query_block >= key_block
  first_that_runs = jnp.argmax(runs, axis=0)
  number = jnp.arange(len(query_block))[:, None]

  def mask_info(next_block):
    return mask_library.MaskInfo(
      data_next=next_block[None].astype(jnp.int32),
      mask_next=None,
      block_mask=runs[None].astype(jnp.int32),
      partial_mask_blocks=None,
      q_sequence=positions_T,
    )

  by_query = mask_info(jnp.where(runs, key_block, 0))
  by_key = mask_info(jnp.where(runs, number, first_that_runs))
  fused = _is_fused(num_keys, block)
  kernel = library.SplashAttentionKernel(
    by_query,
    None if fused else by_query,
    by_key,
    block_sizes=library.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=None if fused else block,
      block_kv_dq=None if fused else block,
      use_fused_bwd_kernel=fused,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=library.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name="attention",
    mask_function=operator.ge,
    interpret=interpret,
  )
  segments = library.SegmentIds(q=segments_BT, kv=segments_BS)
  arrays = [x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)]
  return jax.vmap(kernel)(*arrays, segments).swapaxes(1, 2)
