"""A random batch of routing and of experts' outputs, and loops over them.

The loops are in NumPy float64, for `test_routing` and `test_routing_metrics`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from edl_jax.losses import routing

NUM_DOMAINS = 4


def entropy(p):
  p = np.asarray(p, np.float64)
  return -sum(x * math.log(x) for x in p.ravel() if x > 0)


def jensen_shannon(p, q):
  m = (p + q) / 2
  return entropy(m) - (entropy(p) + entropy(q)) / 2


def make_batch():
  """Two layers; rows of three of four domains; one row of padding only.

  Returns:
    Router logits, probabilities, active experts and their gates by layer, row
    and position; weights by row and position; domains by row.
  """
  random = np.random.default_rng(0)
  logits = random.standard_normal((2, 7, 5, 6)) * 1.5
  weights = (random.random((7, 5)) < 0.8).astype(np.float64)
  weights[4] = 0
  domain = np.array([0, 1, 1, 3, 0, 0, 3])
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expert = np.argsort(-probs, -1)[..., :2]
  gate = np.take_along_axis(probs, expert, -1)
  gate /= gate.sum(-1, keepdims=True)
  return logits, probs, expert, gate, weights, domain


BATCH = make_batch()


def stats_of(batch, rows=slice(None), num_domains=NUM_DOMAINS):
  logits, probs, expert, gate, weights, domain = (
    jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else jnp.asarray(x)
    for x in batch
  )
  by_layer = [
    routing.row_routing(
      logits[layer, rows],
      probs[layer, rows],
      expert[layer, rows],
      gate[layer, rows],
      weights[rows],
    )
    for layer in range(2)
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *by_layer)
  return routing.collect(stacked, domain[rows], num_domains)


def sequences(batch, layer):
  """(domain, mean probabilities, mean token entropy) of each counted row."""
  _, probs, _, _, weights, domain = batch
  for b in range(len(domain)):
    tokens = [probs[layer, b, t] for t in range(5) if weights[b, t]]
    if tokens:
      yield domain[b], np.mean(tokens, 0), np.mean([entropy(p) for p in tokens])


def domain_means(batch, layer):
  means = {}
  for d in range(NUM_DOMAINS):
    own = [p for domain, p, _ in sequences(batch, layer) if domain == d]
    if own:
      means[d] = np.mean(own, 0)
  return means


def assignments(batch, layer):
  _, _, expert, _, weights, domain = batch
  table = np.zeros((NUM_DOMAINS, 6))
  for b in range(len(domain)):
    for t in range(5):
      for e in expert[layer, b, t]:
        table[domain[b], e] += weights[b, t]
  return table


def sparse_gates(batch, layer):
  """Routing weights over all experts of every counted token."""
  _, _, expert, gate, weights, _ = batch
  gates = []
  for b, t in zip(*np.nonzero(weights)):
    s = np.zeros(6)
    s[expert[layer, b, t]] = gate[layer, b, t]
    gates.append(s)
  return gates


def make_outputs():
  """Outputs of 3 of 5 experts for 40 tokens, a quarter not counted."""
  random = np.random.default_rng(3)
  expert_PA = np.stack([random.permutation(4)[:3] for _ in range(40)])
  centre_EM = random.standard_normal((5, 8))
  y_PAM = centre_EM[expert_PA] + random.standard_normal((40, 3, 8))
  weights_P = (random.random(40) < 0.75).astype(np.float64)
  gate_PA = random.dirichlet(np.ones(3), 40)
  return y_PAM, expert_PA, gate_PA, weights_P


OUTPUTS = make_outputs()


def stats_of_outputs(outputs, form="paper"):
  y_PAM, expert_PA, gate_PA, weights_P = outputs
  return routing.output_stats(
    jnp.asarray(y_PAM, jnp.float32),
    jnp.asarray(expert_PA),
    jnp.asarray(gate_PA, jnp.float32),
    jnp.asarray(weights_P, jnp.float32),
    5,
    form,
  )
