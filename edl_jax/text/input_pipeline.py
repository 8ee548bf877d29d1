"""From tokens to batches: pack within a domain, mix, batch.

The mixture is a `grain.MapDataset`: row i depends on i and the seed alone. So
one number is the whole state of the input, a run resumes exactly, and each
process takes its rows of one global sequence.
"""

import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from edl_jax.config import Experiment, UserError
from edl_jax.text.batch import (
  Batch,
  ExampleRows,
  PackedRows,
  padding_row,
  stack,
)
from edl_jax.text.encode import encode_corpus
from edl_jax.text.mixture import (
  Corpus,
  EpochCounter,
  Phases,
  mix_phases,
  mixture_phases,
)
from edl_jax.text.prepared import PreparedCorpus
from edl_jax.text.token_stream import EncodedDocuments, TokenStream
from edl_jax.text.tokenizer import Tokenizer

# Batches that a background thread makes ahead.
_PREFETCHED_BATCHES = 8

# Random access to the rows of one domain.
Rows = PackedRows | ExampleRows


def train_dataset(
  corpus: Corpus | PreparedCorpus,
  tokenizer: Tokenizer,
  experiment: Experiment,
) -> tuple[grain.MapDataset[Batch], EpochCounter]:
  """Returns the endless sequence of training rows, and its epoch counter.

  Rows are Batches that lack the axis B. Each domain is shuffled anew in every
  epoch of its own. With a `data.granularity` of "shuffled" or "shuffled_coarse"
  a labelled row i gets a random fine label, which depends on i and the seed
  alone.

  Raises:
    UserError: a domain has less text than one row.
  """
  tokens = _documents(corpus, "train", tokenizer, experiment)
  phases = _phases(corpus, tokens, experiment)
  _check_lengths(corpus.taxonomy.sources, phases.in_use, tokens, experiment)
  datasets, rows_of = [], {}
  taxonomy = corpus.taxonomy
  for domain, (name, label) in enumerate(
    zip(taxonomy.sources, taxonomy.labels)
  ):
    documents = tokens[domain]
    seed = _seed(experiment, f"documents {domain}")
    order = np.random.default_rng(seed).permutation(len(documents))
    rows = _rows(documents[order], label, corpus, tokenizer, experiment)
    rows_of[name] = len(rows)
    # MapDataset.source(rows) would measure every array that it reads, which
    # takes longer than making the row.
    dataset = grain.MapDataset.range(len(rows))
    dataset = dataset.shuffle(_seed(experiment, f"rows {domain}"))
    datasets.append(dataset.repeat().map(rows.__getitem__))
  mixture = mix_phases(datasets, phases)
  if experiment.data.granularity.startswith("shuffled"):
    count = len(taxonomy.fine)

    def relabel(row: Batch, rng: np.random.Generator) -> Batch:
      label = np.int32(rng.integers(count))
      return row if row.domain_B < 0 else row._replace(domain_B=label)

    mixture = mixture.random_map(relabel, seed=_seed(experiment, "labels"))
  return mixture, EpochCounter(phases, rows_of)


def train_iterator(
  dataset: grain.MapDataset[Batch],
  experiment: Experiment,
  num_domains: int,
  process_index: int = 0,
  process_count: int = 1,
  unlabelled: bool = False,
) -> grain.DatasetIterator[Batch]:
  """Returns an endless iterator of NumPy batches, made in the background.

  Process p of P gets the rows p, p + P, ... of each global batch. The
  iterator's `get_state()` is a JSON object; `set_state` continues exactly
  there, in this process or in another.

  Args:
    dataset: rows, as `train_dataset` returns them.
    experiment: for its batch size.
    num_domains: D; labels lie in [0, D).
    process_index: p.
    process_count: P.
    unlabelled: whether rows may have the label -1, of no domain.

  Raises:
    UserError: the processes cannot share a batch evenly; on `next`, a domain
      label lies outside [0, D).
  """
  rows = _local_batch_size(experiment, process_count)
  dataset = dataset[process_index::process_count]

  def batch_of(rows: Sequence[Batch]) -> Batch:
    batch = stack(rows)
    for label in batch.domain_B:
      if not -unlabelled <= label < num_domains:
        raise UserError(
          f"domain label {label} of a training row: must lie in"
          f" [0, {num_domains}), the taxonomy's fine domains"
        )
    return batch

  dataset = dataset.batch(rows, drop_remainder=True, batch_fn=batch_of)
  options = grain.ReadOptions(
    num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES
  )
  return iter(dataset.to_iter_dataset(options))


