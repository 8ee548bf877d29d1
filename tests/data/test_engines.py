"""Engines: the text from which a tokenizer learns. Others: test_prepare."""

import numpy as np

from data.engines import choose_sample
from data.plan import Plan
from edl_jax.text.taxonomy import Taxonomy


def plan_of(source_N, held_out_N, characters_N):
  """Returns a plan of records of which nothing else matters here."""
  return Plan(
    taxonomy=Taxonomy(("a", "b", "c"), ("a", "b", "c"), (0, 1, 2)),
    source_N=np.array(source_N),
    characters_N=np.array(characters_N),
    held_out_N=np.array(held_out_N, bool),
    confidence_N=np.ones(len(source_N), np.float32),
    origin_N=np.zeros((len(source_N), 32), np.uint8),
    begin=np.array([0, len(source_N)]),
    num_bytes=sum(characters_N),
    skipped={},
    bad={},
  )


def test_sample_is_all_training_text_where_that_is_short():
  plan = plan_of([1, 0, -1, 0, 1], [0, 0, 0, 1, 0], [5, 7, 0, 9, 3])
  # By source, then in order of reading; without the dropped and the held-out.
  assert choose_sample(plan, 100) == [(1, 7), (0, 5), (4, 3)]


def test_sample_has_as_many_characters_as_asked_for():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 20, 200)
  plan = plan_of(rng.integers(0, 3, 200), rng.random(200) < 0.2, lengths)
  chosen = choose_sample(plan, 500)
  assert sum(count for _, count in chosen) == 500
  cut = [n for n, count in chosen if count < lengths[n]]
  assert len(cut) <= 1 and all(0 < c <= lengths[n] for n, c in chosen)
  assert not any(plan.held_out_N[n] for n, _ in chosen)
  sources = plan.source_N[[n for n, _ in chosen]].tolist()
  assert sources == sorted(sources) and set(sources) == {0, 1, 2}
