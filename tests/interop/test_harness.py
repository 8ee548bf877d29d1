"""The real harness on local tasks: our answers, and Transformers' on the same.

`make test-interop` runs these tests; without it they are skipped.
"""

import json
import pathlib
import random

import jax
import numpy as np
import pytest
import yaml

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, Provenance
from edl_jax.config import Experiment, MeshConfig, ModelConfig, TrainConfig
from edl_jax.interop import export
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state
from edl_jax.tasks.scoring import score
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import train_tokenizer

PROGRAM = pathlib.Path(__file__).with_name("harness_program.py")
ROOT = pathlib.Path(__file__).parents[2]
# So few that the longer prompts of the tasks lose tokens at their left.
LENGTH = 32
TEXT = "the sun warms a cold stone and water turns to ice in winter"

pytestmark = pytest.mark.slow


def words(generator, least, most):
  return " ".join(
    generator.choices(TEXT.split(), k=generator.randint(least, most))
  )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """Returns an untrained run whose tokenizer has merges."""
  tokenizer = train_tokenizer([f"{TEXT}\nQuestion: x\nAnswer:"], 320)
  experiment = Experiment(
    model=ModelConfig(
      # A row without a token could be the likeliest, and `generate` draws none.
      vocabulary_size=tokenizer.vocabulary_size,
      num_layers=2,
      width=32,
      num_heads=4,
      num_kv_heads=2,
      head_width=8,
      num_experts=8,
      num_active_experts=2,
      expert_width=16,
    ),
    train=TrainConfig(sequence_length=LENGTH),
  )
  # Sweeps name folders like this.
  folder = str(tmp_path_factory.mktemp("run") / "divergence_weight=0.01")
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:1])
  checkpointer = Checkpointer(folder, keep=1)
  with jax.set_mesh(mesh):
    state = init_state(
      experiment, make_optimizer(experiment.optimizer, 1), mesh
    )
    # Larger than at the start of training, so that answers differ.
    model = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, state.model)
    checkpointer.save(
      *(1, state._replace(model=model), {}),
      Provenance(experiment, Taxonomy.from_names(["a"]), tokenizer, "hash"),
    )
  checkpointer.close()
  return folder


