import dataclasses
import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax import config, validation
from edl_jax.config import Experiment, LossesConfig, UserError
from edl_jax.losses import divergence, routing
from edl_jax.losses import objective as losses
from edl_jax.losses.cross_entropy import chunked_cross_entropy
from edl_jax.losses.objective import LOSS_TERMS, LossContext, LossTerm
from edl_jax.losses.routing import BatchSums

LAYERS, BATCH, LENGTH, EXPERTS, ACTIVE, DOMAINS = 2, 6, 5, 4, 2, 4
WIDTH, VOCABULARY = 3, 11
WEIGHTS = LossesConfig(
  balance_weight=0.3,
  divergence_weight=0.2,
  z_weight=0.05,
  output_z_weight=0.02,
  orthogonality_weight=0.1,
  variance_weight=0.7,
)
PARENT_D = (0, 1, 1, 0)


def inputs():
  random = np.random.default_rng(0)
  weights = (random.random((BATCH, LENGTH)) < 0.8).astype(np.float64)
  weights[5] = 0
  return {
    "logits": random.standard_normal((LAYERS, BATCH, LENGTH, EXPERTS)),
    "x": random.standard_normal((BATCH, LENGTH, WIDTH)),
    "head": random.standard_normal((WIDTH, VOCABULARY)),
    # The outputs of the active experts.
    "y": random.standard_normal((LAYERS, BATCH * LENGTH, ACTIVE, WIDTH)),
  }, {
    "targets": random.integers(0, VOCABULARY, (BATCH, LENGTH)),
    "weights": weights,
    "domain": np.array([0, 1, 1, 3, 0, 2]),
  }


@functools.partial(
  jax.jit, static_argnames=("config", "parent_D", "coarse_weight")
)
def ours(
  variables,
  constants,
  config=WEIGHTS,
  parent_D=(),
  coarse_weight=0.0,
  kept_weights=None,
  factors=None,
):
  """Computes the objective with the library's own functions."""
  weights = jnp.asarray(constants["weights"], jnp.float32)
  logits = variables["logits"]
  probs = jax.nn.softmax(logits)
  top, expert = jax.lax.top_k(probs, ACTIVE)
  gate = top / top.sum(-1, keepdims=True)
  rows = jax.vmap(routing.row_routing, (0, 0, 0, 0, None))(
    logits, probs, expert, gate, weights
  )
  outputs = [
    routing.output_stats(
      variables["y"][layer],
      expert[layer].reshape(-1, ACTIVE),
      gate[layer].reshape(-1, ACTIVE),
      weights.reshape(-1),
      EXPERTS,
      config.specialization_form,
    )
    for layer in range(LAYERS)
  ]
  nats, squares, _ = chunked_cross_entropy(
    *(variables["x"], variables["head"], constants["targets"], weights),
    z_weight=config.output_z_weight,
  )
  stats = routing.collect(
    rows,
    jnp.asarray(constants["domain"]),
    DOMAINS,
    jax.tree.map(lambda *x: jnp.stack(x), *outputs),
  )
  sums = BatchSums(nats, squares, weights.sum(), stats)
  context = LossContext(config, parent_D, coarse_weight, factors=factors)
  return losses.objective(sums, context, kept_weights)


