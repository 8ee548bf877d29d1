"""Rows that branch compute what whole documents compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edl_jax.config import ModelConfig
from edl_jax.model import attention
from edl_jax.model.branching import branching
from edl_jax.model.cached import empty_cache
from edl_jax.model.transformer import Model

CONFIG = ModelConfig(
  vocabulary_size=48,
  num_layers=2,
  num_dense_layers=1,
  width=16,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  num_experts=4,
  num_active_experts=2,
  expert_width=8,
  dense_width=16,
)
STEM, QUESTION, ANSWERS = 5, 3, (2, 4)


@pytest.mark.parametrize("queries", [512, 4])
def test_each_branch_is_a_whole_document(queries, monkeypatch):
  monkeypatch.setattr(attention, "_BRANCHING_QUERIES", queries)
  model = jax.jit(Model, static_argnums=0)(CONFIG, jax.random.key(0))
  random = np.random.default_rng(0)
  stem_T, question_T, *answers = (
    random.integers(0, 48, size) for size in (STEM, QUESTION, *ANSWERS)
  )
  wanted = jax.jit(Model.__call__)

  @jax.jit
  def found(tokens_BT, positions_BT, branch_BT, counted_BT, stem, stem_length):
    x_BTM, cache, routed = branching(
      *(model, tokens_BT, positions_BT, branch_BT, counted_BT),
      *(stem, stem_length),
    )
    return model.logits(x_BTM), cache, routed

  # The stem has slots that are not read.
  padded_BT = np.append(stem_T, [7, 7])[None]
  positions_BT = np.arange(padded_BT.shape[1])[None]
  _, stem, of_stem = found(
    *(padded_BT, positions_BT, np.zeros_like(padded_BT)),
    *(positions_BT < STEM, empty_cache(CONFIG, 1, 0), 0),
  )
  # One more token, as padding, which no other sees.
  row_T = np.concatenate([question_T, *answers, [9]])
  first = STEM + QUESTION
  positions_T = [np.arange(STEM, first)]
  positions_T += [np.arange(first, first + size) for size in ANSWERS]
  branch_T = np.repeat([0, 1, 2, -1], [QUESTION, *ANSWERS, 1])
  counted_T = (branch_T == 0) | (branch_T == 2)
  logits_BTV, _, of_row = found(
    row_T[None],
    np.concatenate([*positions_T, [0]])[None],
    branch_T[None],
    *(counted_T[None], stem, jnp.int32(STEM)),
  )
  assert np.isfinite(logits_BTV).all()
  for number, answer in enumerate(answers, 1):
    whole = np.concatenate([stem_T, question_T, answer])
    seen = (branch_T == 0) | (branch_T == number)
    np.testing.assert_allclose(
      logits_BTV[0, seen],
      wanted(model, whole[None])[0, STEM:],
      rtol=1e-4,
      atol=1e-5,
    )
  # The stem's sums and the row's are those of the text whose branch counts.
  whole = np.concatenate([stem_T, question_T, answers[1]])
  probs_LTE, expert_LTA = (
    x[:, 0] for x in jax.jit(Model.token_routing)(model, whole[None])
  )
  probability_LE, assignments_LE = (
    (a + b)[:, 0] for a, b in zip(of_stem, of_row)
  )
  np.testing.assert_allclose(probability_LE, probs_LTE.sum(1), rtol=1e-5)
  for layer, expert_TA in zip(assignments_LE, expert_LTA, strict=True):
    count_E = np.bincount(expert_TA.ravel(), minlength=CONFIG.num_experts)
    assert layer.tolist() == count_E.tolist()
