import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax import losses, routing
from edl_jax.config import LossesConfig

LAYERS, BATCH, LENGTH, EXPERTS, ACTIVE, DOMAINS = 2, 6, 5, 4, 2, 4
WIDTH, VOCABULARY = 3, 11
WEIGHTS = LossesConfig(balance_weight=0.3, divergence_weight=0.2, z_weight=0.05)


def inputs():
  random = np.random.default_rng(0)
  weights = (random.random((BATCH, LENGTH)) < 0.8).astype(np.float64)
  weights[5] = 0
  return {
    "logits": random.standard_normal((LAYERS, BATCH, LENGTH, EXPERTS)),
    "x": random.standard_normal((BATCH, LENGTH, WIDTH)),
    "head": random.standard_normal((WIDTH, VOCABULARY)),
  }, {
    "targets": random.integers(0, VOCABULARY, (BATCH, LENGTH)),
    "weights": weights,
    "domain": np.array([0, 1, 1, 3, 0, 2]),
  }


def ours(variables, constants, config=WEIGHTS):
  """The objective through the library's own path."""
  weights = jnp.asarray(constants["weights"], jnp.float32)
  logits = variables["logits"]
  probs = jax.nn.softmax(logits)
  _, expert = jax.lax.top_k(probs, ACTIVE)
  rows = jax.vmap(routing.row_routing, (0, 0, 0, None))(
    logits, probs, expert, weights
  )
  nats, _ = losses.chunked_cross_entropy(
    variables["x"], variables["head"], constants["targets"], weights
  )
  sums = losses.BatchSums(
    nats,
    weights.sum(),
    routing.collect(rows, jnp.asarray(constants["domain"]), DOMAINS),
  )
  return losses.objective(sums, config)


def naive_terms(variables, constants):
  """METHOD sections 1 and 3 in loops, NumPy float64."""
  logits, x, head = (variables[k] for k in ("logits", "x", "head"))
  targets, weights, domain = (
    constants[k] for k in ("targets", "weights", "domain")
  )
  counted = [
    (b, t) for b in range(BATCH) for t in range(LENGTH) if weights[b, t]
  ]
  nats = 0.0
  for b, t in counted:
    scores = x[b, t] @ head
    nats += np.log(np.exp(scores).sum()) - scores[targets[b, t]]
  balance, divergence, z = [], [], []
  for layer in range(LAYERS):
    p = np.exp(logits[layer])
    p /= p.sum(-1, keepdims=True)
    load = np.zeros(EXPERTS)
    for b, t in counted:
      load[np.argsort(-p[b, t])[:ACTIVE]] += 1
    mean = np.mean([p[b, t] for b, t in counted], 0)
    balance.append(EXPERTS * np.sum(load / load.sum() * mean))
    z.append(
      np.mean(
        [np.log(np.exp(logits[layer, b, t]).sum()) ** 2 for b, t in counted]
      )
    )
    sequence = {
      b: np.mean([p[b, t] for t in range(LENGTH) if weights[b, t]], 0)
      for b in range(BATCH)
      if weights[b].any()
    }
    means = [
      np.mean([sequence[b] for b in sequence if domain[b] == d], 0)
      for d in sorted({domain[b] for b in sequence})
    ]
    pairs = []
    for j in range(len(means)):
      for k in range(j):
        m = (means[j] + means[k]) / 2
        value = np.sum(means[j] * np.log(means[j] / m)) / 2
        value += np.sum(means[k] * np.log(means[k] / m)) / 2
        pairs.append(-np.log(value + WEIGHTS.divergence_epsilon))
    divergence.append(np.mean(pairs))
  return {
    "lm_loss": nats / len(counted),
    "balance_loss": np.mean(balance),
    "divergence_loss": np.mean(divergence),
    "z_loss": np.mean(z),
  }


