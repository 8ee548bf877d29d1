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


def fits(length: int) -> bool:
  """Tells whether the kernels can run on rows of `length` tokens."""
  return length % _LANES == 0


def _block(length: int) -> int:
  """The largest block, in tokens, that divides `length`."""
  return next(
    block for block in range(_LARGEST_BLOCK, 0, -_LANES) if length % block == 0
  )


def _is_fused(length: int) -> bool:
  return length // _block(length) <= _MOST_GRADIENT_PARTS


def flops(rows: int, length: int, heads: int, width: int) -> tuple[int, int]:
  """Counts what one call computes, which XLA's cost analysis leaves out.

  Of n blocks of queries, block i meets i + 1 blocks of keys. A block takes two
  products forward; backward it takes five, or seven in two kernels. Softmax
  does not count.

  Args:
    rows, length: B and T.
    heads, width: query heads N and their width H.

  Returns:
    FLOPs of the forward pass, and of the backward pass without it.
  """
  block = _block(length)
  count = length // block
  product = 2 * block**2 * width * rows * heads * count * (count + 1) // 2
  return 2 * product, (5 if _is_fused(length) else 7) * product


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Attention of scaled queries to earlier tokens of the same segment.

  Args:
    q_BTNH: queries; query head n reads key head n K // N.
    k_BSKH, v_BSKH: keys and values, S = T; K divides N.
    segments_BT: int32 document of each token.
    interpret: runs the kernels anywhere, slowly, in Pallas's interpreter.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`. Rematerialisation knows it, and what else
    the backward pass needs of the kernel, as "attention".
  """
  # Takes a third of a second, which other platforms need not spend.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_library,
  )

  length = q_BTNH.shape[1]
  block = _block(length)
  # Where a block of queries meets none of keys the kernel does not run; what
  # it reads next is what it fetches meanwhile. JAX finds the same from the
  # whole mask, which takes seconds for long rows.
  query_block = jnp.arange(length // block)[:, None]
  key_block = jnp.arange(length // block)
  runs = query_block >= key_block

  def mask_info(next_block):
    return mask_library.MaskInfo(
      data_next=next_block[None].astype(jnp.int32),
      mask_next=None,
      block_mask=runs[None].astype(jnp.int32),
      partial_mask_blocks=None,
      q_sequence=jnp.arange(length, dtype=jnp.int32),
    )

  by_query = mask_info(jnp.where(runs, key_block, 0))
  by_key = mask_info(jnp.maximum(query_block, key_block))
  fused = _is_fused(length)
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
  segments = library.SegmentIds(q=segments_BT, kv=segments_BT)
  arrays = [x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)]
  return jax.vmap(kernel)(*arrays, segments).swapaxes(1, 2)
