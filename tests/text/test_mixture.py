import collections
import dataclasses
import itertools
import json

import grain
import pytest

from edl_jax.config import DataConfig, TrainConfig, UserError
from edl_jax.text.mixture import (
  EpochCounter,
  Phases,
  Taxonomy,
  load_corpus,
  mix,
  mix_phases,
  mixture_phases,
  mixture_weights,
)


def load(path, texts_by_domain, origin=None, **options):
  """Loads a corpus of texts through a file at `path`."""
  records = [
    {"text": text, "domain": domain}
    | ({"origin": origin(text)} if origin else {})
    for domain, texts in texts_by_domain.items()
    for text in texts
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return load_corpus(DataConfig(files=str(path), **options))


def numbered(prefix, count):
  return [f"{prefix} {n}" for n in range(count)]


def origins(groups):
  return {document.origin for group in groups for document in group}


def test_taxonomy():
  taxonomy = Taxonomy.from_names(["code/c", "math", "code/python"])
  assert taxonomy.fine == ("c", "math", "python")
  assert taxonomy.coarse == ("code", "math")
  assert taxonomy.parent == (0, 1, 0)
  saved = json.loads(json.dumps(taxonomy.to_dict()))
  assert Taxonomy.from_dict(saved) == taxonomy


def test_split_holds_out_whole_origins(tmp_path):
  corpus = load(
    tmp_path / "a",
    {"g/a": numbered("a", 1000), "g/b": numbered("b", 1000)},
    # Five texts an origin, over both domains.
    origin=lambda text: f"book {int(text.split()[1]) // 5}",
    held_out_fraction=0.2,
  )
  assert not origins(corpus.train) & origins(corpus.held_out)
  assert len(origins(corpus.train) | origins(corpus.held_out)) == 200
  for train, held_out in zip(corpus.train, corpus.held_out):
    assert len(train) + len(held_out) == 1000
    # Standard deviation of the number of origins: sqrt(200 * 0.2 * 0.8) < 6.
    assert abs(len(held_out) / 5 - 40) < 24


def test_split_of_a_text_does_not_depend_on_the_others(tmp_path):
  few = load(tmp_path / "a", {"a": numbered("a", 200)})
  many = load(tmp_path / "b", {"a": numbered("a", 400), "b": numbered("b", 9)})
  kept = {d.text for d in few.held_out[0]}
  assert 1 < len(kept) < 50
  now = {d.text for d in many.held_out[0]}
  assert now & set(numbered("a", 200)) == kept


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_small_domains_have_both_sides(tmp_path, fraction):
  corpus = load(
    tmp_path / "a",
    {"a": numbered("a", 2), "b": numbered("b", 3)},
    held_out_fraction=fraction,
  )
  for train, held_out in zip(corpus.train, corpus.held_out):
    assert train and held_out
    # Only one was moved against its hash.
    assert len(held_out if fraction < 0.5 else train) == 1


def test_a_greater_fraction_holds_out_more_of_the_same(tmp_path):
  held_out = [
    load(
      tmp_path / "a", {"a": numbered("a", 20)}, held_out_fraction=fraction
    ).held_out[0]
    for fraction in (1e-9, 0.3, 0.6, 1 - 1e-9)
  ]
  assert [len(held_out[0]), len(held_out[-1])] == [1, 19]
  for few, more in itertools.pairwise(held_out):
    assert set(few) < set(more)


def test_forced_choice_holds_in_every_domain(tmp_path):
  # All domains share their only two origins.
  texts = {d: numbered(d, 2) for d in "abc"}
  corpus = load(tmp_path / "a", texts, origin=lambda text: text.split()[1])
  assert not origins(corpus.train) & origins(corpus.held_out)
  assert all(len(group) == 1 for group in corpus.train + corpus.held_out)


def test_domain_with_one_origin_is_refused(tmp_path):
  with pytest.raises(UserError, match="domain 'b' has too few documents"):
    load(tmp_path / "a", {"a": numbered("a", 50), "b": ["only"]})


def test_content_hash(tmp_path):
  texts = {"a": numbered("a", 9), "b": numbered("b", 9)}
  same = load(tmp_path / "a", texts).content_hash
  assert load(tmp_path / "b", texts).content_hash == same
  other_split = load(tmp_path / "d", texts, held_out_fraction=0.5)
  assert other_split.content_hash == same
  for changed in (
    # Rows follow from the order too.
    {"a": texts["a"][::-1], "b": texts["b"]},
    {"a": [*texts["a"], "more"], "b": texts["b"]},
    {"a": texts["b"], "b": texts["a"]},
    {"a": texts["a"], "c": texts["b"]},
    {"g/a": texts["a"], "b": texts["b"]},
  ):
    assert load(tmp_path / "e", changed).content_hash != same


def test_mixture_weights():
  taxonomy = Taxonomy.from_names(["a", "b", "c", "d"])
  assert mixture_weights(DataConfig(), taxonomy) == (0.25,) * 4
  data = DataConfig(weights=(1.0, 0.0, 2.0, 1.0))
  assert mixture_weights(data, taxonomy) == (0.25, 0.0, 0.5, 0.25)
  data = dataclasses.replace(data, weights=(1.0, 2.0))
  with pytest.raises(UserError, match="2 entries for 4 domains: a, b, c, d"):
    mixture_weights(data, taxonomy)


def test_taxonomy_file_names_domains_and_weights(tmp_path):
  taxonomy = tmp_path / "taxonomy.yaml"
  taxonomy.write_text(
    "domains: [{fine: b, weight: 3}, {fine: a, coarse: g}]\nunlabelled: true"
  )
  texts = {"h/a": numbered("a", 50), "b": numbered("b", 50)}
  options = {"taxonomy": str(taxonomy), "held_out_fraction": 0.3}
  corpus = load(tmp_path / "t", texts, **options)
  # The file has the last word on parents; no row here lacks a domain.
  assert corpus.taxonomy.names == ("b", "g/a")
  assert corpus.taxonomy.weights == (3, 1)
  assert not corpus.taxonomy.unlabelled
  assert corpus.train[1][0].text.startswith("a ")
  shares = mixture_weights(DataConfig(), corpus.taxonomy)
  assert shares == (0.75, 0.25)
  assert mixture_weights(DataConfig(weights=(1.0, 1.0)), corpus.taxonomy) == (
    0.5,
    0.5,
  )

  rest = load(tmp_path / "t", texts | {"": numbered("u", 50)}, **options)
  assert rest.taxonomy.sources == ("b", "a", "unlabelled")
  assert rest.taxonomy.weights == (3, 1, 1)
  assert {d.text for d in rest.train[2] + rest.held_out[2]} == set(
    numbered("u", 50)
  )
  # What has a domain is split as if the others were not there.
  assert rest.train[:2] == corpus.train
  assert rest.content_hash != corpus.content_hash
  with pytest.raises(UserError, match=r"t:1: unknown domain 'c'; .* b, g/a"):
    load(tmp_path / "t", {"c": ["x"]}, **options)


def test_few_unlabelled_documents_need_no_held_out_part(tmp_path):
  taxonomy = tmp_path / "taxonomy.yaml"
  taxonomy.write_text("domains: [{fine: a}]\nunlabelled: true")
  texts = {"a": numbered("a", 9), "unlabelled": ["u"]}
  corpus = load(
    tmp_path / "t", texts, taxonomy=str(taxonomy), held_out_fraction=1e-9
  )
  assert [len(group) for group in corpus.train] == [8, 1]
  with pytest.raises(
    UserError, match=r"need a data\.taxonomy with 'unlabelled"
  ):
    load(tmp_path / "t", texts)


def test_shares_by_size():
  taxonomy = Taxonomy.from_names(["a", "b", "c"])
  sizes = (1000, 10, 90)

  def shares(**options):
    return mixture_weights(DataConfig(**options), taxonomy, sizes)

  assert shares() == (1 / 3,) * 3
  assert shares(mixing="tokens") == pytest.approx([10 / 11, 0.1 / 11, 0.9 / 11])
  # Square roots: 10 sqrt(10), sqrt(10), 3 sqrt(10).
  warm = shares(mixing="bytes", temperature=2.0)
  assert warm == pytest.approx([10 / 14, 1 / 14, 3 / 14])
  # Weights multiply.
  weighted = shares(mixing="bytes", temperature=2.0, weights=(0.1, 3.0, 0.0))
  assert weighted == pytest.approx([1 / 4, 3 / 4, 0])


def drawn(weights, count):
  """Which source each of the first `count` examples of a mixture is from."""
  datasets = [
    grain.MapDataset.source([name]).repeat() for name in range(len(weights))
  ]
  mixture = mix(datasets, weights)
  return [mixture[i] for i in range(count)]


@pytest.mark.parametrize(
  ("weights", "window"),
  [
    ((1 / 6,) * 6, 6),
    # In floating point 2/3 is less than twice 1/3.
    ((1 / 3, 2 / 3), 3),
    ((0.5, 0.3, 0.2), 10),
    ((0.1, 0.0, 0.9), 10),
    ((0.01, 0.99), 100),
    ((0.02, 0.05, 0.93), 100),
    # In floating point 1.15 is less than 115 hundredths.
    ((100 / 215, 115 / 215), 215),
  ],
)
def test_proportions_are_exact_in_every_window(weights, window):
  sources = drawn(weights, 20 * window)
  for start in range(0, len(sources), window):
    counts = collections.Counter(sources[start : start + window])
    for name, weight in enumerate(weights):
      assert counts[name] == pytest.approx(weight * window)


def test_uneven_proportions_are_close():
  weights = (0.123, 0.456, 0.421)
  counts = collections.Counter(drawn(weights, 10_000))
  for name, weight in enumerate(weights):
    assert counts[name] / 10_000 == pytest.approx(weight, abs=2e-3)


def test_each_source_is_read_in_order():
  numbers = [grain.MapDataset.range(100), grain.MapDataset.range(1000, 1100)]
  mixture = mix(numbers, (0.25, 0.75))
  read = [mixture[i] for i in range(len(mixture))]
  few = [n for n in read if n < 1000]
  many = [n for n in read if n >= 1000]
  assert few == list(range(len(few)))
  assert many == list(range(1000, 1000 + len(many)))
  assert (len(few), len(many)) == (34, 99)


PHASES = Phases(
  starts=(0, 37, 40, 500),
  weights=(
    (0.5, 0.5, 0.0),
    (0.0, 0.0, 1.0),
    (0.123, 0.456, 0.421),
    (0.01, 0.0, 0.99),
  ),
)


def test_phases_follow_each_other_without_a_gap():
  sources = [
    # Endless, as training data are.
    grain.MapDataset.range(10**6 * n, 10**6 * n + 10**5).repeat()
    for n in range(3)
  ]
  mixture = mix_phases(sources, PHASES)
  rows = [divmod(int(mixture[i]), 10**6) for i in range(1200)]
  for source in range(3):
    places = [place for own, place in rows if own == source]
    assert places == list(range(len(places)))
  for start, end, weights in zip(
    PHASES.starts, (*PHASES.starts[1:], 1200), PHASES.weights
  ):
    alone = drawn(weights, end - start)
    assert [own for own, _ in rows[start:end]] == alone
  # Processes take their rows of the same sequence.
  assert [divmod(int(n), 10**6) for n in mixture[1::3][:50]] == rows[1:151:3]


def test_rows_drawn_are_counted_without_drawing_them():
  mixture = mix_phases(
    [grain.MapDataset.source([n]).repeat() for n in range(3)], PHASES
  )
  seen = [0, 0, 0]
  for count in range(800):
    assert PHASES.drawn(count) == tuple(seen)
    seen[mixture[count]] += 1
  assert PHASES.in_use == (True, True, True)
  assert Phases((0,), ((1.0, 0.0),)).in_use == (True, False)


def test_phases_begin_with_a_step():
  data = DataConfig(
    weights=(1.0, 1.0),
    weight_phases=((0.5, 3.0, 1.0), (0.501, 1.0, 3.0), (0.9, 0.0, 1.0)),
  )
  train = TrainConfig(num_steps=100, batch_size=8)
  phases = mixture_phases(data, train, Taxonomy.from_names(["a", "b"]))
  assert phases.starts == (0, 400, 720)
  assert phases.weights == ((0.5, 0.5), (0.25, 0.75), (0.0, 1.0))
  short = dataclasses.replace(data, weight_phases=((0.5, 3.0),))
  with pytest.raises(UserError, match="phase 1 has 1 entries for 2 domains"):
    mixture_phases(short, train, Taxonomy.from_names(["a", "b"]))


def test_epochs_are_counted():
  lengths = {"a": 30, "b": 17, "c": 41}
  counter = EpochCounter(PHASES, lengths)
  mixture = mix_phases(
    [grain.MapDataset.source([n]).repeat() for n in range(3)], PHASES
  )
  seen = dict.fromkeys(lengths, 0)
  said = 0
  for count in range(400):
    epochs = counter.at(count)
    assert epochs == {name: seen[name] / lengths[name] for name in lengths}
    name = "abc"[mixture[count]]
    # Whether this row is the first of another epoch.
    repeats, within = divmod(seen[name], lengths[name])
    seen[name] += 1
    lines = counter.repeats(count, count + 1)
    if repeats and not within and repeats.bit_count() == 1:
      assert len(lines) == 1
      assert lines[0].startswith(f"{name}: read {repeats} time(s)")
      said += 1
    else:
      assert lines == []
  assert said > 2


def test_sources_that_begin_an_epoch_together_share_a_line():
  counter = EpochCounter(
    Phases((0,), ((0.5, 0.0, 0.5),)), dict.fromkeys("abc", 9)
  )
  (line,) = counter.repeats(0, 2 * 9 + 2)
  assert line.startswith("a, c: read 1 time(s)")


@pytest.mark.parametrize(
  "weights", [(5e-324, 1.0), (1e308, 1e308), (1e-12, 1.0)]
)
def test_weights_that_no_row_can_follow_are_refused(weights):
  taxonomy = Taxonomy.from_names(["a", "b"])
  with pytest.raises(UserError, match=r"data\.weights: the shares of"):
    mixture_weights(DataConfig(weights=weights), taxonomy)
  assert mixture_weights(DataConfig(weights=(1e-6, 1.0)), taxonomy)[1] < 1


def test_a_temperature_that_leaves_one_domain_is_refused():
  data = DataConfig(mixing="bytes", temperature=1e-3)
  with pytest.raises(UserError, match=r"raise data\.temperature"):
    mixture_weights(data, Taxonomy.from_names(["a", "b"]), [10, 1000])