def write_task(folder, name, rows, **settings):
  data = folder / f"{name}.jsonl"
  data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  task = {
    "task": name,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "num_fewshot": 0,
    **settings,
  }
  (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """Writes tasks of all three kinds of requests, for which no hub is needed."""
  folder, generator = tmp_path_factory.mktemp("tasks"), random.Random(0)
  questions = [
    {
      "question": f"{words(generator, 2, 6)}?",
      "choices": [words(generator, 1, 4) for _ in range(4)],
      "answer": generator.randrange(4),
    }
    for _ in range(16)
  ]
  write_task(
    *(folder, "local_arc", questions),
    output_type="multiple_choice",
    doc_to_text="Question: {{question}}\nAnswer:",
    doc_to_target="answer",
    doc_to_choice="{{choices}}",
    num_fewshot=2,
    fewshot_split="test",
    metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
  )
  # The space before the answer belongs to the context.
  write_task(
    *(folder, "local_space", questions[:4]),
    output_type="multiple_choice",
    doc_to_text="{{question}} ",
    doc_to_target="answer",
    doc_to_choice="{{choices}}",
    target_delimiter="",
    metric_list=[{"metric": "acc"}],
  )
  write_task(
    *(folder, "local_text"),
    [{"text": words(generator, 5, 90)} for _ in range(6)],
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=[{"metric": "bits_per_byte"}],
  )
  write_task(
    *(folder, "local_continue", questions[:6]),
    output_type="generate_until",
    doc_to_text="{{question}}",
    doc_to_target="{{choices[0]}}",
    generation_kwargs={"until": ["e", "\n"], "max_gen_toks": 12},
    metric_list=[{"metric": "exact_match"}],
  )
  return folder


@pytest.fixture(scope="module")
def answers(run_elsewhere, run_folder, tasks, tmp_path_factory):
  """Returns (arguments, answer) of every request, by model and task."""
  folder = tmp_path_factory.mktemp("answers")
  flags = [f"--workdir={run_folder}", f"--out={folder / 'exported'}"]
  assert export.main(flags) == 0
  run_elsewhere(
    PROGRAM,
    *(run_folder, folder / "exported", tasks, folder / "out"),
    path=ROOT,
    HF_HOME=str(folder / "hub"),
  )
  found = {}
  for path in (folder / "out").glob("*/**/samples_*.jsonl"):
    model = path.relative_to(folder / "out").parts[0]
    for line in path.read_text().splitlines():
      sample = json.loads(line)
      task = path.name.removeprefix("samples_").rpartition("_")[0]
      for request, answer in zip(
        sample["arguments"].values(), sample["resps"], strict=True
      ):
        arguments = tuple(request.values())
        found.setdefault((model, task), {})[str(arguments)] = (
          arguments,
          answer[0],
        )
  return found


@pytest.fixture(scope="module")
def run(run_elsewhere, run_folder):
  del run_elsewhere  # Skips before the run is loaded.
  return edl_jax.load(run_folder)


def nats(answer):
  """Returns the log-likelihood in a logged answer."""
  return float(answer[0] if isinstance(answer, list) else answer)


def test_log_likelihoods_are_those_of_score(answers, run):
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  requests = [
    *answers["ours", "local_arc"].values(),
    *answers["ours", "local_space"].values(),
  ]
  assert len(requests) >= 70
  pairs = [arguments for arguments, _ in requests]
  assert any(context.endswith(" ") for context, _ in pairs)
  scores = score(run.model, run.tokenizer, pairs, LENGTH, mesh)
  assert 0 < sum(each.truncated for each in scores) < len(scores)
  for (_, answer), each in zip(requests, scores, strict=True):
    assert nats(answer) == pytest.approx(each.log_likelihood, abs=1e-5)


def test_log_likelihoods_are_those_of_transformers(answers):
  compared = 0
  for task in ("local_arc", "local_space"):
    ours, theirs = answers["ours", task], answers["theirs", task]
    assert ours.keys() == theirs.keys()
    for key, (_, answer) in ours.items():
      assert nats(answer) == pytest.approx(nats(theirs[key][1]), abs=1e-4)
      assert answer[1] == theirs[key][1][1]
      compared += 1
  assert compared >= 50


def naive_rolling(run, text):
  """Scores each token behind at most LENGTH tokens, in float64 from logits."""
  start = run.tokenizer.document_start_id
  tokens = np.array([start, *run.tokenizer.encode(text)])
  total, done = 0.0, 0
  while done < len(tokens) - 1:
    end = min(done + LENGTH, len(tokens) - 1)
    first = max(0, end - LENGTH)
    logits_TV = np.asarray(run.model(tokens[None, first:end])[0], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    picked_T = log_p_TV[np.arange(end - first), tokens[first + 1 : end + 1]]
    total += picked_T[done - first :].sum()
    done = end
  return total


def test_rolling_is_the_naive_form(answers, run):
  requests = answers["ours", "local_text"].values()
  lengths = [len(run.tokenizer.encode(text)) for (text,), _ in requests]
  assert min(lengths) < LENGTH < 2 * LENGTH < max(lengths)
  for (text,), answer in requests:
    assert nats(answer) == pytest.approx(naive_rolling(run, text), abs=1e-4)


def test_continuations_are_those_of_generate_and_of_transformers(answers, run):
  ours = answers["ours", "local_continue"]
  prompts = [arguments[0] for arguments, _ in ours.values()]
  results = run.generate(prompts, num_tokens=12, stop=("e", "\n"))
  assert {each.finish for each in results} >= {"stop"}
  for (key, (_, answer)), result in zip(ours.items(), results, strict=True):
    assert answer == result.text
    assert answer == answers["theirs", "local_continue"][key][1]
