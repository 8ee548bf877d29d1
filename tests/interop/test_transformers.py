"""Transformers itself loads what is exported, and computes the same.

`make test-interop` runs these tests; without it they are skipped.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import edl_jax
from edl_jax import main
from edl_jax.config import DataConfig
from edl_jax.interop.export import export
from edl_jax.text.mixture import load_corpus
from edl_jax.text.sources import read_documents

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("transformers_program.py")
NEW_TOKENS = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(run_elsewhere, run_folder):
  del run_elsewhere  # Skips before the run is loaded.
  return edl_jax.load(str(run_folder))


@pytest.fixture(scope="module")
def texts(run):
  """Documents of all domains, and texts that are easily changed."""
  corpus = load_corpus(run.experiment.data)
  return [
    *(document.text for group in corpus.held_out for document in group[:5]),
    *("", " ", "a <|document|> b", "e\u0301 漢字 😀", " 12345\r\n\n\tx  "),
  ]


@pytest.fixture(scope="module")
def tokens_BT(run, texts):
  stream = np.concatenate([run.tokenizer.encode(text) for text in texts])
  rows = stream[: 4 * 40].reshape(4, 40)
  return np.insert(rows, 0, run.tokenizer.document_start_id, axis=1)


@pytest.fixture(scope="module")
def theirs(run_elsewhere, run_folder, texts, tokens_BT, tmp_path_factory):
  """What Transformers computes, by the type of the exported tensors."""
  folder = tmp_path_factory.mktemp("theirs")
  np.save(folder / "tokens.npy", tokens_BT)
  (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
  found = {}
  for dtype in ("float32", "bfloat16"):
    export(str(run_folder), str(folder / dtype), dtype, 30_000)
    out = folder / f"{dtype}.npz"
    run_elsewhere(
      PROGRAM,
      *(folder / dtype, folder / "tokens.npy", folder / "texts.json"),
      *(NEW_TOKENS, out),
    )
    with np.load(out) as arrays:
      found[dtype] = dict(arrays)
  return found


def test_logits(run, theirs, tokens_BT):
  logits_BTV = np.asarray(run.model(jnp.asarray(tokens_BT)))
  found = theirs["float32"]
  assert found["dtype"] == "torch.float32"
  assert logits_BTV.std() > 0.1
  np.testing.assert_allclose(found["logits_BTV"], logits_BTV, rtol=0, atol=1e-5)


def test_greedy_continuation(run, theirs, tokens_BT):
  row = tokens_BT[0].tolist()
  for _ in range(NEW_TOKENS):
    logits_BTV = run.model(jnp.asarray([row], jnp.int32))
    row.append(int(logits_BTV[0, -1].argmax()))
  assert theirs["float32"]["greedy"].tolist() == row


def test_tokens(run, theirs, texts):
  own = [run.tokenizer.encode(text) for text in texts]
  found = theirs["float32"]
  np.testing.assert_array_equal(found["ids"], np.concatenate(own))
  start = run.tokenizer.document_start_id
  np.testing.assert_array_equal(
    found["start_ids"], np.concatenate([np.insert(x, 0, start) for x in own])
  )
  assert found["decoded"].all()


def test_a_thousand_documents(run_elsewhere, tmp_path):
  """Up to 250 of each domain, with a BPE that the run learned."""
  overrides = {
    "model.vocabulary_size": 2048,
    "train.num_steps": 1,
    "optimizer.warmup_steps": 1,
    "train.eval_rows": 2,
    "data.tokenizer": "bpe",
  }
  code = main.main(
    [
      f"--experiment={ROOT}/experiments/tiny.py",
      f"--workdir={tmp_path / 'run'}",
      *(f"--experiment.{key}={value}" for key, value in overrides.items()),
    ]
  )
  assert code == 0
  _, documents, _ = read_documents(DataConfig())
  by_domain = {}
  for document in documents:
    by_domain.setdefault(document.domain, []).append(document.text)
  texts = [text for group in by_domain.values() for text in group[:250]]
  assert len(by_domain) == 6 and len(texts) >= 1000
  (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
  np.save(tmp_path / "tokens.npy", np.zeros((1, 8), np.int64))
  export(str(tmp_path / "run"), str(tmp_path / "hub"), "float32", 1 << 30)
  run_elsewhere(
    PROGRAM,
    *(tmp_path / "hub", tmp_path / "tokens.npy", tmp_path / "texts.json"),
    *(1, tmp_path / "theirs.npz"),
  )
  tokenizer = edl_jax.load(str(tmp_path / "run")).tokenizer
  own = [tokenizer.encode(text) for text in texts]
  with np.load(tmp_path / "theirs.npz") as theirs:
    np.testing.assert_array_equal(theirs["ids"], np.concatenate(own))
    assert theirs["decoded"].all()


def test_bfloat16_is_float32_rounded(theirs):
  assert theirs["bfloat16"]["dtype"] == "torch.bfloat16"
  names = [name for name in theirs["float32"] if name.startswith("tensor/")]
  assert len(names) > 30
  for name in names:
    rounded = jnp.asarray(theirs["float32"][name], jnp.bfloat16)
    np.testing.assert_array_equal(
      theirs["bfloat16"][name], rounded.astype(jnp.float32)
    )
