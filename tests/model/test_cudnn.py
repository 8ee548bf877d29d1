"""What cuDNN is asked for, computed by XLA, against our attention by XLA.

The kernels themselves need a GPU: `benchmarks/gpu.sh` compares them there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.model import cudnn
from edl_jax.model.attention import causal_attention

ROWS, LENGTH = 2, 12


def arguments(dtype):
  random = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(random.standard_normal((ROWS, LENGTH, heads, 8)), dtype)
    for heads in (4, 2, 2)
  )
  # Three documents, and padding at the end of the second row.
  segments_BT = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]], ROWS, 0)
  segments_BT[1, 9:] = 0
  return q, k, v, jnp.asarray(segments_BT, jnp.int32)


def ours(q, k, v, segments_BT):
  return causal_attention(q, k, v, segments_BT, backend="default")


def asked(q, k, v, segments_BT):
  scaled = q * q.shape[-1] ** -0.5
  return cudnn.attention(scaled, k, v, segments_BT, segments_BT, "xla")


def test_values_and_gradients_keep_documents_apart():
  *arrays, segments_BT = arguments(jnp.float32)
  results = [
    jax.value_and_grad(
      lambda *x, function=function: jnp.sin(function(*x, segments_BT)).sum(),
      (0, 1, 2),
    )(*arrays)
    for function in (ours, asked)
  ]
  for ours_, theirs in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(theirs, ours_, rtol=1e-4, atol=1e-5)
  # A token of another document has no influence.
  q, k, v = arrays
  changed = asked(q, k.at[:, 2].add(1), v.at[:, 2].add(1), segments_BT)
  same = np.isclose(changed, asked(q, k, v, segments_BT)).all((0, 2, 3))
  np.testing.assert_array_equal(same, [i < 2 or i > 4 for i in range(LENGTH)])


@pytest.mark.parametrize(
  ("dtype", "length", "width", "axis", "want"),
  [
    ("bfloat16", 512, 128, None, True),
    ("float16", 512, 64, None, True),
    ("float32", 512, 128, None, False),
    ("bfloat16", 511, 128, None, False),
    ("bfloat16", 512, 132, None, False),
    ("bfloat16", 512, 256, None, False),
    ("bfloat16", 512, 60, None, False),
    ("bfloat16", 512, 128, "sequence", False),
  ],
)
def test_what_the_kernels_take(dtype, length, width, axis, want):
  q = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
  assert cudnn.fits(q, axis) == want
