"""Every family against Transformers: in, the same numbers, and out again.

`make test-interop` runs these tests; without it they are skipped.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import edl_jax
from edl_jax.config import UserError
from edl_jax.interop.architectures import expressing
from edl_jax.interop.export import export
from edl_jax.interop.import_weights import import_weights
from edl_jax.interop.safetensors_reader import Checkpoint
from edl_jax.interop.tensors import tensors
from edl_jax.text.batch import Batch

PROGRAM = pathlib.Path(__file__).with_name("families_program.py")
FAMILIES = {
  "qwen3_moe": "Qwen3-MoE",
  "qwen3_moe_tied": "Qwen3-MoE",
  "qwen3_moe_yarn": "Qwen3-MoE",
  "qwen3_moe_linear": "Qwen3-MoE",
  "mixtral": "Mixtral",
  "olmoe": "OLMoE",
  "qwen2_moe": "Qwen2-MoE",
  "deepseek": "DeepSeek-MoE",
}

pytestmark = pytest.mark.slow
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def hub(run_elsewhere, tmp_path_factory):
  """The folder of what Transformers saved."""
  folder = tmp_path_factory.mktemp("hub")
  run_elsewhere(PROGRAM, folder)
  return folder


@pytest.fixture(scope="module")
def imported(hub, tmp_path_factory):
  """Imports a family once; returns its run folder."""
  runs = tmp_path_factory.mktemp("runs")

  def run_folder(name):
    out = runs / name
    if not out.exists():
      import_weights(str(hub / name), str(out))
    return str(out)

  return run_folder


def results(hub, name):
  with np.load(hub / name / "results.npz") as found:
    return dict(found)


@each_family
def test_logits(hub, imported, name):
  wanted = results(hub, name)
  model = edl_jax.load(imported(name)).model
  assert expressing(model.config).title == FAMILIES[name]
  logits_BTV = model(jnp.asarray(wanted["tokens_BT"], jnp.int32))
  assert wanted["logits_BTV"].std() > 0.1
  np.testing.assert_allclose(
    logits_BTV, wanted["logits_BTV"], rtol=0, atol=1e-4
  )


def batch_of(tokens_BT):
  tokens_BT = tokens_BT.astype(np.int32)
  weights_BT = np.ones(tokens_BT.shape, np.float32)
  weights_BT[:, -1] = 0
  return Batch(
    tokens_BT=tokens_BT,
    targets_BT=np.roll(tokens_BT, -1, axis=1),
    segments_BT=np.ones_like(tokens_BT),
    positions_BT=np.broadcast_to(
      np.arange(tokens_BT.shape[1]), tokens_BT.shape
    ),
    weights_BT=weights_BT,
    domain_B=np.zeros(len(tokens_BT), np.int32),
  )


@each_family
def test_loss_and_gradients(hub, imported, name):
  """By the function that training differentiates."""
  wanted = results(hub, name)
  model = edl_jax.load(imported(name)).model
  batch = batch_of(wanted["tokens_BT"])

  @jax.jit
  @jax.value_and_grad
  def loss_of(model):
    sums, _ = model.batch_sums(batch, num_domains=1)
    return sums.nats / sums.tokens

  loss, gradient = loss_of(model)
  np.testing.assert_allclose(loss, wanted["loss"], atol=1e-4)
  found = tensors(expressing(model.config), gradient)
  theirs = Checkpoint(str(hub / name / "gradient"))
  # Saved with a tied head, which has the gradient of the embedding.
  assert found.keys() | {"lm_head.weight"} >= theirs.tensors.keys()
  used = [key for key in found if theirs.read(key).any()]
  # Of 24 tokens a row, an expert may get none.
  assert len(used) > 0.8 * len(found)
  for key, tensor in found.items():
    want = theirs.read(key)
    np.testing.assert_allclose(tensor, want, rtol=0, atol=1e-4, err_msg=key)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_come_back_bit_by_bit(hub, imported, tmp_path, name, dtype):
  source = hub / name
  run = imported(name)
  if dtype == "bfloat16":
    source, run = source / "bfloat16", tmp_path / "run"
    tokenizer = str(hub / name / "tokenizer.json")
    import_weights(str(source), str(run), tokenizer)
  export(str(run), str(tmp_path / "out"), dtype, 40_000)
  before, after = Checkpoint(str(source)), Checkpoint(str(tmp_path / "out"))
  names = before.tensors.keys()
  if "tied" in name:
    names -= {"lm_head.weight"}
  assert after.tensors.keys() == names
  assert len(names) > 30
  for key in names:
    old, new = before.read(key), after.read(key)
    assert (old.dtype, old.shape) == (new.dtype, new.shape), key
    assert old.tobytes() == new.tobytes(), key


@each_family
def test_config_comes_back(hub, imported, tmp_path, name):
  """What the file said of the model, and what we write of it, are one model."""
  export(imported(name), str(tmp_path / "out"), "float32", 10**9)
  again = tmp_path / "again"
  import_weights(str(tmp_path / "out"), str(again))
  first, second = (edl_jax.load(run) for run in (imported(name), str(again)))
  assert first.experiment.model == second.experiment.model
  leaves = zip(jax.tree.leaves(first.model), jax.tree.leaves(second.model))
  assert all((a == b).all() for a, b in leaves)


# One of each kind: byte-level BPE, and SentencePiece as Llama has it.
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_tokenizers_come_along(hub, imported, run_elsewhere, tmp_path, name):
  out = tmp_path / "out"
  export(imported(name), str(out), "float32", 10**9)
  run_elsewhere(PROGRAM, tmp_path, out)
  before, after = (
    json.loads((folder / "tokens.json").read_text())
    for folder in (hub / name, out)
  )
  assert "<|user|>a b</s>" in before["chat"]
  assert after == before
  tokenizer = edl_jax.load(imported(name)).tokenizer
  assert tokenizer.token_text(tokenizer.document_start_id) == "<s>"
  for text in before["texts"]:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_larger_than_the_embedding(hub, imported, tmp_path):
  content = json.loads((hub / "olmoe" / "tokenizer.json").read_text())
  vocabulary = content["model"]["vocab"]
  vocabulary |= {f"{'b' * n}": 300 + n for n in range(2, 60)}
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"360 tokens, but the embedding 320"):
    import_weights(
      str(hub / "olmoe"), str(tmp_path / "x"), str(tmp_path / "tokenizer.json")
    )
