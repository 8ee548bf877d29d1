"""What the atlas collects equals naive counts over tokens, one by one."""

import collections
import math

import jax
import numpy as np
import pytest

from edl_jax import config
from edl_jax.analysis import atlas_data
from edl_jax.checkpoint import Loaded
from edl_jax.evaluate import make_eval_step, summarize
from edl_jax.losses import routing
from edl_jax.model.transformer import Model
from edl_jax.text.input_pipeline import eval_batches
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import byte_tokenizer

EXPERIMENT = config.Experiment(
  model=config.ModelConfig(
    vocabulary_size=257,
    num_layers=4,
    num_dense_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    num_experts=5,
    num_active_experts=2,
    expert_width=8,
    dense_width=16,
  ),
  train=config.TrainConfig(batch_size=4, sequence_length=32, eval_rows=3),
  data=config.DataConfig(
    tokenizer="byte",
    domains=("python_source", "unicode", "legal"),
    max_characters_per_domain=20_000,
  ),
)


@pytest.fixture(scope="module")
def run():
  """An untrained run whose routers are far from uniform, and its text."""
  corpus = load_corpus(EXPERIMENT.data)
  model = jax.jit(Model, static_argnums=0)(EXPERIMENT.model, jax.random.key(0))
  router = model.blocks.moe.router_ME
  router[...] = 4 * router[...]
  loaded = Loaded(
    model=model,
    tokenizer=byte_tokenizer(),
    taxonomy=corpus.taxonomy,
    experiment=EXPERIMENT,
    step=7,
    content_hash=corpus.content_hash,
  )
  return loaded, corpus


@pytest.fixture(scope="module")
def collected(run):
  return atlas_data.collect(*run, "name")


@pytest.fixture(scope="module")
def tokens(run):
  """Every counted token: its id, domain, context, experts and probabilities.

  Each document's part of a row runs through `token_routing` on its own.
  """
  loaded, corpus = run
  route = jax.jit(Model.token_routing)
  found = []
  for batch in eval_batches(corpus, loaded.tokenizer, EXPERIMENT):
    for row in range(len(batch.domain_B)):
      segments_T = batch.segments_BT[row]
      for segment in range(1, segments_T.max(initial=0) + 1):
        ids_T = batch.tokens_BT[row][segments_T == segment]
        # Padding after the text changes nothing before it.
        padded_T = np.pad(ids_T, (0, 32 - len(ids_T)))
        probs_LTE, expert_LTA = (
          np.asarray(x)[:, 0, : len(ids_T)]
          for x in route(loaded.model, padded_T[None])
        )
        for t, token in enumerate(ids_T.tolist()):
          low = max(t - atlas_data.CONTEXT_TOKENS, 0)
          near = ids_T[low : t + atlas_data.CONTEXT_TOKENS + 1].tolist()
          found.append(
            (
              token,
              int(batch.domain_B[row]),
              (tuple(near), t - low),
              expert_LTA[:, t],
              probs_LTE[:, t],
            )
          )
  return found


def test_counts_by_domain_and_pairs(collected, tokens):
  num_layers, num_domains, num_experts = 3, 3, 5
  tokens_D = np.zeros(num_domains, int)
  count_LDE = np.zeros((num_layers, num_domains, num_experts), int)
  together_LEE = np.zeros((num_layers, num_experts, num_experts), int)
  next_LEE = np.zeros((num_layers - 1, num_experts, num_experts), int)
  for _, domain, _, expert_LA, _ in tokens:
    tokens_D[domain] += 1
    for layer in range(num_layers):
      for e in expert_LA[layer]:
        count_LDE[layer, domain, e] += 1
        for f in expert_LA[layer]:
          together_LEE[layer, e, f] += 1
        if layer + 1 < num_layers:
          for f in expert_LA[layer + 1]:
            next_LEE[layer, e, f] += 1
  assert tokens_D.min() > 0
  np.testing.assert_array_equal(collected.tokens_D, tokens_D)
  np.testing.assert_array_equal(collected.assignments_LDE, count_LDE)
  np.testing.assert_array_equal(collected.together_LEE, together_LEE)
  np.testing.assert_array_equal(collected.next_LEE, next_LEE)
  assert collected.layers == [1, 2, 3]
  assert (collected.name, collected.step) == ("name", 7)


