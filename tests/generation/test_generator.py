"""Continuations against repeated whole forward passes, and where they end."""

import functools

import jax
import numpy as np
import pytest

from edl_jax import sharding
from edl_jax.config import MeshConfig, ModelConfig, UserError
from edl_jax.generation.generator import _Sample, generate
from edl_jax.generation.settings import Settings
from edl_jax.model.transformer import Model
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TAXONOMY = Taxonomy.from_names(["code", "law"])
PROMPTS = ["hello", "a much longer prompt", ""]
NEW = 6


@functools.cache
def make_model(router: str = "learned") -> Model:
  config = ModelConfig(
    # More than the tokenizer's 257.
    vocabulary_size=264,
    num_layers=3,
    num_dense_layers=1,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    num_experts=16,
    num_active_experts=2,
    expert_width=16,
    dense_width=16,
    router=router,
  )
  model = jax.jit(Model, static_argnums=0)(config, jax.random.key(0))
  # Larger than at the start of training, so that experts matter.
  return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 2 else leaf, model)


def continued(prompts, model=None, **settings):
  return generate(
    model or make_model(), TOKENIZER, TAXONOMY, prompts, Settings(**settings)
  )


def naive(prompt, count, router="learned", label=-1):
  """Takes the likeliest token of a whole forward pass, again and again."""
  model, forward = make_model(router), jax.jit(Model.__call__, static_argnums=3)
  tokens = [256, *prompt.encode()]
  for _ in range(count):
    tokens_BT = np.zeros((1, 32), np.int32)
    tokens_BT[0, : len(tokens)] = tokens
    logits_V = forward(model, tokens_BT, np.array([label]), 2)[
      0, len(tokens) - 1
    ]
    tokens.append(int(logits_V[:257].argmax()))
  return tokens


def test_greedy_is_repeated_whole_forward_passes():
  results = continued(PROMPTS, num_tokens=NEW, experts=True)
  for prompt, result in zip(PROMPTS, results, strict=True):
    # Alone, no other prompt makes it pad.
    assert result.tokens == naive(prompt, NEW)
    assert (result.prompt, result.finish) == (prompt, "length")
    _, expert_LBTA = jax.jit(Model.token_routing)(
      make_model(), np.array([result.tokens[:-1]])
    )
    np.testing.assert_array_equal(result.experts_LTA, expert_LBTA[:, 0])


@pytest.mark.parametrize("label", [-1, 1])
def test_fixed_experts_of_a_domain(label):
  (result,) = continued(
    ["text"],
    make_model("domain"),
    num_tokens=4,
    domain=None if label < 0 else TAXONOMY.fine[label],
  )
  assert result.tokens == naive("text", 4, "domain", label)


@pytest.mark.parametrize(
  "axes",
  [{"fsdp": 2, "expert": 2}, {"expert": 2, "tensor": 2, "sequence": 2}],
)
def test_a_mesh_changes_nothing(axes):
  sizes = dict.fromkeys(sharding.MESH_AXES, 1) | axes
  count = int(np.prod(list(axes.values())))
  mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:count])
  spread = jax.device_put(
    make_model(), sharding.parameter_shardings(make_model(), mesh)
  )
  settings = {"num_tokens": NEW, "experts": True}
  for one, many in zip(
    continued(PROMPTS, **settings), continued(PROMPTS, spread, **settings)
  ):
    assert one.tokens == many.tokens
    np.testing.assert_array_equal(one.experts_LTA, many.experts_LTA)


def test_a_sample_does_not_depend_on_other_prompts():
  settings = {"temperature": 1.0, "top_p": 0.95, "num_samples": 2, "seed": 3}
  together = continued(PROMPTS, num_tokens=NEW, **settings)
  alone = continued(PROMPTS[1:2], num_tokens=NEW, **settings)
  assert [each.tokens for each in together[2:4]] == [x.tokens for x in alone]
  assert alone[0].tokens != alone[1].tokens
  other = continued(PROMPTS[1:2], num_tokens=NEW, **(settings | {"seed": 4}))
  assert alone[0].tokens != other[0].tokens


def test_a_stop_string_across_tokens():
  sample = _Sample("", [256])
  for token in b"ab":
    sample.add(token, TOKENIZER, ["bc"], 9)
  assert (sample.text, sample.shown, sample.finish) == ("ab", "a", "")
  assert sample.add(ord("c"), TOKENIZER, ["bc"], 9) == ""
  assert (sample.text, sample.shown, sample.finish) == ("a", "a", "stop")


def test_a_batch_ends_where_each_row_stops():
  whole = continued(PROMPTS, num_tokens=NEW)
  # A character that one row writes, and so stops at before the others.
  stop = next(c for c in whole[0].text + whole[1].text if c.isascii())
  results = continued(PROMPTS, num_tokens=NEW, stop=(stop,))
  for before, result in zip(whole, results, strict=True):
    text, found, _ = before.text.partition(stop)
    assert (result.text, result.finish) == (text, "stop" if found else "length")


def test_a_document_ends_at_the_start_of_the_next():
  sample = _Sample("", [256])
  assert sample.add(ord("a"), TOKENIZER, [], 9) == "a"
  assert sample.add(256, TOKENIZER, [], 9) == ""
  assert (sample.text, sample.tokens, sample.finish) == (
    "a",
    [256, ord("a")],
    "end",
  )


def test_pieces_make_up_the_text():
  pieces = {0: "", 1: ""}

  def on_text(index, piece):
    pieces[index] += piece

  results = generate(
    make_model(),
    TOKENIZER,
    TAXONOMY,
    PROMPTS[:2],
    Settings(num_tokens=NEW),
    on_text=on_text,
  )
  assert list(pieces.values()) == [result.text for result in results]


def test_longer_than_training_is_a_warning():
  with pytest.warns(UserWarning, match="reach 11 tokens; .* rows of 10"):
    generate(
      make_model(),
      TOKENIZER,
      TAXONOMY,
      ["hello"],
      Settings(num_tokens=NEW),
      trained_length=10,
    )


def test_several_processes_are_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="one process, and here are 2"):
    continued(["good"])


def test_bad_prompts():
  for prompts in ([], "text"):
    with pytest.raises(UserError, match="no list of prompts"):
      continued(prompts)
  with pytest.raises(UserError, match="prompt 2 is no Unicode text"):
    continued(["good", "\udcff"])
  with pytest.raises(UserError, match="domain='x' is none of the run's"):
    continued(["good"], domain="x")
