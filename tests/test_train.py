"""Training: the same numbers after any kill.

Runs are real processes that share compiled programs: compiling takes longest.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import edl_jax
from data.prepare import Options, prepare
from edl_jax import config_files, sharding, train
from edl_jax.checkpoint import Checkpointer, Provenance, checkpoint_steps
from edl_jax.config import MeshConfig
from edl_jax.metrics import read_metrics
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state
from edl_jax.text import input_pipeline
from edl_jax.text.input_pipeline import train_dataset
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import load_tokenizer
from tests.xla import FAST_FLAGS

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


# Starts edl_jax.main and sends a signal to its own process at one exact point.
STRIKE = """
import os, runpy, signal, sys, threading, time
from edl_jax import checkpoint, metrics, sharding
from edl_jax.analysis import report
event, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
strike = lambda: os.kill(os.getpid(), number)
workdir = next(a for a in sys.argv if a.startswith("--workdir=")).split("=")[1]

def saved(step):
  return os.path.exists(f"{workdir}/checkpoints/{step}")

def after(owner, name, condition):
  inner = getattr(owner, name)
  def outer(*arguments, **keywords):
    result = inner(*arguments, **keywords)
    if condition(*arguments):
      strike()
    return result
  setattr(owner, name, outer)

if event == "written":  # the metrics of a step, and the checkpoint before it
  before = at // 5 * 5
  def condition(self, step, values):
    while step == at and before and not saved(before):
      time.sleep(1e-3)
    return step == at
  after(metrics.MetricsWriter, "write", condition)
elif event == "saving":  # a checkpoint is being written
  after(checkpoint.Checkpointer, "save", lambda self, step, *_: step == at)
elif event == "saved":  # its folder has appeared
  def watch():
    while not saved(at):
      time.sleep(1e-4)
    strike()
  threading.Thread(target=watch, daemon=True).start()
elif event == "reported":  # all but result.json
  after(report, "write_run_report", lambda *_: True)
elif event == "poisoned":  # not a signal: a batch that gives no finite loss
  inner, calls = sharding.put_batch, []
  def outer(batch, mesh):
    calls.append(1)
    bad = float("inf") if len(calls) == at else 1.0
    return inner(batch._replace(weights_BT=batch.weights_BT * bad), mesh)
  sharding.put_batch = outer