def test_tokens_that_an_expert_takes_most(collected, tokens):
  for layer in range(3):
    count = collections.Counter()
    for token, _, _, expert_LA, _ in tokens:
      count.update((token, int(e)) for e in expert_LA[layer])
    total = sum(count.values())
    of_token, of_expert = collections.Counter(), collections.Counter()
    for (token, e), n in count.items():
      of_token[token] += n
      of_expert[e] += n
    for e in range(5):
      own = {token: n for (token, other), n in count.items() if other == e}
      score = {
        token: n * math.log(n * total / of_token[token] / of_expert[e])
        for token, n in own.items()
      }
      for got, rank in (
        (collected.frequent[layer][e], own),
        (collected.typical[layer][e], score),
      ):
        positive = [x for x in sorted(rank.values())[::-1] if x > 1e-9]
        assert len(got) == min(len(positive), atlas_data.TOP_TOKENS)
        # Tokens of equal rank may come in any order.
        np.testing.assert_allclose(
          [rank[token] for token, _ in got], positive[: len(got)]
        )
        assert [n for _, n in got] == [own[token] for token, _ in got]


def test_contexts_of_highest_probability(collected, tokens):
  for layer in range(3):
    for e in range(5):
      best = {}
      for _, domain, context, expert_LA, probs_LE in tokens:
        if e in expert_LA[layer]:
          key = (domain, *context)
          best[key] = max(best.get(key, 0), float(probs_LE[layer, e]))
      want = sorted(best.values())[::-1][: atlas_data.TOP_CONTEXTS]
      got = collected.contexts[layer][e]
      np.testing.assert_allclose(
        [context.probability for context in got], want, rtol=1e-4
      )
      for context in got:
        np.testing.assert_allclose(
          best[context[1:]], context.probability, rtol=1e-4
        )


def test_examples_are_the_first_tokens_of_each_domain(collected, tokens):
  for domain, example in enumerate(collected.examples):
    own = [each for each in tokens if each[1] == domain]
    own = own[: len(example.tokens_T)]
    assert len(own) == 32
    assert example.tokens_T.tolist() == [token for token, *_ in own]
    np.testing.assert_array_equal(
      example.expert_LTA, np.stack([each[3] for each in own], 1)
    )
    want_LTA = np.take_along_axis(
      np.stack([each[4] for each in own], 1), example.expert_LTA, -1
    )
    np.testing.assert_allclose(example.probability_LTA, want_LTA, rtol=1e-4)


def test_text_of_every_token_that_is_named(run, collected):
  named = {t for each in collected.examples for t in each.tokens_T.tolist()}
  for layer in range(3):
    for e in range(5):
      named.update(t for t, _ in collected.frequent[layer][e])
      named.update(t for t, _ in collected.typical[layer][e])
      for context in collected.contexts[layer][e]:
        named.update(context.tokens)
  assert collected.token_texts == {
    token: run[0].tokenizer.token_text(token) for token in named
  }


