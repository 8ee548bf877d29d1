"""What tasks.json says, against one text at a time in float64."""

import math

import jax
import numpy as np
import pytest
import tokenizers

from edl_jax import sharding
from edl_jax.config import MeshConfig, UserError
from edl_jax.tasks.evaluation import encode_tasks, evaluate_tasks, table
from edl_jax.tasks.routing import DomainRouting
from edl_jax.tasks.selection import Selected
from edl_jax.text.task_files import Task, TaskDocument
from edl_jax.text.tokenizer import Tokenizer, byte_tokenizer
from tests.tasks import naive

# One document has a context that is too long, and one a long continuation.
CLOZE = (
  TaskDocument("a", ("2 + 2 =",) * 2, (" 4", " 5"), 0, "="),
  TaskDocument("b", ("the sky above is",) * 3, (" blue", " o", " x"), 0, "is"),
  TaskDocument("c", ("1 + 1 =",) * 2, (" 5", " 2"), 1, "="),
)
# The choices differ in the context.
CONTEXTS = (TaskDocument("1", ("he", "she"), (" ran",) * 2, 1),)
GOLD = (
  TaskDocument("x", ("def f():",), ("é = 1",), 0),
  TaskDocument("y", ("",), ("a continuation too long",), 0),
)
DOMAINS = DomainRouting(
  ["law", "code"], np.array([[[0.7, 0.1, 0.1, 0.1], [0.25] * 4]])
)


def selected(name, form, documents):
  task = Task(name, form, "g", 0, "none", documents)
  return Selected(task, 9, f"sha of {name}")


SELECTED = {
  "cloze.rc": selected("cloze", "rc", CLOZE),
  "contexts.rc": selected("contexts", "rc", CONTEXTS),
  "gold.bpb": selected("gold", "bpb", GOLD),
}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.fixture(scope="module")
def model(mesh):
  shardings = sharding.parameter_shardings(naive.make_model(), mesh)
  return jax.device_put(naive.make_model(), shardings)


@pytest.fixture(scope="module")
def encoded():
  return encode_tasks(SELECTED, byte_tokenizer(), naive.LENGTH)


@pytest.fixture(scope="module")
def result(model, encoded, mesh):
  # Without the question, the same answer is scored once.
  assert len(encoded.windows) == 7 + 3 + 3 + 2 + 2
  return evaluate_tasks(model, encoded, mesh, 64, DOMAINS)


def plain(document):
  """Returns the figures of a cloze document."""
  size = [len(c.encode()) for c in document.continuations]
  nats = [
    naive.log_likelihood(*pair)
    for pair in zip(document.contexts, document.continuations)
  ]
  figures = {
    "bits_per_byte": -nats[document.gold] / math.log(2) / size[document.gold]
  }
  scores = {
    "accuracy": nats,
    "accuracy_per_byte": [n / s for n, s in zip(nats, size)],
  }
  if document.unconditioned is not None:
    scores["accuracy_pmi"] = [
      n - naive.log_likelihood(document.unconditioned, c)
      for n, c in zip(nats, document.continuations)
    ]
  for name, values in scores.items():
    figures[name] = float(max(values) == values[document.gold])
  return figures


@pytest.mark.parametrize(
  ("name", "documents"), [("cloze.rc", CLOZE), ("contexts.rc", CONTEXTS)]
)
def test_figures_are_those_of_one_text_at_a_time(result, name, documents):
  want = [plain(document) for document in documents]
  task = result["tasks"][name]
  assert task["by_document"]["id"] == [each.id for each in documents]
  assert set(task["figures"]) == set(want[0])
  for figure in want[0]:
    values = [each[figure] for each in want]
    assert task["by_document"][figure] == pytest.approx(values, abs=1e-4)
    mean, error = task["figures"][figure].values()
    assert mean == pytest.approx(np.mean(values), abs=1e-4)
    if len(values) == 1:
      assert error is None
    else:
      want_error = np.std(values, ddof=1) / math.sqrt(len(values))
      assert error == pytest.approx(want_error, abs=1e-4)


