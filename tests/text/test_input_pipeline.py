"""Batches of a corpus: training rows, resuming, sharing, evaluation."""

import collections
import dataclasses
import json
import random
import threading

import numpy as np
import pytest

from edl_jax.config import (
  DataConfig,
  Experiment,
  TrainConfig,
  UserError,
)
from edl_jax.text.batch import Batch, PackedRows
from edl_jax.text.documents import Document
from edl_jax.text.input_pipeline import (
  eval_batches,
  short_documents,
  train_dataset,
  train_iterator,
)
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.tokenizer import Tokenizer, byte_tokenizer

START = 256
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def texts(prefix, count):
  """Different texts, 10 to 29 bytes long, of digits but for the prefix."""
  rng = random.Random(prefix)
  return [
    prefix + "".join(rng.choices("0123456789", k=9 + n * 7 % 20))
    for n in range(count)
  ]


def make_corpus(train, held_out):
  def groups(by_domain):
    return tuple(
      tuple(Document(text, name, text) for text in own)
      for name, own in by_domain.items()
    )

  return Corpus(
    Taxonomy.from_names(list(train)), groups(train), groups(held_out), "hash"
  )


CORPUS = make_corpus(
  {"a": texts("a", 40), "b": texts("b", 25), "c": texts("c", 60)},
  {"a": texts("A", 20), "b": texts("B", 2), "c": texts("C", 7)},
)


def make_experiment(seed=0, weights=(), granularity="fine", data=(), **train):
  return Experiment(
    seed=seed,
    train=TrainConfig(**{"batch_size": 4, "sequence_length": 16} | train),
    data=DataConfig(
      tokenizer="byte",
      weights=weights,
      granularity=granularity,
      **dict(data),
    ),
  )


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert isinstance(batch, Batch) and isinstance(other, Batch)
    for name, array, expected in zip(Batch._fields, batch, other):
      np.testing.assert_array_equal(array, expected, err_msg=name)


# --- Training ----------------------------------------------------------------


def iterate(experiment, *process):
  return train_iterator(
    train_dataset(CORPUS, TOKENIZER, experiment)[0],
    experiment,
    len(CORPUS.taxonomy.fine),
    *process,
  )


def test_batches_have_the_declared_shapes_and_types():
  iterator = iterate(make_experiment())
  batch = next(iterator)
  assert batch.loss_weights_BT is None
  for name, array in zip(Batch._fields, batch[:-1]):
    assert array.shape == ((4,) if name == "domain_B" else (4, 16))
    assert array.dtype == (np.float32 if name == "weights_BT" else np.int32)
  assert (batch.weights_BT == 1).all()
  iterator.close()


def test_rows_hold_text_of_their_own_domain():
  dataset, _ = train_dataset(CORPUS, TOKENIZER, make_experiment())
  for i in range(100):
    row = dataset[i]
    letters = {chr(t) for t in row.tokens_BT if t < START} & set("abcABC")
    assert letters <= {"abc"[row.domain_B]}


def test_mixture_weights_are_met_in_every_window():
  experiment = make_experiment(weights=(1.0, 0.0, 3.0))
  dataset, _ = train_dataset(CORPUS, TOKENIZER, experiment)
  labels = [int(dataset[i].domain_B) for i in range(400)]
  for start in range(0, 400, 4):
    counts = collections.Counter(labels[start : start + 4])
    assert counts == {0: 1, 2: 3}


def test_every_epoch_has_every_row_once_in_a_new_order():
  experiment = make_experiment(weights=(0.0, 1.0, 0.0))
  dataset, _ = train_dataset(CORPUS, TOKENIZER, experiment)
  length = sum(len(text) + 1 for text in texts("b", 25)) // 16
  epochs = [
    [tuple(dataset[epoch * length + i].tokens_BT) for i in range(length)]
    for epoch in range(3)
  ]
  assert length > 10
  for epoch in epochs:
    assert len(set(epoch)) == length
    assert set(epoch) == set(epochs[0])
  assert len(set(map(tuple, epochs))) == 3


def test_rows_of_an_epoch_are_the_documents_in_some_order():
  experiment = make_experiment(weights=(0.0, 1.0, 0.0))
  dataset, _ = train_dataset(CORPUS, TOKENIZER, experiment)
  own = texts("b", 25)
  length = sum(len(text) + 1 for text in own) // 16
  seen = collections.Counter(
    int(t) for i in range(length) for t in dataset[i].tokens_BT
  )
  expected = collections.Counter([START] * len(own))
  for text in own:
    expected.update(text.encode())
  dropped = expected - seen
  assert not seen - expected
  assert dropped.total() == expected.total() - 16 * length < 16


