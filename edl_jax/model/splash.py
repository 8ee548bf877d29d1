"""Causal attention on TPUs, with the splash kernels that come with JAX.

The kernels hold blocks of queries and of keys, never all logits, and skip the
blocks above the diagonal (after Dao et al., arXiv:2205.14135).
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

# Elements in a row of a vector register; block sizes are multiples of it.
_LANES = 128
# At this size a step's work outweighs its overhead. Larger blocks would waste
# more work on masked pairs at the diagonal.
_LARGEST_BLOCK = 1024
# The fused backward pass does five products a block instead of seven, but
# writes one partial gradient of the queries for each block of keys.
_MOST_GRADIENT_PARTS = 8


def fits(length: int, shards: int = 1) -> bool:
  """Tells whether the kernels can run on rows of `length` tokens.

  If shards share a row, each holds two chunks of it; see `attention`.
  """
  return length % (_LANES * (2 * shards if shards > 1 else 1)) == 0


def _block(length: int, shards: int) -> int:
  """Returns the largest block that divides a row, or a shard's two chunks."""
  chunk = length // (2 * shards) if shards > 1 else length
  return next(
    block for block in range(_LARGEST_BLOCK, 0, -_LANES) if chunk % block == 0
  )


def _is_fused(length: int, block: int) -> bool:
  return length // block <= _MOST_GRADIENT_PARTS


def flops(
  rows: int, length: int, heads: int, width: int, shards: int = 1
) -> tuple[int, int]:
  """Counts the FLOPs of one call, which XLA's cost analysis leaves out.

  Block i of queries meets i + 1 blocks of keys. Each such pair takes two
  products forward; backward it takes five, or seven in two kernels. Softmax
  does not count.

  Args:
    rows, length: B and the T of whole rows.
    heads, width: query heads N and their width H.
    shards: devices over which the T of a row is spread.

  Returns:
    FLOPs on one device of the forward pass, and of the backward pass alone.
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

  Late queries meet many keys and early ones few. n devices share this work
  evenly if each takes two of 2n chunks of queries, one as early as the other is
  late. This function sends queries to such places and their outputs back, which
  is far less than all keys; callers see no difference.

  Args:
    q_BTNH: queries; query head n reads key head n K // N.
    k_BSKH, v_BSKH: keys and values of whole rows; K divides N.
    segments_BT, segments_BS: int32 document of each query and of each key.
    sequence_axis: the manual mesh axis over which T is spread; None if S = T.
    interpret: runs the kernels anywhere, slowly, in Pallas's interpreter.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`. Rematerialisation policies know it, and
    the kernel's other residuals, by the name "attention".
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
# Device i of n holds the chunks 2i and 2i + 1, and works on the chunks i and
# 2n - 1 - i. One of these two is even and the other odd; the even one is first.


def _workers(sequence_axis: str, odd: int) -> list[tuple[int, int]]:
  """Returns (holder, worker) of every even chunk, or of every odd one."""
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
  """Runs the kernel: any blocks of queries against the keys of whole rows."""
  # This import takes a third of a second, which other platforms need not spend.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_library,
  )

  # The kernel skips pairs of blocks that are masked entirely, and `data_next`
  # names the block to fetch meanwhile. JAX can derive both from the whole mask,
  # but takes seconds for long rows.
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
      # Declared as a NumPy array; a traced one serves as well.
      q_sequence=positions_T,  # pyright: ignore[reportArgumentType]
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
  return _run(kernel, *arrays, segments).swapaxes(1, 2)


# --- The sum of partial gradients --------------------------------------------
# The library adds the partial gradients of the queries by a reduction. The
# TPU's compiler expects a tenth of the memory's bandwidth of it, and half of
# additions. So the library's derivative is traced, and the reduction replaced.


@jax.custom_vjp
def _run(
  kernel: Any, q_BNTH: Any, k_BKSH: Any, v_BKSH: Any, segments: Any
) -> Any:
  """Runs the library's kernel on each row."""
  return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)


def _run_forward(kernel, q_BNTH, k_BKSH, v_BKSH, segments):
  return jax.vjp(
    lambda *arrays: jax.vmap(kernel)(*arrays, segments), q_BNTH, k_BKSH, v_BKSH
  )


def _run_backward(pull_back, dy_BNTH):
  traced, shapes = jax.make_jaxpr(pull_back, return_shape=True)(dy_BNTH)
  gradients = jaxpr_as_fun(_with_additions(traced))(dy_BNTH)
  # Without it the additions become a part of what follows, and run twice.
  gradients = jax.lax.optimization_barrier(gradients)
  return None, *jax.tree.unflatten(jax.tree.structure(shapes), gradients), None


_run.defvjp(_run_forward, _run_backward)


def _added(parts: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
  """Adds slices, of which each is converted by itself.

  Converted together they would be written to memory first.
  """
  return functools.reduce(
    jnp.add,
    (
      jax.lax.index_in_dim(parts, i, axis, keepdims=False).astype(dtype)
      for i in range(parts.shape[axis])
    ),
  )


def _with_additions(traced: ClosedJaxpr) -> ClosedJaxpr:
  """Replaces sums over one axis in front of matrices by additions.

  The kernels themselves stay as they are, and so does what this does not know.
  """
  equations = []
  # What conversions take, by what they return.
  converted = {}
  for equation in traced.jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
      inner = _with_additions(parameters["jaxpr"])
      equation = equation.replace(params=parameters | {"jaxpr": inner})
    elif name == "convert_element_type":
      converted[equation.outvars[0]] = equation.invars[0]
    elif name == "reduce_sum":
      (operand,), axes = equation.invars, parameters["axes"]
      if len(axes) == 1 and axes[0] < operand.aval.ndim - 2:
        parts = converted.get(operand, operand)
        added = functools.partial(
          _added, axis=axes[0], dtype=operand.aval.dtype
        )
        (call,) = jax.make_jaxpr(jax.jit(added))(parts.aval).eqns
        equation = call.replace(
          invars=[parts],
          outvars=equation.outvars,
          source_info=equation.source_info,
        )
    equations.append(equation)
  return traced.replace(jaxpr=traced.jaxpr.replace(eqns=equations))