runpy.run_module("edl_jax.main", run_name="__main__", alter_sys=True)
"""


class Runs:
  """Starts runs of experiments/tiny.py on a small corpus."""

  def __init__(self, folder, flags=""):
    self.folder = folder
    self.files = folder / "texts.jsonl"
    random = np.random.default_rng(0)
    with open(self.files, "w") as file:
      for domain in ("words/low", "words/high", "digits"):
        for _ in range(30):
          text = domain + bytes(random.integers(97, 123, 150)).decode()
          file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    self._environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {flags}",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
      "EDL_JAX_CACHE": str(folder / "cache"),
    }

  def __call__(self, name, *arguments, strike=()):
    """Runs to the end in `folder`/`name`; returns the ended process."""
    program = ["-c", STRIKE, *map(str, strike)]
    return subprocess.run(
      [
        *(sys.executable, *(program if strike else ["-m", "edl_jax.main"])),
        *(f"--experiment={TINY}", f"--workdir={self.folder / name}"),
        *(f"--experiment.data.files={self.files}", *arguments),
      ],
      cwd=ROOT,
      env=self._environment,
      capture_output=True,
      text=True,
    )

  def finish(self, name, *arguments):
    ended = self(name, *arguments)
    assert ended.returncode == 0, ended.stderr
    return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  # Unoptimised machine code: compiles in a third of the time.
  return Runs(
    tmp_path_factory.mktemp("runs"),
    FAST_FLAGS,
  )


@pytest.fixture(scope="module")
def uninterrupted(runs):
  return runs.finish("uninterrupted")


def steps(workdir):
  return checkpoint_steps(str(workdir / "checkpoints"))


def result(workdir):
  return json.loads((workdir / "result.json").read_text())


def restored(workdir):
  """Every array of the newest checkpoint, and the position in the data."""
  experiment = edl_jax.load(str(workdir)).experiment
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  checkpointer = Checkpointer(str(workdir), 2)
  state, data = checkpointer.restore(
    steps(workdir)[-1], abstract_state(experiment, optimizer, mesh)
  )
  checkpointer.close()
  return jax.device_get(jax.tree.leaves(state)), data


def figures(workdir):
  """Returns the lines of metrics, but for what depends on the clock."""
  return [
    {
      key: value
      for key, value in line.items()
      if key not in ("train/tokens_per_second", "train/input_wait_fraction")
      and not key.startswith("time/")
    }
    for line in read_metrics(str(workdir))
  ]


def assert_bitwise_equal(workdir, other):
  """Compares all that two runs leave, but for what depends on the clock."""
  assert figures(workdir) == figures(other)
  for name in ("routing.json", "run.json"):
    assert (workdir / name).read_text() == (other / name).read_text()
  for key in ("eval", "routing", "step", "content_hash", "experiment"):
    assert result(workdir)[key] == result(other)[key], key
  assert_equal_states(workdir, other)


def assert_equal_states(workdir, other):
  leaves, data = restored(workdir)
  other_leaves, other_data = restored(other)
  assert data == other_data
  for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
    np.testing.assert_array_equal(leaf, other_leaf)


def test_uninterrupted_run_is_complete(uninterrupted):
  lines = read_metrics(str(uninterrupted))
  assert [line["step"] for line in lines if "train/loss" in line] == [
    *range(2, 21, 2)
  ]
  assert [line["step"] for line in lines if "eval/lm_loss" in line] == [10, 20]
  assert steps(uninterrupted) == [15, 20]
  domains = result(uninterrupted)["eval"]["domains"]
  assert set(domains) == {"low", "high", "digits"}


def test_prepared_text_trains_and_repeats_are_told(runs):
  prepared = str(runs.folder / "prepared text")
  manifest = prepare(
    Options(
      files=str(runs.files),
      out=prepared,
      tokenizer="byte",
      max_characters_per_domain=5000,
    )
  )
  ended = runs(
    "prepared",
    "--experiment.data.files=",
    f"--experiment.data.prepared={prepared}",
    # Of the last domain alone, from step 11 on.
    "--experiment.data.weight_phases=((0.5, 0.0, 0.0, 1.0),)",
  )
  assert ended.returncode == 0, ended.stderr
  outcome = result(runs.folder / "prepared")
  assert outcome["content_hash"] == manifest["content_hash"]
  epochs = outcome["epochs"]
  assert list(epochs) == ["digits", "high", "low"]
  # Rows of 64 tokens, of the text of 5000 bytes that is not held out.
  drawn = 80 / 3 + 80
  assert drawn / 78 < epochs["low"] < drawn / 39
  assert epochs["low"] > 1 > epochs["high"] > 0
  lines = read_metrics(str(runs.folder / "prepared"))
  assert lines[-1]["data/epochs/low"] == epochs["low"]
  (said,) = [line for line in ended.stdout.splitlines() if "new order" in line]
  assert said.endswith("low: read 1 time(s), now again in a new order")


def small_run(runs):
  """Returns the arguments of `train.train`, but for mesh and folder."""
  experiment = config_files.load(TINY, {"data.files": str(runs.files)})
  corpus = load_corpus(experiment.data)
  tokenizer = load_tokenizer(experiment, corpus)
  return (
    corpus,
    *train_dataset(corpus, tokenizer, experiment),
    Provenance(experiment, corpus.taxonomy, tokenizer, corpus.content_hash),
  )


def test_training_text_is_encoded_once(runs, monkeypatch, tmp_path):
  arguments = small_run(runs)
  read = []
  encode = input_pipeline.encode_corpus
  monkeypatch.setattr(
    input_pipeline,
    "encode_corpus",
    lambda corpus, split, tokenizer: (
      read.append(split) or encode(corpus, split, tokenizer)
    ),
  )
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    train._Loop(*arguments, mesh, str(tmp_path), "full", None).close()
  assert read == ["held_out"]


@pytest.mark.parametrize("guarded", ["step", "evaluate"])
def test_no_step_moves_data_unnoticed(runs, monkeypatch, tmp_path, guarded):
  class Loop:
    first_step, evaluation, progress = 0, None, None

    def __init__(self, *_):
      self.done = []
      loops.append(self)

    def __getattr__(self, name):
      def note(*_, **__):
        self.done.append(name)
        if name == guarded:
          jnp.ones(3) + np.ones(3)  # to the device, without device_put

      return note

  loops = []
  monkeypatch.setattr(train, "_Loop", Loop)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  run = functools.partial(train.train, *small_run(runs), mesh, str(tmp_path))
  if guarded == "step":
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
      run()
    assert loops[0].done == ["step", "close"]
  else:
    run()
    assert loops[0].done.count("step") == 20


KILL, TERMINATE = int(signal.SIGKILL), int(signal.SIGTERM)


@pytest.mark.slow
def test_killed_again_and_again(runs, uninterrupted):
  for event, at, newest in (
    ("written", 8, [5]),  # between checkpoints: steps 6 to 8 are done again
    ("reported", 0, [15, 20]),
  ):
    killed = runs("killed", strike=(event, at, KILL))
    assert killed.returncode == -KILL, killed.stderr
    assert steps(runs.folder / "killed") == newest
    assert not (runs.folder / "killed" / "result.json").exists()
  assert_bitwise_equal(runs.finish("killed"), uninterrupted)


def test_terminated_run_saves_and_goes_on(runs, uninterrupted):
  ended = runs("terminated", strike=("written", 12, TERMINATE))
  # Step 12 is read when step 13 has been dispatched.
  assert steps(runs.folder / "terminated") == [10, 13]
  assert ended.returncode == 128 + TERMINATE
  assert "checkpoint of step 13" in ended.stderr.splitlines()[-1]
  assert_bitwise_equal(runs.finish("terminated"), uninterrupted)


@pytest.mark.slow
def test_tasks_change_nothing_and_survive(runs, uninterrupted):
  files = runs.folder / "task files"
  files.mkdir()
  document = {"context": "a", "continuations": [" b", " c"], "gold": 1}
  (files / "letters.jsonl").write_text(json.dumps(document))
  arguments = (
    "--experiment.train.task_every=4",
    f"--experiment.train.task_files={files}",
  )
  killed = runs("tasks", *arguments, strike=("written", 8, KILL))
  assert killed.returncode == -KILL, killed.stderr
  workdir = runs.finish("tasks", *arguments)
  key = "eval/task/letters/bpb"
  lines = figures(workdir)
  logged = {line["step"]: line[key] for line in lines if key in line}
  assert list(logged) == [4, 8, 12, 16, 20]
  assert [x for x in lines if key not in x] == figures(uninterrupted)
  assert_equal_states(workdir, uninterrupted)
  written = json.loads((workdir / "tasks.json").read_text())
  bits = written["tasks"]["letters"]["figures"]["bits_per_byte"]["mean"]
  assert (written["step"], bits) == (20, logged[20])
  assert written["routing"]["domains"] == ["digits", "high", "low"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "strike",
  [
    ("written", 4),  # before the first checkpoint
    ("saving", 5),
    ("saved", 5),
    ("saving", 10),
    ("saved", 10),
    ("saved", 15),
    ("written", 18),
    ("saving", 20),
    ("saved", 20),
  ],
  ids=str,
)
def test_killed_once(optimised_runs, strike):
  name = "-".join(map(str, strike))
  killed = optimised_runs(name, strike=(*strike, KILL))
  assert killed.returncode == -KILL, killed.stderr
  uninterrupted = optimised_runs.folder / "uninterrupted"
  assert_bitwise_equal(optimised_runs.finish(name), uninterrupted)


@pytest.fixture(scope="module")
def optimised_runs(tmp_path_factory):
  """Runs as users have them, compiled with all optimisations."""
  made = Runs(tmp_path_factory.mktemp("optimised"))
  made.finish("uninterrupted")
  return made


def test_not_finite_stops_and_keeps_the_checkpoint(runs, uninterrupted):
  del uninterrupted  # it has compiled the program
  # The eighth batch, before anything is evaluated.
  ended = runs("poisoned", strike=("poisoned", 8, 0))
  assert ended.returncode == 1
  last = ended.stderr.splitlines()[-1]
  assert "error: step 8: train/" in last and "nan" in last
  assert "the checkpoint of step 5 is intact" in last
  assert steps(runs.folder / "poisoned") == [5]
  assert edl_jax.load(str(runs.folder / "poisoned")).step == 5
  lines = read_metrics(str(runs.folder / "poisoned"))
  assert lines[-1]["step"] == 6


@pytest.mark.slow
def test_absurd_learning_rate_stops(runs):
  ended = runs("absurd", "--experiment.optimizer.learning_rate=1e30")
  assert ended.returncode == 1
  last = ended.stderr.splitlines()[-1]
  assert ": train/" in last and "there is no checkpoint yet" in last


def test_evaluation_of_a_run(runs, uninterrupted):
  shutil.copytree(uninterrupted, runs.folder / "evaluated")
  before = (uninterrupted / "metrics.jsonl").read_text()
  workdir = runs.finish("evaluated", "--mode=eval")
  evaluated = json.loads((workdir / "eval.json").read_text())
  assert evaluated["step"] == 20
  for figures in ("eval", "routing"):
    assert evaluated[figures] == result(uninterrupted)[figures]
  assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_post_training_starts_from_a_checkpoint_and_survives(
  runs, uninterrupted
):
  start = runs.folder / "start"
  shutil.copytree(uninterrupted, start)
  arguments = (
    f"--experiment.train.initial_checkpoint={start}",
    "--experiment.model.remat=full",
    "--experiment.losses.orthogonality_weight=auto:1e-4",
    "--experiment.losses.variance_weight=auto:1e-3",
    "--experiment.optimizer.trainable=blocks/*",
  )
  whole = runs.finish("special", *arguments)
  first, before = (read_metrics(str(run))[0] for run in (whole, uninterrupted))
  assert first["train/lm_loss"] < before["train/lm_loss"] - 0.1
  trained = [line for line in read_metrics(str(whole)) if "train/loss" in line]
  for name in ("orthogonality", "variance"):
    weights = {line[f"train/{name}_weight"] for line in trained}
    # Found once, and not 0.
    assert len(weights) == 1 and weights.pop() > 0
  killed = runs("special_killed", *arguments, strike=("written", 8, KILL))
  assert killed.returncode == -KILL, killed.stderr
  assert steps(runs.folder / "special_killed") == [5]
  shutil.rmtree(start)  # it has served its turn
  assert_bitwise_equal(runs.finish("special_killed", *arguments), whole)
