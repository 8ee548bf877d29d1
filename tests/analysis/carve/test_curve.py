"""Carve curves against the naive model, on the text of a trained run."""

import jax
import numpy as np
import pytest

from edl_jax.analysis.carve import curve, runs, selection
from edl_jax.checkpoint import load
from edl_jax.config import MeshConfig, ModelConfig
from edl_jax.evaluate import evaluate, make_eval_step
from edl_jax.model.transformer import Model
from edl_jax.sharding import make_mesh, parameter_shardings, put_batch
from edl_jax.text.batch import Batch, padded_batches
from edl_jax.text.input_pipeline import eval_batches
from tests.model import naive_model


def naive_loss(model, rows, kept_LE):
  """Nats per counted token; a row's documents are evaluated one by one."""
  nats = tokens = 0
  for row in rows:
    for number in range(1, row.segments_BT.max() + 1):
      own = row.segments_BT == number
      logits_TV = naive_model.logits(model, row.tokens_BT[own], kept_LE)
      for logits_V, target in zip(logits_TV, row.targets_BT[own]):
        nats += np.log(np.exp(logits_V).sum()) - logits_V[target]
        tokens += 1
  return nats / tokens


@pytest.fixture(scope="module")
def carved(carve_workdir):
  (run,) = runs.find_runs([carve_workdir])
  settings = curve.Settings(
    domains=[0, 2],
    keep=[2, 8],
    score="assignments",
    greedy=True,
    calibration_tokens=100,
    draws=2,
    calibration_sizes=(64, 128, 10**9),
  )
  corpus = runs.read_corpus(run)
  rows = runs.choose_rows(run, corpus, settings.domains, settings.most_tokens)
  lines: list[str] = []
  mesh = runs.choose_mesh(run.experiment)
  result = curve.carve_run(run, rows, settings, mesh, lines.append)
  return run, corpus, rows, result, lines


def mask(numbers_by_layer):
  return np.array([np.isin(np.arange(8), own) for own in numbers_by_layer])


def test_losses_are_those_of_the_naive_model(carved):
  run, _, rows, result, _ = carved
  model = load(run.workdir).model
  point = next(
    p for p in result["points"] if (p["domain"], p["keep"]) == ("digits", 2)
  )
  own, others = rows.held_out[0], curve.other_rows(rows.held_out, 0)
  kept_LE = mask(point["experts"])
  (most_used,) = (m for m in result["most_used"] if m["keep"] == 2)
  for got, text, mask_LE in (
    (point["loss"], own, kept_LE),
    (point["others_loss"], others, kept_LE),
    (point["most_used_loss"], own, mask(most_used["experts"])),
    (point["random_losses"][1], own, selection.random_experts((2, 8), 2, 1)),
    (result["whole"]["digits"]["loss"], own, None),
  ):
    assert got == pytest.approx(naive_loss(model, text, mask_LE), rel=1e-5)


def test_the_whole_model_has_the_loss_of_its_evaluation(carved):
  run, corpus, _, result, _ = carved
  mesh = runs.choose_mesh(run.experiment)
  tokenizer = run.provenance.tokenizer
  with jax.set_mesh(mesh):
    evaluation = evaluate(
      make_eval_step(3, tokenizer),
      load(run.workdir, mesh=mesh).model,
      eval_batches(corpus, tokenizer, run.experiment),
      mesh,
      corpus.taxonomy,
      run.experiment,
    )
  assert list(result["whole"]) == ["digits", "low"]
  for domain, whole in result["whole"].items():
    want = evaluation.losses["domains"][domain]
    assert whole["loss"] == pytest.approx(want["lm_loss"], rel=1e-6)
    assert whole["tokens"] == want["tokens"]
    # 100 tokens are four rows of 32.
    assert whole["calibration_tokens"] == 128


def test_keeping_every_expert_raises_no_loss(carved):
  *_, result, lines = carved
  for point in result["points"]:
    whole = result["whole"][point["domain"]]
    if point["keep"] == 8:
      same = [point["loss"], point["most_used_loss"], *point["random_losses"]]
      assert same == [whole["loss"]] * 4
      assert point["others_loss"] == whole["others_loss"]
  assert [cost["keep"] for cost in result["costs"]] == [2, 8]
  assert len(lines) == 2 and lines[0].startswith("  digits: ")


def test_calibration_sizes_beyond_the_text_are_left_out(carved):
  *_, result, _ = carved
  found = [(c["domain"], c["tokens"]) for c in result["calibration"]]
  assert found == [(d, n) for d in ("digits", "low") for n in (64, 128)]
  # 128 tokens are the rows of the curve itself, at a quarter of the experts.
  for each in result["calibration"]:
    assert each["keep"] == 2
    if each["tokens"] == 128:
      (point,) = (
        p
        for p in result["points"]
        if (p["domain"], p["keep"]) == (each["domain"], 2)
      )
      assert each["loss"] == point["loss"]


def row_of(domain, number):
  arrays = [np.full(2, number, np.int32)] * 4
  return Batch(*arrays, np.ones(2, np.float32), np.int32(domain))


def test_other_rows_come_from_each_other_domain_in_turn():
  rows = [
    [row_of(d, 10 * d + n) for n in range(count)]
    for d, count in enumerate((2, 1, 3))
  ]
  numbers = [int(row.tokens_BT[0]) for row in curve.other_rows(rows, 0)]
  assert numbers == [10, 20, 21]
  numbers = [int(row.tokens_BT[0]) for row in curve.other_rows(rows, 2)]
  assert numbers == [0, 10, 1]
  assert curve.other_rows(rows[:1], 0) == []


def test_a_masked_model_is_the_same_on_any_mesh():
  config = ModelConfig(
    vocabulary_size=32,
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    num_experts=4,
    num_active_experts=2,
    expert_width=8,
    dense_width=8,
  )
  model = Model(config, jax.random.key(0))
  random = np.random.default_rng(0)
  tokens_BT = random.integers(0, 32, (8, 6)).astype(np.int32)
  positions_T = np.arange(6, dtype=np.int32)
  rows = [
    Batch(
      tokens_T,
      tokens_T[::-1],
      np.ones(6, np.int32),
      positions_T,
      np.ones(6, np.float32),
      np.int32(0),
    )
    for tokens_T in tokens_BT
  ]
  kept_LE = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool)
  want = naive_loss(model, rows, kept_LE)
  for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "expert": 2}):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    placed = jax.device_put(model, parameter_shardings(model, mesh))
    with jax.set_mesh(mesh):
      batches = [put_batch(b, mesh) for b in padded_batches(rows, 8)]
      held_out = curve.HeldOut(curve.make_loss_step(), placed, {0: batches})
      assert held_out.loss(0, kept_LE) == pytest.approx(want, rel=1e-5)
