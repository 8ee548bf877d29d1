"""Batches of supervised examples: rows, resuming, sharing, evaluation."""

import json
import random

import numpy as np
import pytest

from edl_jax.config import DataConfig, Experiment, TrainConfig, UserError
from edl_jax.text.batch import Batch
from edl_jax.text.documents import Document, SupervisedExample
from edl_jax.text.input_pipeline import (
  eval_batches,
  long_examples,
  train_dataset,
  train_iterator,
)
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

START = 256
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))


def make_experiment(**train):
  return Experiment(
    train=TrainConfig(**{"batch_size": 4, "sequence_length": 16} | train),
    data=DataConfig(tokenizer="byte"),
  )


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    for name, array, expected in zip(Batch._fields, batch, other):
      np.testing.assert_array_equal(array, expected, err_msg=name)


def make_examples(name, count, longest=12):
  """Examples of 4 to `longest` bytes, whose first half is the prompt."""
  rng = random.Random(name)
  sizes = [4 + n % (longest - 3) for n in range(count)]
  made = ["".join(rng.choices("0123456789", k=size)) for size in sizes]
  return tuple(
    SupervisedExample(text, name, text, (len(text) // 2,)) for text in made
  )


R = make_examples("r", 30)


def make_texts(name, count):
  return tuple(
    Document(f"{name} is text number {n}", name, str(n)) for n in range(count)
  )


TEXTS = Corpus(
  Taxonomy.from_names(["a"]),
  (make_texts("a", 9),),
  (make_texts("A", 2),),
  "hash",
)


def supervised_corpus(longest=12):
  """One domain of texts, and two of examples."""
  return Corpus(
    Taxonomy.from_names(["a", "q", "r"]),
    (make_texts("a", 40), make_examples("q", 50, longest), R),
    (make_texts("A", 20), make_examples("Q", 9), make_examples("R", 5)),
    "hash",
  )


def test_supervised_rows_resume_exactly_beside_texts():
  corpus, experiment = supervised_corpus(), make_experiment()

  def iterator():
    rows, _ = train_dataset(corpus, TOKENIZER, experiment)
    return train_iterator(rows, experiment, 3)

  whole = iterator()
  first = take(whole, 7)
  state = json.dumps(whole.get_state())
  rest = take(whole, 5)
  resumed = iterator()
  resumed.set_state(json.loads(state))
  assert_equal(take(resumed, 5), rest)
  for batch in (*first, *rest):
    for row, domain in enumerate(batch.domain_B):
      share = batch.loss_weights_BT[row].sum() / batch.weights_BT[row].sum()
      # Half of an example's bytes or one more, and its end.
      assert share == 1 if domain == 0 else 0.5 <= share <= 2 / 3
  whole.close()
  resumed.close()


def test_every_held_out_example_is_evaluated_once():
  corpus = supervised_corpus()
  experiment = make_experiment(eval_rows=-1)
  batches = eval_batches(corpus, TOKENIZER, experiment)
  counted = np.zeros(3)
  for batch in batches:
    np.add.at(counted, batch.domain_B, batch.loss_weights_BT.sum(1))
  wanted = [
    sum(len(own.text) - own.cuts[0] + 1 for own in group)
    for group in corpus.held_out[1:]
  ]
  assert counted[1:].tolist() == wanted
  parts = [eval_batches(corpus, TOKENIZER, experiment, p, 2) for p in range(2)]
  for p, part in enumerate(parts):
    assert_equal(
      part, [Batch(*(array[p::2] for array in batch)) for batch in batches]
    )


def test_examples_longer_than_a_row_are_left_out_and_counted():
  corpus, experiment = supervised_corpus(longest=19), make_experiment()
  sizes = [len(each.text) + 1 for each in corpus.train[1]]
  long = sum(size > 16 for size in sizes)
  assert long
  assert long_examples(corpus, TOKENIZER, experiment) == [
    f"left out {long} of 50 train examples of 'q': longer than"
    f" train.sequence_length=16 (the longest: {max(sizes)} tokens)"
  ]
  rows, _ = train_dataset(corpus, TOKENIZER, experiment)
  starts = [rows[i].tokens_BT == START for i in range(300)]
  assert max(row.sum() for row in starts) <= 16 // 5
  assert long_examples(TEXTS, TOKENIZER, experiment) == []
  with pytest.raises(
    UserError,
    match=r"domain 'q': each of its train examples is longer than"
    r" train\.sequence_length=4 \(the shortest: 5 tokens\); lengthen",
  ):
    long_examples(corpus, TOKENIZER, make_experiment(sequence_length=4))
