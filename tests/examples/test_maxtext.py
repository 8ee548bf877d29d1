"""The patch of MaxText, in an environment that has MaxText.

  EDL_JAX_MAXTEXT_PYTHON=$(ls ~/.cache/edl_jax/peers/maxtext/bin/python) \\
    .venv/bin/python -m pytest tests/examples/test_maxtext.py

runs these tests, with the interpreter of that environment; without it they are
skipped.
"""

import itertools
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("EDL_JAX_MAXTEXT_PYTHON", "")

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not PYTHON, reason="needs MaxText: see examples/maxtext/README.md"
  ),
]


def run(*arguments, devices=1):
  variables = {
    "JAX_PLATFORMS": "cpu",
    "DECOUPLE_GCLOUD": "TRUE",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  ended = subprocess.run(
    [PYTHON, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr[-2000:]
  return ended.stdout


def entropy(p):
  return -sum(x * np.log(x) for x in p if x > 0)


def expected_divergence(logits_LBTE, counted_BT, domain_B):
  """The loss by the formula of the paper, in loops and float64."""
  layers = []
  for logits_BTE in logits_LBTE.astype(np.float64):
    probs_BTE = np.exp(logits_BTE - logits_BTE.max(-1, keepdims=True))
    probs_BTE /= probs_BTE.sum(-1, keepdims=True)
    rows = {}
    for b, domain in enumerate(domain_B):
      if counted_BT[b].any():
        mean = probs_BTE[b][counted_BT[b] > 0].mean(0)
        rows.setdefault(int(domain), []).append(mean)
    means = [np.mean(each, 0) for each in rows.values()]
    layers.append(
      np.mean(
        [
          -np.log(entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2 + 1e-8)
          for p, q in itertools.combinations(means, 2)
        ]
      )
    )
  return np.mean(layers)


@pytest.mark.parametrize("devices", [1, 4])
def test_loss_is_that_of_the_paper(tmp_path, devices):
  program = ROOT / "tests" / "examples" / "maxtext_program.py"
  run(program, tmp_path / "out.npz", devices=devices)
  with np.load(tmp_path / "out.npz") as found:
    wanted = expected_divergence(
      found["logits"], found["counted"], found["domain"]
    )
    assert len(found["logits"]) == 2
    np.testing.assert_allclose(found["divergence"], wanted, rtol=1e-4)
    np.testing.assert_allclose(found["added"], 0.5 * wanted, rtol=1e-4)
    np.testing.assert_allclose(found["slope"], found["length"], rtol=2e-2)


def test_training_makes_domains_route_differently():
  last = {}
  for weight in ("0", "0.01"):
    printed = run("-m", "examples.maxtext.train", weight)
    steps = re.findall(
      r"^step (\d+): LM loss ([\d.]+), divergence loss ([\d.]+)$",
      printed,
      re.MULTILINE,
    )
    assert [int(step) for step, _, _ in steps] == list(range(0, 101, 10))
    assert float(steps[-1][1]) < float(steps[0][1]) - 1
    last[weight] = float(steps[-1][2])
  assert last["0.01"] < last["0"] - 0.5