def test_order_depends_on_the_seed():
  def rows(seed):
    dataset, _ = train_dataset(CORPUS, TOKENIZER, make_experiment(seed))
    return [tuple(dataset[i].tokens_BT) for i in range(30)]

  assert rows(1) == rows(1)
  assert rows(1) != rows(2)
  rows(-1)


def test_resume_is_exact_beyond_an_epoch():
  experiment = make_experiment(granularity="shuffled")
  iterator = iterate(experiment)
  start = iterator.get_state()
  before = take(iterator, 27)
  state = json.loads(json.dumps(iterator.get_state()))
  after = take(iterator, 40)

  resumed = iterate(experiment)
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert_equal(take(resumed, 40), after)
  # The same iterator can go back, whatever it has prefetched.
  iterator.set_state(start)
  assert_equal(take(iterator, 27), before)
  for each in (iterator, resumed):
    each.close()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(process_count):
  experiment = make_experiment(granularity="shuffled")
  whole = iterate(experiment)
  parts = [
    iterate(experiment, index, process_count) for index in range(process_count)
  ]
  for _ in range(12):
    batch, shares = next(whole), [next(part) for part in parts]
    for index, share in enumerate(shares):
      rows = Batch(*(array[index::process_count] for array in batch[:-1]))
      assert_equal([share], [rows])
  for each in (whole, *parts):
    each.close()


def test_shuffled_labels_are_uniform_and_deterministic():
  shuffled = make_experiment(granularity="shuffled")
  dataset, _ = train_dataset(CORPUS, TOKENIZER, shuffled)
  truth, _ = train_dataset(CORPUS, TOKENIZER, make_experiment())
  count = 900
  rows = [(dataset[i], truth[i]) for i in range(count)]
  for row, true in rows[:50]:
    assert_equal([row._replace(domain_B=0)], [true._replace(domain_B=0)])
  pairs = collections.Counter(
    (int(row.domain_B), int(true.domain_B)) for row, true in rows
  )
  # Nine equally likely pairs: independent of the true label. The standard
  # deviation of a count is sqrt(900 / 9 * 8 / 9) < 10.
  for label in range(3):
    for true_label in range(3):
      assert abs(pairs[label, true_label] - count / 9) < 50
  labels = [int(row.domain_B) for row, _ in rows]
  coarse = make_experiment(granularity="shuffled_coarse")
  again, _ = train_dataset(CORPUS, TOKENIZER, coarse)
  # By index, in any order; the step looks up their coarse labels.
  for i in (899, 5, 300):
    assert again[i].domain_B == labels[i]
  other, _ = train_dataset(
    CORPUS, TOKENIZER, make_experiment(seed=1, granularity="shuffled")
  )
  assert [int(other[i].domain_B) for i in range(50)] != labels[:50]


def test_coarse_granularity_keeps_fine_labels():
  coarse, _ = train_dataset(
    CORPUS, TOKENIZER, make_experiment(granularity="coarse")
  )
  fine, _ = train_dataset(CORPUS, TOKENIZER, make_experiment())
  assert_equal([coarse[i] for i in range(9)], [fine[i] for i in range(9)])


# Rows 0 to 39 of two domains, then of the third and one of them.
TWO_PHASES = make_experiment(
  weights=(1.0, 1.0, 0.0),
  data={"weight_phases": ((0.5, 1.0, 0.0, 3.0),)},
  num_steps=20,
)


def test_resume_is_exact_across_a_change_of_weights():
  iterator = iterate(TWO_PHASES)
  take(iterator, 8)
  state = json.loads(json.dumps(iterator.get_state()))
  after = take(iterator, 12)
  assert [sorted(batch.domain_B) for batch in after] == (
    [[0, 0, 1, 1]] * 2 + [[0, 2, 2, 2]] * 10
  )
  resumed = iterate(TWO_PHASES)
  resumed.set_state(state)
  assert_equal(take(resumed, 12), after)
  for each in (iterator, resumed):
    each.close()


def test_no_row_is_lost_or_repeated_where_weights_change():
  changed, _ = train_dataset(CORPUS, TOKENIZER, TWO_PHASES)
  alone, _ = train_dataset(
    CORPUS, TOKENIZER, make_experiment(weights=(1.0, 0.0, 0.0))
  )
  rows = [changed[i] for i in range(100)]
  own = [row for row in rows if row.domain_B == 0]
  assert len(own) == 20 + 15
  assert_equal(own, [alone[i] for i in range(len(own))])