def eval_batches(
  corpus: Corpus | PreparedCorpus,
  tokenizer: Tokenizer,
  experiment: Experiment,
  process_index: int = 0,
  process_count: int = 1,
) -> list[Batch]:
  """Returns batches of held-out rows of every domain, with their true labels.

  A domain gives at most `train.eval_rows` rows, spread evenly over its text and
  the same for every seed. Padding (weight and segment 0) fills up a domain's
  last row and the last batch, so that all held-out text can count. Text without
  a domain is not evaluated.

  Raises:
    UserError: the processes cannot share a batch evenly.
  """
  local_rows = _local_batch_size(experiment, process_count)
  places: list[tuple[Rows, int] | None] = []
  for packed in _packed_domains(corpus, "held_out", tokenizer, experiment):
    places += [(packed, row) for row in _spread(packed, experiment)]
  padding = padding_row(experiment.train.sequence_length, corpus.supervised)
  places += [None] * (-len(places) % experiment.train.batch_size)
  rows = [
    padding if place is None else place[0][place[1]]
    for place in places[process_index::process_count]
  ]
  return [
    stack(rows[start : start + local_rows])
    for start in range(0, len(rows), local_rows)
  ]


def held_out_rows(
  corpus: Corpus | PreparedCorpus, tokenizer: Tokenizer, experiment: Experiment
) -> list[list[Batch]]:
  """Returns the rows of `eval_batches` by fine domain, without padding rows.

  Rows are Batches that lack the axis B.
  """
  return [
    [packed[row] for row in _spread(packed, experiment)]
    for packed in _packed_domains(corpus, "held_out", tokenizer, experiment)
  ]


def calibration_rows(
  corpus: Corpus | PreparedCorpus,
  tokenizer: Tokenizer,
  experiment: Experiment,
  count: int,
) -> list[list[Batch]]:
  """Returns up to `count` rows of training text of every fine domain.

  They are drawn at random, the same for every seed of the experiment. The
  first rows are those of a smaller `count`. Rows are Batches that lack the
  axis B.
  """
  domains = _packed_domains(corpus, "train", tokenizer, experiment)
  return [
    [
      packed[int(row)]
      for row in np.random.default_rng(domain).permutation(len(packed))[:count]
    ]
    for domain, packed in enumerate(domains)
  ]


def _packed_domains(
  corpus: Corpus | PreparedCorpus,
  split: str,
  tokenizer: Tokenizer,
  experiment: Experiment,
) -> list[Rows]:
  """Returns all rows of a split by fine domain, in the order of the text."""
  documents = _documents(corpus, split, tokenizer, experiment)
  return [
    _rows(own, domain, corpus, tokenizer, experiment, keep_partial=True)
    for domain, own in enumerate(documents[: len(corpus.taxonomy.fine)])
  ]


def _documents(
  corpus: Corpus | PreparedCorpus,
  split: str,
  tokenizer: Tokenizer,
  experiment: Experiment,
) -> list[EncodedDocuments]:
  """Returns each source's documents, of supervised examples those that fit."""
  return [
    own
    if own.counted is None
    else own[own.length_I <= experiment.train.sequence_length]
    for own in encode_corpus(corpus, split, tokenizer)
  ]


def _rows(
  documents: EncodedDocuments,
  label: int,
  corpus: Corpus | PreparedCorpus,
  tokenizer: Tokenizer,
  experiment: Experiment,
  *,
  keep_partial: bool = False,
) -> Rows:
  """Returns the rows of a domain's documents."""
  length, start = experiment.train.sequence_length, tokenizer.document_start_id
  if documents.counted is not None:
    return ExampleRows(documents, length, start, label)
  return PackedRows(
    stream=TokenStream(documents, start),
    sequence_length=length,
    document_start_id=start,
    domain=label,
    keep_partial=keep_partial,
    supervised=corpus.supervised,
  )