def test_figures_by_layer_are_those_of_the_evaluation(run, collected):
  loaded, corpus = run
  step = make_eval_step(3, loaded.tokenizer)
  sums = [
    step(loaded.model, batch)
    for batch in eval_batches(corpus, loaded.tokenizer, EXPERIMENT)
  ]
  total = jax.tree.map(lambda *x: sum(x), *sums)
  evaluation = summarize(total, corpus.taxonomy, 1)
  for name, x_L in collected.metrics.items():
    if name not in ("inter", "token_information"):
      want = [layer[name] for layer in evaluation.routing["layers"]]
      np.testing.assert_allclose(x_L, want, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(
    collected.divergence_LDD,
    evaluation.report["pairwise_divergence"],
    rtol=1e-4,
    atol=1e-7,
  )


def _entropy(counts):
  shares = np.array(list(counts.values()), np.float64)
  shares /= shares.sum()
  return -(shares * np.log(shares)).sum()


def test_mutual_information_of_token_and_expert(collected, tokens):
  for layer in range(3):
    both, of_token, of_expert = (collections.Counter() for _ in range(3))
    for token, _, _, expert_LA, _ in tokens:
      for e in expert_LA[layer].tolist():
        both[token, e] += 1
        of_token[token] += 1
        of_expert[e] += 1
    apart = _entropy(of_token) + _entropy(of_expert)
    want = 2 * (apart - _entropy(both)) / apart
    assert want > 0.05
    np.testing.assert_allclose(
      collected.metrics["token_information"][layer], want, rtol=1e-4
    )


def test_chunks_and_their_padding_change_nothing(run, collected, monkeypatch):
  # Two rows at a time, the last alone with padding.
  monkeypatch.setattr(atlas_data, "_CHUNK_ELEMENTS", 2 * 4 * 5 * 32)
  again = atlas_data.collect(*run, "name")
  for field in ("assignments_LDE", "together_LEE", "next_LEE", "tokens_D"):
    np.testing.assert_array_equal(
      getattr(again, field), getattr(collected, field)
    )
  assert again.frequent == collected.frequent
  assert again.typical == collected.typical


def test_only_the_most_frequent_tokens_are_listed(run, tokens, monkeypatch):
  monkeypatch.setattr(routing, "COUNTED_TOKENS", 10)
  few = atlas_data.collect(*run, "name")
  # Among equally frequent tokens those of the lowest ids.
  count = sorted(collections.Counter(t for t, *_ in tokens).items())
  counted = sorted(count, key=lambda pair: -pair[1])[:10]
  allowed = {token for token, _ in counted}
  for layer in range(3):
    for e in range(5):
      own = collections.Counter(
        token
        for token, _, _, expert_LA, _ in tokens
        if token in allowed and e in expert_LA[layer]
      )
      want = sorted(own.values())[::-1][: atlas_data.TOP_TOKENS]
      assert [n for _, n in few.frequent[layer][e]] == want
      assert all(own[token] == n for token, n in few.frequent[layer][e])


def test_classical_scaling_recovers_points_of_a_plane():
  random = np.random.default_rng(0)
  point_D2 = random.normal(size=(7, 2))
  distance_DD = np.linalg.norm(point_D2[:, None] - point_D2, axis=-1)
  got_D2, share = atlas_data.classical_scaling(distance_DD)
  np.testing.assert_allclose(
    np.linalg.norm(got_D2[:, None] - got_D2, axis=-1), distance_DD, atol=1e-9
  )
  assert share == pytest.approx(1)
  # Each axis points to its largest coordinate.
  assert (got_D2.max(0) == np.abs(got_D2).max(0)).all()
  turned_D2 = atlas_data.turned_to(got_D2, point_D2 - point_D2.mean(0))
  np.testing.assert_allclose(turned_D2, point_D2 - point_D2.mean(0), atol=1e-9)


def test_classical_scaling_of_more_dimensions_says_what_it_holds():
  # Corners of a regular simplex: three equal eigenvalues, of which two show.
  distance_DD = 1.0 - np.eye(4)
  _, share = atlas_data.classical_scaling(distance_DD)
  assert share == pytest.approx(2 / 3)
  point_D2, share = atlas_data.classical_scaling(np.zeros((3, 3)))
  assert share == 1
  np.testing.assert_array_equal(point_D2, 0)
  point_D2, _ = atlas_data.classical_scaling(np.zeros((1, 1)))
  assert point_D2.shape == (1, 2)


def test_maps_lie_alike_across_layers():
  random = np.random.default_rng(1)
  point_D2 = random.normal(size=(6, 2))
  square_DD = np.square(point_D2[:, None] - point_D2).sum(-1)
  map_LD2, shares = atlas_data.domain_maps(np.stack([square_DD, 4 * square_DD]))
  np.testing.assert_allclose(map_LD2[2], 2 * map_LD2[1], atol=1e-8)
  assert shares == pytest.approx([1, 1, 1])
  mirrored_D2 = map_LD2[0] * [-1, 1]
  again_LD2, _ = atlas_data.domain_maps(square_DD[None], mirrored_D2)
  np.testing.assert_allclose(again_LD2[0], map_LD2[1] * [-1, 1], atol=1e-8)


def test_effective_share():
  assert atlas_data.effective_share(np.array([3, 3, 3, 3])) == pytest.approx(1)
  assert atlas_data.effective_share(np.array([3, 3, 0, 0])) == pytest.approx(
    0.5
  )
  assert atlas_data.effective_share(np.array([5, 0, 0, 0])) == 0.25
