"""Attention by cuDNN's fused kernels, on NVIDIA GPUs.

JAX calls them for 16-bit types alone, and cuDNN limits their shapes; other
arguments are left to XLA.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The widest head that all GPUs with these kernels take.
_WIDEST_HEAD = 128


def fits(q_BTNH: jax.Array, sequence_axis: str | None) -> bool:
  """Says whether cuDNN's kernels can run attention of these queries.

  Args:
    q_BTNH: queries.
    sequence_axis: the mesh axis over which the tokens of a row are spread, if
      any: the kernels take whole rows.
  """
  length, width = q_BTNH.shape[1], q_BTNH.shape[3]
  return (
    q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    and width % 8 == 0
    and width <= _WIDEST_HEAD
    and length % 2 == 0
    and sequence_axis is None
  )


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array,
  segments_BS: jax.Array,
  implementation: str = "cudnn",
) -> jax.Array:
  """Softmax attention to earlier tokens of the same segment.

  A mask keeps segments apart: T S elements a row, which all heads share. The
  kernels skip what the causal order leaves out.

  Args:
    q_BTNH: scaled queries, for which `fits` holds.
    k_BSKH, v_BSKH: keys and values.
    segments_BT, segments_BS: int32 document of each query and of each key.
    implementation: "cudnn", or "xla" for the same call without a GPU.

  Returns:
    y_BTNH, in the dtype of `q_BTNH`.
  """
  mask_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
  y_BTNH = jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=mask_BTS[:, None],
    scale=1.0,
    is_causal=True,
    implementation="cudnn" if implementation == "cudnn" else "xla",
  )
  return checkpoint_name(y_BTNH, "attention")