def test_mixing_by_size():
  sizes = {"a": 40, "b": 25, "c": 60}
  totals = {
    "tokens": [sum(len(t) + 1 for t in texts(n, sizes[n])) for n in sizes],
    "bytes": [sum(map(len, texts(n, sizes[n]))) for n in sizes],
  }
  for mixing, total in totals.items():
    experiment = make_experiment(data={"mixing": mixing})
    dataset, _ = train_dataset(CORPUS, TOKENIZER, experiment)
    counts = collections.Counter(int(dataset[i].domain_B) for i in range(3000))
    for domain, size in enumerate(total):
      assert counts[domain] / 3000 == pytest.approx(
        size / sum(total), abs=0.003
      )


@pytest.mark.parametrize("granularity", ["fine", "shuffled"])
def test_rows_without_a_domain_train_and_are_not_evaluated(granularity):
  corpus = dataclasses.replace(
    CORPUS,
    taxonomy=dataclasses.replace(
      CORPUS.taxonomy,
      fine=("a", "b"),
      coarse=("a", "b"),
      parent=(0, 1),
      unlabelled=True,
    ),
  )
  experiment = make_experiment(granularity=granularity, eval_rows=-1)
  rows, _ = train_dataset(corpus, TOKENIZER, experiment)
  true, _ = train_dataset(CORPUS, TOKENIZER, make_experiment())
  for i in range(60):
    assert (rows[i].domain_B == -1) == (true[i].domain_B == 2)
    assert_equal([rows[i]._replace(domain_B=0)], [true[i]._replace(domain_B=0)])
  iterator = train_iterator(rows, experiment, 2, unlabelled=True)
  assert -1 in next(iterator).domain_B
  iterator.close()
  batches = eval_batches(corpus, TOKENIZER, experiment)
  whole = counted_tokens(eval_batches(CORPUS, TOKENIZER, experiment))
  assert counted_tokens(batches) == {
    key: count for key, count in whole.items() if key[0] != 2
  }


def test_a_thousand_sources_share_one_thread():
  names = [f"d{n}" for n in range(1000)]
  corpus = make_corpus(
    {name: [f"{name} {'x' * 20}"] for name in names},
    {name: ["y"] for name in names},
  )
  experiment = make_experiment()
  before = threading.active_count()
  iterator = train_iterator(
    train_dataset(corpus, TOKENIZER, experiment)[0], experiment, 1000
  )
  labels = [label for batch in take(iterator, 250) for label in batch.domain_B]
  assert sorted(labels) == list(range(1000))
  # One that reads rows, one that makes batches ahead, and one of Grain's own.
  assert threading.active_count() - before <= 3
  iterator.close()


# --- Evaluation --------------------------------------------------------------


def counted_tokens(batches):
  """(domain, target) of every position that counts."""
  return collections.Counter(
    (int(domain), int(target))
    for batch in batches
    for targets, weights, domain in zip(
      batch.targets_BT, batch.weights_BT, batch.domain_B
    )
    for target, weight in zip(targets, weights)
    if weight
  )


def test_evaluation_counts_every_held_out_byte_once():
  # Labels are the true ones even in the control with shuffled labels.
  experiment = make_experiment(eval_rows=-1, granularity="shuffled")
  batches = eval_batches(CORPUS, TOKENIZER, experiment)
  expected = collections.Counter()
  for domain, group in enumerate(CORPUS.held_out):
    for document in group:
      # The bytes, and the end of the document.
      expected.update((domain, byte) for byte in document.text.encode())
      expected[domain, START] += 1
  assert counted_tokens(batches) == expected
  for batch in batches:
    assert batch.tokens_BT.shape == (4, 16)
    np.testing.assert_array_equal(batch.segments_BT > 0, batch.weights_BT > 0)


