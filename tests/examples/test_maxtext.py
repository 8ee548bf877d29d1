"""The patch of MaxText, on a stand-in and in an environment that has MaxText.

  EDL_JAX_MAXTEXT_PYTHON=$(ls ~/.cache/edl_jax/peers/maxtext/bin/python) \\
    .venv/bin/python -m pytest tests/examples/test_maxtext.py

runs all tests, with the interpreter of that environment; without it those of
MaxText itself are skipped.
"""

import itertools
import os
import pathlib
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("EDL_JAX_MAXTEXT_PYTHON", "")


def needs_maxtext(test):
  reason = "needs MaxText: see examples/maxtext/README.md"
  return pytest.mark.slow(pytest.mark.skipif(not PYTHON, reason=reason)(test))


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


class GateLogit:
  """As MaxText's router is called: logits, and what the patch leaves alone."""

  score_func = ""

  def __call__(self, logits_BTE):
    return logits_BTE, None


def loss_fn(model, config, data, *, is_train=True):
  """As MaxText's: runs a router, and returns what it kept."""
  del config, is_train
  model(data["logits"])
  kept = {name: value[...] for name, value in vars(model).items()}
  return jnp.float32(2), {"intermediate_outputs": {"layer": kept}}


@pytest.fixture
def stand_in(monkeypatch):
  """The patch, on modules with the four functions of MaxText that it wraps."""
  parts = {
    "maxtext.layers.moe": {"GateLogit": type("Gate", (GateLogit,), {})},
    "maxtext.trainers.pre_train.train": {
      "loss_fn": loss_fn,
      "record_activation_metrics": lambda *_: None,
    },
    "maxtext.utils.maxtext_utils": {
      "get_shaped_batch": lambda: {"targets": "shape"}
    },
  }
  for path, content in parts.items():
    names = path.split(".")
    for depth in range(1, len(names) + 1):
      name = ".".join(names[:depth])
      if name not in sys.modules or depth == len(names):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
      if depth > 1:
        parent = sys.modules[".".join(names[: depth - 1])]
        monkeypatch.setattr(
          parent, names[depth - 1], sys.modules[name], raising=False
        )
    vars(sys.modules[path]).update(content)
  monkeypatch.delitem(sys.modules, "examples.maxtext.patch", raising=False)
  from examples.maxtext import patch

  yield patch
  del sys.modules["examples.maxtext.patch"]


def test_a_second_call_adds_nothing(stand_in):
  random = np.random.default_rng(0)
  logits_BTE = random.normal(size=(6, 5, 4))
  counted_BT = random.integers(2, size=(6, 5))
  counted_BT[:, 0] = 1
  domain_B = np.arange(6) % 3
  data = {
    "logits": jnp.asarray(logits_BTE, jnp.float32),
    "targets_segmentation": counted_BT,
    stand_in.DOMAIN: np.tile(domain_B[:, None], 5),
  }
  config = types.SimpleNamespace(
    gradient_accumulation_steps=1, micro_batch_size_to_train_on=6
  )
  for _ in range(2):
    stand_in.apply(num_domains=3, weight=0.5)
    gate = stand_in.moe.GateLogit()
    loss, _ = stand_in.train.loss_fn(gate, config, data)
    wanted = expected_divergence(logits_BTE[None], counted_BT, domain_B)
    np.testing.assert_allclose(loss, 2 + 0.5 * wanted, rtol=1e-5)
  with pytest.raises(ValueError, match=r"with num_domains and weight \(3, 0.5"):
    stand_in.apply(num_domains=3, weight=0.1)
  batch = stand_in.maxtext_utils.get_shaped_batch()
  assert batch == {"targets": "shape", stand_in.DOMAIN: "shape"}


@needs_maxtext
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


@needs_maxtext
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