def test_counts_and_chance(result):
  cloze, gold = result["tasks"]["cloze.rc"], result["tasks"]["gold.bpb"]
  assert (cloze["documents"], cloze["documents_of_file"]) == (3, 9)
  assert (cloze["truncated"], gold["truncated"]) == (1, 1)
  assert cloze["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
  assert gold["chance"] is None
  assert list(gold["figures"]) == ["bits_per_byte"]
  assert cloze["sha256"] == "sha of cloze"
  assert result["max_length"] == naive.LENGTH


def test_groups_are_means_of_tasks_of_one_form(result):
  assert list(result["groups"]) == ["g.rc", "g.bpb"]
  group, tasks = result["groups"]["g.rc"], result["tasks"]
  assert group["tasks"] == 2
  # Only one of the two tasks has the PMI figure.
  assert set(group["figures"]) == set(tasks["contexts.rc"]["figures"])
  for figure, value in group["figures"].items():
    means = [
      tasks[name]["figures"][figure]["mean"]
      for name in ("cloze.rc", "contexts.rc")
    ]
    assert value["mean"] == pytest.approx(np.mean(means))


def test_routing_is_that_of_contexts_with_right_answers(result):
  routing = result["routing"]
  assert routing["layers"] == [1]
  for name, documents in (("cloze.rc", CLOZE), ("contexts.rc", CONTEXTS)):
    p_LE = np.mean(
      [
        naive.router_probabilities(
          each.contexts[each.gold], each.continuations[each.gold]
        )
        for each in documents
      ],
      axis=0,
    )
    task = routing["tasks"][name]
    np.testing.assert_allclose(task["probabilities"], p_LE, atol=1e-5)
    for d in range(2):
      assert task["divergence"][0][d] == pytest.approx(
        naive.jensen_shannon(p_LE[0], DOMAINS.probability_LDE[0, d]), abs=1e-5
      )


def test_the_table_has_tasks_and_groups(result):
  head, cloze, _, gold, mean = table(result)
  assert head.split()[:3] == ["task", "documents", "cut"]
  figures = result["tasks"]["cloze.rc"]["figures"]
  assert cloze.startswith("cloze.rc")
  assert f"{figures['bits_per_byte']['mean']:.4f} ± " in cloze
  assert f"{100 * figures['accuracy_pmi']['mean']:.1f} ± " in cloze
  assert cloze.rstrip().endswith(("law", "code"))
  assert "(chance)" not in cloze
  assert gold.split()[:3] == ["gold.bpb", "2", "1"]
  assert mean.startswith("mean of g.rc") and "2 tasks" in mean


def test_letters_near_chance_say_so():
  figures = {"bits_per_byte": {"mean": 1.0, "standard_error": None}}
  result = {
    "tasks": {
      name: {
        "form": form,
        "documents": 9,
        "truncated": 0,
        "chance": 0.25,
        "figures": figures
        | {"accuracy": {"mean": mean, "standard_error": 0.01}},
      }
      for name, form, mean in [
        ("low", "mc", 0.27),
        ("high", "mc", 0.29),
        ("cloze", "rc", 0.27),
      ]
    },
    "groups": {},
    "routing": {"domains": None, "tasks": {}},
  }
  low, high, cloze = table(result)[1:]
  assert "27.0 ± 1.0 (chance)" in low
  assert "29.0 ± 1.0  " in high
  assert "27.0 ± 1.0  " in cloze


def test_what_cannot_be_encoded_is_named():
  documents = (TaskDocument("q7", ("a",) * 2, (" b", " C"), 0),)
  tasks = {"t.rc": selected("t", "rc", documents)}
  assert encode_tasks(tasks, byte_tokenizer(), 4).texts["t.rc"]
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
  library.normalizer = tokenizers.normalizers.Lowercase()
  with pytest.raises(UserError, match=r"t\.rc, document 'q7': .* encode 'C'"):
    encode_tasks(tasks, Tokenizer(library), 4)


def test_a_model_that_is_not_finite_is_refused(model, encoded, mesh):
  bad = jax.tree.map(lambda leaf: leaf * np.nan, model)
  with pytest.raises(UserError, match="likelihoods are not finite"):
    evaluate_tasks(bad, encoded, mesh, 64)