def naive_terms(variables, constants, config=WEIGHTS):
  """Every term by its definition in loops, NumPy float64."""
  logits, x, head, y = (variables[k] for k in ("logits", "x", "head", "y"))
  targets, weights, domain = (
    constants[k] for k in ("targets", "weights", "domain")
  )
  counted = [
    (b, t) for b in range(BATCH) for t in range(LENGTH) if weights[b, t]
  ]
  nats = output_z = 0.0
  for b, t in counted:
    scores = x[b, t] @ head
    nats += np.log(np.exp(scores).sum()) - scores[targets[b, t]]
    output_z += np.log(np.exp(scores).sum()) ** 2
  balance, divergence, z, orthogonality, variance = [], [], [], [], []
  for layer in range(LAYERS):
    p = np.exp(logits[layer])
    p /= p.sum(-1, keepdims=True)
    gates = np.zeros(p.shape)
    for b, t in counted:
      active = np.argsort(-p[b, t])[:ACTIVE]
      gates[b, t, active] = p[b, t, active] / p[b, t, active].sum()

    def balance_of(tokens, p=p, gates=gates):
      load = sum(gates[b, t] > 0 for b, t in tokens)
      mean = np.mean([p[b, t] for b, t in tokens], 0)
      return EXPERTS * np.sum(load / load.sum() * mean)

    if config.balance_scope == "global":
      balance.append(balance_of(counted))
    else:
      rows = sorted({b for b, _ in counted})
      balance.append(
        np.mean(
          [balance_of([at for at in counted if at[0] == b]) for b in rows]
        )
      )
    pairs = []
    for b, t in counted:
      first, second = y[layer, b * LENGTH + t]
      if config.specialization_form == "paper":
        for one, other in ((first, second), (second, first)):
          projected = one @ other / (other @ other + 1e-8) * other
          pairs.append(projected @ projected)
      else:
        # With two experts, each is projected on the span of the other.
        for one, other in ((first, second), (second, first)):
          pairs.append((one @ other) ** 2 / (other @ other))
    orthogonality.append(np.mean(pairs))
    if config.specialization_form == "paper":
      by_expert = np.array([gates[b, t] for b, t in counted])
      variance.append(-np.mean(np.var(by_expert, axis=0)))
    else:
      variance.append(-np.mean([np.var(p[b, t], ddof=1) for b, t in counted]))
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
    "output_z_loss": output_z / len(counted),
    "orthogonality_loss": np.mean(orthogonality),
    "variance_loss": np.mean(variance),
  }


def naive_loss(variables, constants, config=WEIGHTS):
  terms = naive_terms(variables, constants, config)
  return terms["lm_loss"] + sum(
    getattr(config, term.weight) * terms[term.name]
    for term in LOSS_TERMS
    if getattr(config, term.weight)
  )


FORMS = pytest.mark.parametrize(
  "config",
  [
    WEIGHTS,
    dataclasses.replace(
      WEIGHTS, balance_scope="sequence", specialization_form="released"
    ),
  ],
  ids=["paper", "released"],
)


@FORMS
def test_every_term_against_naive_float64(config):
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  loss, terms = ours(as_float32, constants, config)
  want = naive_terms(variables, constants, config)
  for name, value in want.items():
    assert float(terms[name]) == pytest.approx(value, rel=1e-5), name
  assert float(loss) == pytest.approx(
    naive_loss(variables, constants, config), rel=1e-5
  )
  assert float(terms["loss"]) == float(loss)


@FORMS
def test_gradient_against_naive_float64(config):
  """Elements of each variable, against central differences."""
  random = np.random.default_rng(5)
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  gradient = jax.grad(lambda v: ours(v, constants, config)[0])(as_float32)
  step = 1e-5
  for name, value in variables.items():
    indices = random.permutation(list(np.ndindex(value.shape)))[:40]
    for index in map(tuple, indices):
      sides = []
      for sign in (1, -1):
        moved = value.copy()
        moved[index] += sign * step
        sides.append(naive_loss({**variables, name: moved}, constants, config))
      slope = (sides[0] - sides[1]) / (2 * step)
      assert float(gradient[name][index]) == pytest.approx(
        slope, rel=1e-3, abs=2e-6
      ), (name, index)


def test_weight_zero_leaves_the_gradient_of_the_rest():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  nothing = LossesConfig(**{term.weight: 0 for term in LOSS_TERMS})
  loss, terms = ours(as_float32, constants, nothing)
  assert float(loss) == float(terms["lm_loss"])
  gradient = jax.grad(lambda v: ours(v, constants, nothing)[0])(as_float32)
  assert not jnp.any(gradient["logits"]) and not jnp.any(gradient["y"])


