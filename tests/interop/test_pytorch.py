"""The loss in PyTorch against ours: value and gradient, on one and two ranks.

`make test-interop` runs these tests; without it they are skipped.
"""

import pathlib

import jax
import numpy as np
import pytest

from edl_jax.losses.divergence import domain_routing, expert_divergence_loss

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("pytorch_program.py")
NUM_DOMAINS = 5

pytestmark = pytest.mark.slow


def make_case(scale, domain_B, padded=0):
  """Returns routing that differs by `scale` from sequence to sequence."""
  random = np.random.default_rng(0)
  logits_BTE = scale * random.normal(size=(len(domain_B), 6, 8))
  logits_BTE += scale * random.normal(size=(len(domain_B), 1, 8))
  probs_BTE = np.exp(logits_BTE)
  probs_BTE /= probs_BTE.sum(-1, keepdims=True)
  # XLA flushes numbers below the normal ones to zero, PyTorch does not.
  probs_BTE[probs_BTE < 1e-30] = 0
  weights_BT = (random.random((len(domain_B), 6)) < 0.8).astype(np.float32)
  weights_BT[:padded] = 0
  return {
    "probs": probs_BTE.astype(np.float32),
    "weights": weights_BT,
    "domain": np.array(domain_B, np.int32),
  }


MIXED = [0, 1, 2, 3, 4, 0, 1, 1]
CASES = {
  "apart": make_case(3.0, MIXED),
  # Many experts with probability zero.
  "disjoint": make_case(80.0, MIXED),
  "usual": make_case(0.3, MIXED),
  # JSD from 1e-10 to 1e-8, which the textbook form cannot tell from 0.
  "close": make_case(1e-4, MIXED),
  "absent": make_case(0.3, [0, 3, 3, 0]),
  "padding": make_case(0.3, MIXED, padded=3),
  "one_domain": make_case(0.3, [2, 2, 2, 2]),
}


@pytest.fixture(scope="module")
def theirs(run_elsewhere, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pytorch")
  flat = {
    f"{name}/{part}": array
    for name, case in CASES.items()
    for part, array in {**case, **ours(case)}.items()
    if part not in ("loss", "gradient")
  }
  np.savez(folder / "cases.npz", num_domains=NUM_DOMAINS, **flat)
  example = ROOT / "examples" / "pytorch.py"
  run_elsewhere(PROGRAM, example, folder / "cases.npz", folder / "out.npz")
  with np.load(folder / "out.npz") as found:
    return dict(found)


def ours(case):
  """Returns what the program computes, by our functions."""

  def loss_of(probs_BTE):
    p_DE, count_D = domain_routing(
      probs_BTE, case["weights"], case["domain"], NUM_DOMAINS
    )
    return expert_divergence_loss(p_DE, count_D), (p_DE, count_D)

  (loss, (p_DE, count_D)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
    case["probs"]
  )
  found = {"p_DE": p_DE, "count_D": count_D, "loss": loss, "gradient": gradient}
  return {key: np.asarray(value) for key, value in found.items()}


def assert_equal(found, wanted, name):
  """Compares to rounding: where p and q are close, that of p - q counts."""
  np.testing.assert_array_equal(found["count_D"], wanted["count_D"])
  np.testing.assert_allclose(found["p_DE"], wanted["p_DE"], rtol=1e-6)
  # Means near 1/8 are rounded to 2^-27; in "close" they differ by about 1e-5.
  rtol = 3e-3 if name == "close" else 1e-5
  np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=rtol / 10)
  largest = np.abs(wanted["gradient"]).max()
  np.testing.assert_allclose(
    found["gradient"], wanted["gradient"], rtol=rtol, atol=rtol * largest
  )


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(theirs, name):
  wanted = ours(CASES[name])
  found = {key: theirs[f"{name}/{key}"] for key in wanted}
  assert_equal(found, wanted, name)
  if name == "one_domain":
    assert not found["loss"].any() and not found["gradient"].any()
  else:
    assert found["gradient"].any()


@pytest.mark.parametrize("name", sorted(set(CASES) - {"one_domain"}))
def test_no_digits_cancel_where_domains_route_alike(theirs, name):
  """For the same p_DE, to rounding, however small the divergence is."""
  wanted = ours(CASES[name])
  loss, gradient = jax.value_and_grad(expert_divergence_loss)(
    wanted["p_DE"], wanted["count_D"], eps=0
  )
  np.testing.assert_allclose(theirs[f"{name}/given_loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(
    theirs[f"{name}/given_gradient"],
    gradient,
    rtol=1e-5,
    atol=1e-6 * np.abs(gradient).max(),
  )


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_loss_of_the_global_batch(theirs, name):
  wanted = ours(CASES[name])
  ranks = [
    {key: theirs[f"ranks/{rank}/{name}/{key}"] for key in wanted}
    for rank in range(2)
  ]
  gradient = np.empty_like(wanted["gradient"])
  for rank, found in enumerate(ranks):
    # DistributedDataParallel averages; each row is on one of the two.
    gradient[rank::2] = found["gradient"] / 2
  for found in ranks:
    assert_equal({**found, "gradient": gradient}, wanted, name)