def naive_loss(variables, constants):
  terms = naive_terms(variables, constants)
  return (
    terms["lm_loss"]
    + WEIGHTS.balance_weight * terms["balance_loss"]
    + WEIGHTS.divergence_weight * terms["divergence_loss"]
    + WEIGHTS.z_weight * terms["z_loss"]
  )


def test_every_term_against_naive_float64():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  loss, terms = ours(as_float32, constants)
  want = naive_terms(variables, constants)
  for name, value in want.items():
    assert float(terms[name]) == pytest.approx(value, rel=1e-5), name
  assert float(loss) == pytest.approx(
    naive_loss(variables, constants), rel=1e-5
  )
  assert float(terms["loss"]) == float(loss)


def test_gradient_against_naive_float64():
  """Every element, against central differences of the naive form."""
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  gradient = jax.grad(lambda v: ours(v, constants)[0])(as_float32)
  step = 1e-5
  for name, value in variables.items():
    want = np.zeros_like(value)
    for index in np.ndindex(value.shape):
      sides = []
      for sign in (1, -1):
        moved = value.copy()
        moved[index] += sign * step
        sides.append(naive_loss({**variables, name: moved}, constants))
      want[index] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(gradient[name], want, rtol=1e-3, atol=2e-6)


def test_weight_zero_leaves_the_gradient_of_the_rest():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  nothing = LossesConfig(balance_weight=0, divergence_weight=0, z_weight=0)
  loss, terms = ours(as_float32, constants, nothing)
  assert float(loss) == float(terms["lm_loss"])
  gradient = jax.grad(lambda v: ours(v, constants, nothing)[0])(as_float32)
  assert not jnp.any(gradient["logits"])


@pytest.mark.parametrize("elements", [1 << 22, 7 * 50, 1])
def test_cross_entropy_in_chunks_against_all_logits(monkeypatch, elements):
  monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", elements)
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
    return losses.chunked_cross_entropy(x, head, targets, weights)[0]

  want, want_gradient = jax.value_and_grad(plain, (0, 1))(x, head)
  got, got_gradient = jax.value_and_grad(lambda *a: 1.5 * chunked(*a), (0, 1))(
    x, head
  )
  assert float(got) == pytest.approx(1.5 * float(want), rel=1e-6)
  for g, w in zip(got_gradient, want_gradient):
    np.testing.assert_allclose(g, 1.5 * w, rtol=1e-5, atol=1e-6)
  _, nats_BT = losses.chunked_cross_entropy(x, head, targets, weights)
  assert float(nats_BT.sum()) == pytest.approx(float(want), rel=1e-6)
  assert not np.any(nats_BT[weights == 0])


def test_cross_entropy_survives_large_logits():
  x = jnp.full((1, 2, 1), 1e4)
  head = jnp.array([[1.0, -1.0, 0.5]])
  weights = jnp.ones((1, 2))
  targets = jnp.array([[0, 1]])
  value, gradient = jax.value_and_grad(
    lambda x: losses.chunked_cross_entropy(x, head, targets, weights)[0]
  )(x)
  assert float(value) == pytest.approx(2e4)
  assert jnp.all(jnp.isfinite(gradient))


def test_coarse_labels_compare_parents():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  parent = (0, 1, 1, 0)
  coarse = {**constants, "domain": np.array(parent)[constants["domain"]]}
  want = naive_terms(variables, coarse)["divergence_loss"]

  logits = as_float32["logits"]
  probs = jax.nn.softmax(logits)
  rows = jax.vmap(routing.row_routing, (0, 0, 0, None))(
    logits,
    probs,
    jax.lax.top_k(probs, ACTIVE)[1],
    jnp.asarray(constants["weights"], jnp.float32),
  )
  stats = routing.collect(rows, jnp.asarray(constants["domain"]), DOMAINS)
  sums = losses.BatchSums(jnp.float32(0), jnp.float32(1), stats)
  _, terms = losses.objective(sums, WEIGHTS, parent)
  assert float(terms["divergence_loss"]) == pytest.approx(want, rel=1e-5)
