"""What may be carved, and on which text."""

import dataclasses

import jax
import numpy as np
import pytest

from edl_jax.analysis.carve import runs
from edl_jax.checkpoint import Provenance
from edl_jax.config import Experiment, MeshConfig, ModelConfig, UserError
from edl_jax.sharding import make_mesh
from edl_jax.text.batch import Batch
from edl_jax.text.taxonomy import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer


def run_of():
  model = ModelConfig(num_experts=16, num_active_experts=2)
  taxonomy = Taxonomy.from_names(["text/legal", "text/prose", "math"])
  provenance = Provenance(
    Experiment(model=model), taxonomy, byte_tokenizer(), "hash"
  )
  return runs.Run("runs/a", 10, provenance)


def refused(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_domains_are_found_by_either_name():
  run = run_of()
  assert runs.domain_indices(run, [], "domains") == [0, 1, 2]
  names = ["math", "text/legal", "legal"]
  assert runs.domain_indices(run, names, "domains") == [2, 0]
  message = refused(runs.domain_indices, run, ["legale"], "domains")
  assert message.startswith("--domains=legale: no such domain in runs/a")
  assert "did you mean legal?" in message


def test_a_run_needs_a_checkpoint(tmp_path):
  message = refused(runs.find_runs, [str(tmp_path)])
  assert message == (
    f"--workdir={tmp_path} has no checkpoint to carve; train first"
  )


def test_calibration_is_on_training_text(carve_workdir):
  (run,) = runs.find_runs([carve_workdir])
  corpus = runs.read_corpus(run)
  rows = runs.choose_rows(run, corpus, [0, 1, 2], 320)
  fewer = runs.choose_rows(run, corpus, [0, 1, 2], 33)

  def text(row):
    tokens = row.tokens_BT[row.weights_BT > 0]
    return bytes(int(token) for token in tokens if token < 256)

  def found(row, documents):
    # Documents are longer than a row, which has parts of two at most.
    pieces = [
      bytes(int(t) for t in row.tokens_BT[row.segments_BT == n] if t < 256)
      for n in range(1, row.segments_BT.max() + 1)
    ]
    return all(
      any(piece in document.text.encode() for document in documents)
      for piece in pieces
    )

  for domain in range(3):
    assert [text(row) for row in fewer.calibration[domain]] == [
      text(row) for row in rows.calibration[domain][:2]
    ]
    assert len(rows.calibration[domain]) == 10
    assert {int(row.domain_B) for row in rows.calibration[domain]} == {domain}
    for row in rows.calibration[domain]:
      assert found(row, corpus.train[domain])
      assert not found(row, corpus.held_out[domain])
    for row in rows.held_out[domain]:
      assert found(row, corpus.held_out[domain])


def test_a_domain_needs_text_of_both_kinds(carve_workdir):
  (run,) = runs.find_runs([carve_workdir])
  corpus = runs.read_corpus(run)
  for split, what in (("train", "training"), ("held_out", "held-out")):
    kept = getattr(corpus, split)
    bare = dataclasses.replace(corpus, **{split: (kept[0], (), kept[2])})
    message = refused(runs.choose_rows, run, bare, [1], 100)
    assert message.startswith(
      f"domain 'high' of {carve_workdir} has no {what} text"
    )
    # Another domain can do without it.
    runs.choose_rows(run, bare, [0, 2], 100)


def test_other_text_is_refused(carve_workdir):
  (run,) = runs.find_runs([carve_workdir])
  other = dataclasses.replace(run.provenance, content_hash="another")
  message = refused(runs.read_corpus, run._replace(provenance=other))
  assert "content hash differs" in message


def test_the_mesh_is_that_of_the_run_if_it_fits():
  def shape(**sizes):
    return runs.choose_mesh(Experiment(mesh=MeshConfig(**sizes))).shape

  assert shape(data=2, fsdp=4)["fsdp"] == 4
  devices = jax.device_count()
  assert shape(data=1, fsdp=3) == make_mesh(MeshConfig(data=devices)).shape


def test_batches_have_one_size_and_lose_no_row():
  experiment = Experiment()
  experiment.train.batch_size = 8
  mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])

  def row(number):
    arrays = [np.full(4, number, np.int32)] * 4
    return Batch(*arrays, np.ones(4, np.float32), np.int32(0))

  for count in (1, 9, 20):
    made = runs.to_batches(
      [row(n) for n in range(1, count + 1)], 20, experiment, mesh
    )
    # 20 rows make three batches of 7, which two shards round up to 8.
    assert {batch.tokens_BT.shape for batch in made} == {(8, 4)}
    counted = [
      np.asarray(b.tokens_BT)[np.asarray(b.weights_BT) > 0] for b in made
    ]
    firsts = np.concatenate(counted)[::4]
    np.testing.assert_array_equal(firsts, np.arange(1, count + 1))