def long_examples(
  corpus: Corpus | PreparedCorpus, tokenizer: Tokenizer, experiment: Experiment
) -> list[str]:
  """Returns lines about supervised examples that are longer than a row.

  Rows leave them out: a prompt without its end would teach nothing, and a
  completion without its end would teach to break off.

  Raises:
    UserError: a domain has no other examples.
  """
  if not corpus.supervised:
    return []
  length, lines = experiment.train.sequence_length, []
  for split in ("train", "held_out"):
    documents = encode_corpus(corpus, split, tokenizer)
    for name, own in zip(corpus.taxonomy.sources, documents):
      if own.counted is None or not len(own):
        continue
      sizes = own.length_I
      count = int((sizes > length).sum())
      if count == len(own):
        raise UserError(
          f"domain {name!r}: each of its {split} examples is longer than"
          f" train.sequence_length={length} (the shortest: {sizes.min()}"
          " tokens); lengthen the rows, or leave the domain out"
        )
      if count:
        lines.append(
          f"left out {count:,} of {len(own):,} {split} examples of {name!r}:"
          f" longer than train.sequence_length={length} (the longest:"
          f" {sizes.max():,} tokens)"
        )
  return lines


def short_documents(
  corpus: Corpus | PreparedCorpus, tokenizer: Tokenizer, experiment: Experiment
) -> list[str]:
  """Returns a line if no training document is as long as a row, or none.

  Rows then hold several documents each, and attention stays within a document.
  """
  length = experiment.train.sequence_length
  documents = encode_corpus(corpus, "train", tokenizer)
  longest_of = {
    # The start token counts as part of a document.
    name: int(own.length_I.max()) + 1
    for name, own in zip(corpus.taxonomy.sources, documents)
    if own.counted is None and len(own)
  }
  name = max(longest_of, key=longest_of.__getitem__, default="")
  if not name or longest_of[name] >= length:
    return []
  return [
    f"train.sequence_length={length:,} is more than any training document has"
    f" (the longest: {longest_of[name]:,} tokens, in {name!r}): rows hold"
    " several, and attention stays within each"
  ]


def _spread(packed: Rows, experiment: Experiment) -> list[int]:
  """Returns at most `train.eval_rows` rows, spread evenly over the text."""
  count = len(packed)
  if experiment.train.eval_rows != -1:
    count = min(count, experiment.train.eval_rows)
  return [i * len(packed) // count for i in range(count)]


def _local_batch_size(experiment: Experiment, process_count: int) -> int:
  rows, remainder = divmod(experiment.train.batch_size, process_count)
  if remainder:
    raise UserError(
      f"train.batch_size={experiment.train.batch_size} is not a multiple of"
      f" the {process_count} processes"
    )
  return rows


def _seed(experiment: Experiment, purpose: str) -> int:
  """Derives a 32-bit seed from the experiment's.

  Grain shuffles epoch n with seed + n. Seeds close to each other would repeat
  each other's epochs, so the seed is hashed.
  """
  digest = hashlib.sha256(f"{experiment.seed} {purpose}".encode()).digest()
  return int.from_bytes(digest[:4], "big")


def _phases(
  corpus: Corpus | PreparedCorpus,
  tokens: Sequence[EncodedDocuments],
  experiment: Experiment,
) -> Phases:
  data = experiment.data
  sizes: list[int] = []
  if data.mixing == "tokens":
    sizes = [documents.token_count for documents in tokens]
  elif data.mixing == "bytes":
    sizes = corpus.train_bytes()
  return mixture_phases(data, experiment.train, corpus.taxonomy, sizes)


def _check_lengths(
  names: Sequence[str],
  in_use: Sequence[bool],
  tokens: Sequence[EncodedDocuments],
  experiment: Experiment,
) -> None:
  """Checks that domains in use fill a row.

  Raises:
    UserError: one does not.
  """
  length = experiment.train.sequence_length
  # Supervised examples are packed as a whole; see `long_examples`.
  used = {
    name: documents
    for name, is_used, documents in zip(names, in_use, tokens)
    if is_used and documents.counted is None
  }
  # The start token counts as part of a document.
  for name, documents in used.items():
    if documents.token_count < length:
      raise UserError(
        f"domain {name!r} has {documents.token_count} training tokens, less"
        f" than one row of train.sequence_length={length}; add text or shorten"
        " the rows"
      )