def test_automatic_weights_are_found_once_and_kept():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  config = LossesConfig(
    orthogonality_weight="auto:1e-4", variance_weight="auto:1e-3"
  )
  naive = naive_terms(variables, constants)
  _, first = ours(as_float32, constants, config)
  for name, target in (("orthogonality", 1e-4), ("variance", 1e-3)):
    size = abs(naive[f"{name}_loss"])
    want = 10.0 ** round(np.log10(target / size))
    assert float(first[f"{name}_weight"]) == pytest.approx(want, rel=1e-6)
    assert target / 10**0.5 <= want * size <= target * 10**0.5
  # Another batch keeps them.
  kept = {key: first[key] for key in losses.auto_weights(config)}
  as_float32["y"] *= 10
  _, second = ours(as_float32, constants, config, kept_weights=kept)
  assert float(second["orthogonality_loss"]) > 50 * naive["orthogonality_loss"]
  assert {key: float(second[key]) for key in kept} == {
    key: float(value) for key, value in kept.items()
  }
  fixed = dataclasses.replace(
    config,
    **{key: float(value) for key, value in kept.items()},
  )
  # No gradient flows through the choice of a weight.
  gradients = [
    jax.grad(lambda v, c=c: ours(v, constants, c)[0])(
      {**as_float32, "y": as_float32["y"] / 10}
    )
    for c in (config, fixed)
  ]
  for got, want in zip(*map(jax.tree.leaves, gradients)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_unknown_scope_and_form_raise():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  for wrong, named in (
    (LossesConfig(balance_scope="row"), "scope='row'"),
    (LossesConfig(specialization_form="x"), "form='x'"),
  ):
    with pytest.raises(ValueError, match=named):
      ours(as_float32, constants, wrong)


def test_one_expert_and_one_domain_give_zero_loss_and_gradient():
  rows = jax.vmap(routing.row_routing, (0, 0, 0, 0, None))
  weights = jnp.ones((BATCH, LENGTH))

  def terms(logits, domain):
    probs = jax.nn.softmax(logits)
    top, expert = jax.lax.top_k(probs, 1)
    row = rows(logits, probs, expert, top / top, weights)
    stats = routing.collect(row, domain, DOMAINS)
    sums = BatchSums(*jnp.zeros(2), weights.sum(), stats)
    return losses.objective(sums, LossContext(LossesConfig()))[1]

  several, same = jnp.arange(BATCH) % DOMAINS, jnp.ones(BATCH, jnp.int32)
  for experts, domain, names in (
    (1, several, ("divergence_loss", "variance_loss")),
    (EXPERTS, same, ("divergence_loss",)),
  ):
    logits = jax.random.normal(jax.random.key(0), (1, BATCH, LENGTH, experts))
    for name in names:
      value, gradient = jax.jit(
        jax.value_and_grad(lambda logits, d=domain, n=name: terms(logits, d)[n])
      )(logits)
      assert value == 0 and not jnp.any(gradient), name


@pytest.mark.parametrize(
  ("schedule", "expected"),
  [
    ("constant", [1, 1, 1, 1, 1, 1]),
    # Over 2 of 5 steps.
    ("warmup", [0, 0.5, 1, 1, 1, 1]),
    ("decay", [1, 1, 1, 1, 0.5, 0]),
  ],
)
def test_divergence_rises_and_falls(schedule, expected):
  config = dataclasses.replace(
    WEIGHTS, divergence_schedule=schedule, divergence_fraction=0.4
  )
  factors = [losses.weight_factors(config, 5, step) for step in range(6)]
  found = [float(each.get("divergence_weight", 1.0)) for each in factors]
  assert found == pytest.approx(expected)


def test_a_factor_multiplies_its_weight_alone():
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  loss, terms = ours(
    as_float32, constants, factors={"divergence_weight": jnp.float32(0.25)}
  )
  less = dataclasses.replace(WEIGHTS, divergence_weight=0.25 * 0.2)
  want = naive_loss(variables, constants, less)
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert float(terms["divergence_weight"]) == pytest.approx(0.25 * 0.2)
  # The metrics have the term without any weight.
  unweighted = naive_terms(variables, constants)["divergence_loss"]
  assert float(terms["divergence_loss"]) == pytest.approx(unweighted, rel=1e-5)


@pytest.mark.parametrize("coarse_weight", [1.0, 0.25])
def test_coarse_and_hierarchical_labels(coarse_weight):
  variables, constants = inputs()
  as_float32 = {k: jnp.asarray(v, jnp.float32) for k, v in variables.items()}
  merged = {**constants, "domain": np.array(PARENT_D)[constants["domain"]]}
  coarse = naive_terms(variables, merged)["divergence_loss"]
  fine = naive_terms(variables, constants)["divergence_loss"]
  _, terms = ours(
    as_float32, constants, parent_D=PARENT_D, coarse_weight=coarse_weight
  )
  want = coarse_weight * coarse + (1 - coarse_weight) * fine
  assert float(terms["divergence_loss"]) == pytest.approx(want, rel=1e-5)


def test_every_divergence_has_a_name_in_the_configuration():
  for name in divergence.DIVERGENCES:
    validation.validate(Experiment(losses=LossesConfig(divergence=name)))
  with pytest.raises(UserError, match="hellinger"):
    validation.validate(Experiment(losses=LossesConfig(divergence="x")))


@dataclasses.dataclass
class TwoWeights:
  first_weight: float = 0.0
  second_weight: float = 0.0


def entry(name, weight, *other_weights):
  return LossTerm(
    name, weight, losses.router_z_loss, "", "", other_weights=other_weights
  )


def test_table_that_fits_the_configuration_is_accepted():
  losses.check_loss_terms(
    [entry("a", "first_weight"), entry("b", "second_weight")], TwoWeights
  )
  losses.check_loss_terms(
    [entry("a", "first_weight", "second_weight")], TwoWeights
  )


@pytest.mark.parametrize(
  ("terms", "message"),
  [
    ([entry("a", "first_weight")], "TwoWeights: no loss term reads second_w"),
    (
      [entry("a", "first_weight", "second_weight"), entry("b", "third_weight")],
      "loss term b: TwoWeights has no field third_weight",
    ),
    (
      [entry("a", "first_weight", "second_weight"), entry("b", "first_weight")],
      "loss terms a and b share the field first_weight",
    ),
  ],
)
def test_table_that_does_not_fit_the_configuration_is_refused(terms, message):
  with pytest.raises(TypeError, match=message):
    losses.check_loss_terms(terms, TwoWeights)


def test_weight_without_a_term_stops_the_import(monkeypatch):
  larger = dataclasses.make_dataclass(
    "Larger", [("new_weight", float, 0.0)], bases=(LossesConfig,)
  )
  monkeypatch.setattr(config, "LossesConfig", larger)
  with pytest.raises(TypeError, match="Larger: no loss term reads new_weight"):
    runpy.run_path(losses.__file__)


def test_outputs_are_asked_for_by_the_terms_that_read_them():
  without = losses.summaries(LossesConfig(variance_weight=1.0))
  assert without.outputs is None
  for weight in (1.0, "auto:1e-4"):
    settings = LossesConfig(
      orthogonality_weight=weight, specialization_form="released"
    )
    assert losses.summaries(settings).outputs.keywords == {"form": "released"}


def test_table_of_the_documentation_has_a_row_for_each_term():
  heading, rule, *rows = losses.loss_table_markdown().splitlines()
  assert heading.count("|") == rule.count("|") == 5
  assert len(rows) == len(LOSS_TERMS)
  for term, row in zip(LOSS_TERMS, rows):
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == [
      f"`{term.name}`",
      f"`losses.{term.weight}`",
      f"`{term.formula}`",
      term.source,
    ]
