"""Router saturation against naive routing, token by token in NumPy."""

import itertools
import json

import numpy as np
import pytest

import edl_jax
from edl_jax.analysis import run_text, saturation
from edl_jax.text.input_pipeline import eval_batches
from tests.analysis.carve.run_cases import train_run, write_texts
from tests.model import naive_model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saturation")
  files = write_texts(folder / "texts.jsonl")
  every = {"train.checkpoint_every": 2, "train.keep_checkpoints": 3}
  steps = {"train.num_steps": 6, "train.eval_every": 6, "train.eval_rows": 2}
  return train_run(folder / "run", files, **every, **steps)


def documents(loaded, workdir):
  """Yields the tokens of each document, or part of one, that rows hold."""
  corpus = run_text.read_corpus(loaded, workdir)
  for batch in eval_batches(corpus, loaded.tokenizer, loaded.experiment):
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT):
      for segment in set(segments_T.tolist()) - {0}:
        yield tokens_T[segments_T == segment]


def naive_choices(loaded, workdir):
  """Returns the set of active experts by layer, and in it by token."""
  chosen = {}
  for tokens_T in documents(loaded, workdir):
    routed = []
    naive_model.logits(loaded.model, tokens_T, None, routed)
    for token in routed:
      chosen.setdefault(token.layer, []).append(set(token.experts.tolist()))
  return chosen


def test_saturation_is_that_of_a_naive_router(workdir, capsys):
  assert saturation.main([f"--workdir={workdir}"]) == 0
  printed = capsys.readouterr().out
  with open(f"{workdir}/report/saturation.json") as file:
    result = json.load(file)
  last = naive_choices(edl_jax.load(f"{workdir}/checkpoints/6"), workdir)
  assert (result["last"], result["layers"]) == (6, [1, 2])
  assert result["chance"] == 2 / 8
  assert result["tokens"] == len(last[0]) == len(last[1])
  assert [each["step"] for each in result["checkpoints"]] == [2, 4]
  for each in result["checkpoints"]:
    path = f"{workdir}/checkpoints/{each['step']}"
    earlier = naive_choices(edl_jax.load(path), workdir)
    want = [
      np.mean([len(a & b) / 2 for a, b in zip(earlier[n], last[n])])
      for n in (0, 1)
    ]
    # Two experts may be equal to float32, in a token or two.
    slack = 2 / result["tokens"]
    np.testing.assert_allclose(each["saturation"], want, rtol=0, atol=slack)
    assert all(0.2 < share < 1 for share in each["saturation"])
    cells = [*each["saturation"], np.mean(each["saturation"])]
    row = " | ".join(f"{cell:7.3f}" for cell in cells[:2])
    assert f"|    {each['step']} | {row} | {cells[2]:.3f} |" in printed
  with open(f"{workdir}/report/saturation.md") as file:
    assert printed.endswith(file.read())


def test_order_and_padding_do_not_count():
  random = np.random.default_rng(0)
  every = [list(each) for each in itertools.permutations(range(5), 3)]
  expert_LBTA, last_LBTA = random.choice(every, (2, 2, 3, 4))
  weights_BT = random.integers(0, 2, (3, 4)).astype(np.float32)
  want = [
    sum(
      len(set(expert_LBTA[layer, b, t]) & set(last_LBTA[layer, b, t]))
      for b, t in itertools.product(range(3), range(4))
      if weights_BT[b, t]
    )
    for layer in (0, 1)
  ]
  got = saturation.shared_experts(expert_LBTA, last_LBTA, weights_BT)
  np.testing.assert_array_equal(got, want)
  assert 0 < weights_BT.sum() < 12


def test_every_layer_has_a_line_that_ends_at_one():
  result = {
    "last": 6,
    "chance": 0.25,
    "layers": [1, 2],
    "checkpoints": [
      {"step": 2, "saturation": [0.5, 0.25]},
      {"step": 4, "saturation": [0.75, 0.5]},
    ],
  }
  (axes,) = saturation.draw(result).axes
  first, second, chance = axes.lines
  assert first.get_xydata().tolist() == [[2, 0.5], [4, 0.75], [6, 1]]
  assert second.get_xydata().tolist() == [[2, 0.25], [4, 0.5], [6, 1]]
  assert list(chance.get_ydata()) == [0.25, 0.25]
  assert [line.get_label() for line in axes.lines] == [
    *("layer 1", "layer 2", "random choice")
  ]


def test_mistakes_are_one_line(workdir, tmp_path, capsys):
  files = write_texts(tmp_path / "texts.jsonl")
  one = train_run(tmp_path / "one", files)
  for folder, message in (
    (one, "has one checkpoint, and saturation compares several"),
    (tmp_path, "has no checkpoint; train first"),
  ):
    assert saturation.main([f"--workdir={folder}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
  out = f"--out={files}"
  assert saturation.main([f"--workdir={workdir}", out]) == 2
  error = capsys.readouterr().err
  assert "choose another --out" in error and error.count("\n") == 1
