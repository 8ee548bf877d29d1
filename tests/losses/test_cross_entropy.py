"""The cross-entropy of a linear head in chunks, against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.losses.cross_entropy import _chunk_size, chunked_cross_entropy
from tests.losses.programs import largest_array


def test_no_array_of_all_logits():
  """The largest array is a chunk's logits, in value and gradient."""
  batch, length, width, vocabulary = 8, 1024, 16, 8192
  elements = 1 << 20
  every_logit = batch * length * vocabulary

  def loss(x, head):
    ones = jnp.ones((batch, length))
    return chunked_cross_entropy(
      x, head, jnp.zeros((batch, length), jnp.int32), ones, elements
    )[0]

  traced = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(
    jnp.zeros((batch, length, width)), jnp.zeros((width, vocabulary))
  )
  largest = largest_array(traced.jaxpr)
  assert elements / 2 < largest <= elements
  assert largest <= every_logit / 16


@pytest.mark.parametrize(
  ("tokens", "most", "chunk"),
  [
    (65536, 1765, 1024),  # A multiple of 128 that divides the tokens.
    (65536, 7061, 4096),
    (384, 384, 384),
    (21, 100, 21),
    (21, 7, 7),
    (1000, 300, 250),  # No multiple of 128 does: even sizes.
    (128 * 101, 1000, 995),  # One does, of less than half the size.
  ],
)
def test_chunks_are_whole_tiles_where_that_is_possible(tokens, most, chunk):
  assert _chunk_size(tokens, most) == chunk
  # The last chunk is padded by less than there are chunks.
  assert -tokens % chunk < -(-tokens // chunk)


@pytest.mark.parametrize("elements", [1 << 22, 7 * 50, 1])
def test_cross_entropy_in_chunks_against_all_logits(elements):
  random = np.random.default_rng(1)
  x = random.standard_normal((3, 7, 8), np.float32)
  head = random.standard_normal((8, 50), np.float32)
  targets = random.integers(0, 50, (3, 7))
  weights = (random.random((3, 7)) < 0.7).astype(np.float32)

  def plain(x, head):
    logs = jax.nn.log_softmax(jnp.dot(x, head, precision="highest"))
    picked = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()

  def chunked(x, head):
    return chunked_cross_entropy(x, head, targets, weights, elements)[0]

  want, want_gradient = jax.value_and_grad(plain, (0, 1))(x, head)
  got, got_gradient = jax.value_and_grad(lambda *a: 1.5 * chunked(*a), (0, 1))(
    x, head
  )
  assert float(got) == pytest.approx(1.5 * float(want), rel=1e-6)
  for g, w in zip(got_gradient, want_gradient):
    np.testing.assert_allclose(g, 1.5 * w, rtol=1e-5, atol=1e-6)
  _, _, nats_BT = chunked_cross_entropy(x, head, targets, weights)
  assert float(nats_BT.sum()) == pytest.approx(float(want), rel=1e-6)
  assert not np.any(nats_BT[weights == 0])


def test_cross_entropy_survives_large_logits():
  x = jnp.full((1, 2, 1), 1e4)
  head = jnp.array([[1.0, -1.0, 0.5]])
  weights = jnp.ones((1, 2))
  targets = jnp.array([[0, 1]])
  value, gradient = jax.value_and_grad(
    lambda x: chunked_cross_entropy(x, head, targets, weights)[0]
  )(x)
  assert float(value) == pytest.approx(2e4)
  assert jnp.all(jnp.isfinite(gradient))