def test_evaluation_rows_are_spread_and_do_not_depend_on_the_seed():
  every = eval_batches(CORPUS, TOKENIZER, make_experiment(eval_rows=-1))
  some = eval_batches(CORPUS, TOKENIZER, make_experiment(eval_rows=4))
  assert_equal(
    some, eval_batches(CORPUS, TOKENIZER, make_experiment(7, eval_rows=4))
  )

  def rows(batches, domain):
    return [
      tuple(tokens)
      for batch in batches
      for tokens, own, segments in zip(
        batch.tokens_BT, batch.domain_B, batch.segments_BT
      )
      if own == domain and segments.any()
    ]

  for domain in range(3):
    whole, part = rows(every, domain), rows(some, domain)
    assert len(part) == min(4, len(whole))
    places = [whole.index(row) for row in part]
    assert places == sorted(places)
    assert max(np.diff([*places, len(whole)])) <= -(-len(whole) // len(part))


def test_evaluation_is_shared_by_processes(monkeypatch):
  experiment = make_experiment(eval_rows=5)
  read = []
  read_row = PackedRows.__getitem__
  monkeypatch.setattr(
    PackedRows,
    "__getitem__",
    lambda rows, i: read.append((rows.domain, i)) or read_row(rows, i),
  )
  whole = eval_batches(CORPUS, TOKENIZER, experiment)
  every = read.copy()
  parts = []
  for p in range(2):
    read.clear()
    parts.append(eval_batches(CORPUS, TOKENIZER, experiment, p, 2))
    assert read == every[p::2]
  assert len(parts[0]) == len(parts[1]) == len(whole)
  for p, part in enumerate(parts):
    rows = [Batch(*(array[p::2] for array in batch[:-1])) for batch in whole]
    assert_equal(part, rows)


# --- Errors and cache --------------------------------------------------------


@pytest.mark.parametrize("label", [-1, 3])
def test_label_outside_the_taxonomy_is_an_error(label):
  experiment = make_experiment()
  rows, _ = train_dataset(CORPUS, TOKENIZER, experiment)
  rows = rows.map(lambda row: row._replace(domain_B=np.int32(label)))
  assert len(CORPUS.taxonomy.fine) == 3
  with pytest.raises(UserError, match=rf"domain label {label} .* \[0, 3\)"):
    next(train_iterator(rows, experiment, 3))


def test_domain_that_fills_no_row_is_named():
  corpus = make_corpus(
    {"a": ["x" * 99], "b": ["y" * 14]}, {"a": ["x"], "b": ["y"]}
  )
  experiment = make_experiment()
  with pytest.raises(UserError, match=r"'b' has 15 .*sequence_length=16"):
    train_dataset(corpus, TOKENIZER, experiment)
  # One more token is enough, and a domain of weight zero need not train.
  longer = make_corpus(
    {"a": ["x" * 99], "b": ["y" * 15]}, {"a": ["x"], "b": ["y"]}
  )
  rows, _ = train_dataset(longer, TOKENIZER, experiment)
  assert rows[1].domain_B == 1
  unused = make_experiment(weights=(1.0, 0.0))
  rows, _ = train_dataset(corpus, TOKENIZER, unused)
  assert rows[1].domain_B == 0


def test_rows_longer_than_every_document_are_told():
  def told(length):
    experiment = make_experiment(sequence_length=length)
    return short_documents(CORPUS, TOKENIZER, experiment)

  # The longest text of 29 bytes, and its start.
  assert told(30) == []
  (line,) = told(31)
  assert "sequence_length=31 is more than any" in line
  assert "longest: 30 tokens, in 'a'" in line


def test_batch_that_processes_cannot_share():
  experiment = make_experiment()
  for build in (
    lambda: iterate(experiment, 0, 3),
    lambda: eval_batches(CORPUS, TOKENIZER, experiment, 0, 3),
  ):
    with pytest.raises(UserError, match=r"batch_size=4 .* 3 processes"):
      build()


class CountingTokenizer(Tokenizer):
  """Counts the texts it encodes."""

  encoded = 0

  def encode_flat(self, texts):
    self.encoded += len(texts)
    return super().encode_flat(texts)


def test_tokens_are_cached_by_text_and_tokenizer(cache):
  tokenizer = CountingTokenizer.from_json(TOKENIZER.to_json())
  experiment = make_experiment()
  first, _ = train_dataset(CORPUS, tokenizer, experiment)
  assert tokenizer.encoded == 125
  again, _ = train_dataset(CORPUS, tokenizer, experiment)
  assert tokenizer.encoded == 125
  assert_equal([first[i] for i in range(20)], [again[i] for i in range(20)])
  # Damage is noticed and mended.
  (path,) = cache.iterdir()
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(content)
  mended, _ = train_dataset(CORPUS, tokenizer, experiment)
  assert tokenizer.encoded == 250
  assert_equal([first[i] for i in range(20)], [mended[i] for i in range(20)])
  # Other documents are other tokens, whatever the corpus calls itself.
  other = dataclasses.replace(CORPUS, train=CORPUS.train[::-1])
  train_dataset(other, tokenizer, experiment)
  assert tokenizer.encoded == 375
