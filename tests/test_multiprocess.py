"""Runs of several processes: equal to a run of one, and ended together.

Two processes of four CPU devices each, joined by jax.distributed, are compared
with one process of eight.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import edl_jax
from edl_jax import sharding
from edl_jax.checkpoint import Checkpointer, checkpoint_steps
from edl_jax.config import MeshConfig
from edl_jax.metrics import read_metrics
from edl_jax.optim import make_optimizer
from edl_jax.step import abstract_state

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")
TERMINATE, KILL = int(signal.SIGTERM), int(signal.SIGKILL)

# Starts edl_jax.main with short timeouts, and writes down the rows that it
# reads. A process that is to be struck gets a signal with a certain batch.
PROGRAM = """
import functools, json, os, runpy, sys, time
import jax
from edl_jax import sharding
from edl_jax.text import batch as batch_lib
at, number, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:4]
jax.distributed.initialize = functools.partial(
  jax.distributed.initialize,
  initialization_timeout=20,
  heartbeat_timeout_seconds=10,
)
file = open(path, "w")
read_row = batch_lib.PackedRows.__getitem__
def noting(rows, row):
  print(json.dumps([rows.domain, row]), file=file, flush=True)
  return read_row(rows, row)
batch_lib.PackedRows.__getitem__ = noting
put_batch, calls = sharding.put_batch, []
def striking(batch, mesh):
  calls.append(1)
  if at:
    time.sleep(0.3)  # JAX looks for the signal once a second
  if len(calls) == at and number:
    os.kill(os.getpid(), number)
  return put_batch(batch, mesh)
sharding.put_batch = striking
runpy.run_module("edl_jax.main", run_name="__main__", alter_sys=True)
"""


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


class Runs:
  """Starts runs of experiments/tiny.py on a small corpus and 8 devices."""

  def __init__(self, folder):
    self.folder = folder
    self._files = folder / "texts.jsonl"
    random = np.random.default_rng(0)
    with open(self._files, "w") as file:
      for domain in ("words/low", "words/high", "digits"):
        for _ in range(30):
          text = domain + bytes(random.integers(97, 123, 150)).decode()
          file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    self._tasks = folder / "tasks"
    self._tasks.mkdir()
    document = {"context": "a", "continuations": [" bc", " d"], "gold": 0}
    (self._tasks / "letters.jsonl").write_text(json.dumps(document))

  def __call__(self, name, processes, strikes=None, arguments=()):
    """Starts one run in `folder`/`name`, and waits for its end.

    Args:
      name: the folder's name.
      processes: how many processes the run has.
      strikes: for each process to strike, (number of the batch, signal).
      arguments: for each process, more arguments.

    Returns:
      For each process, its exit code, output and errors.
    """
    port = free_port()
    started = []
    for index in range(processes):
      at, number = (strikes or {}).get(index, (1 if strikes else 0, 0))
      more = arguments.get(index, ()) if arguments else ()
      command = [
        *(sys.executable, "-c", PROGRAM, str(at), str(number)),
        str(self.folder / f"{name}.rows{index}"),
        *(f"--experiment={TINY}", f"--workdir={self.folder / name}"),
        f"--experiment.data.files={self._files}",
        f"--experiment.train.task_files={self._tasks}",
        "--experiment.train.task_every=10",
        *("--experiment.mesh.fsdp=2", "--experiment.mesh.expert=4"),
        # A multiple of both axes.
        "--experiment.model.vocabulary_size=264",
        # The processes choose together.
        *("--experiment.mesh.data=1", "--experiment.model.remat=auto", *more),
      ]
      if processes > 1:
        command.append("--distributed")
      environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(
          "count=8", f"count={8 // processes}"
        ),
        # The number of XLA's threads. A collective holds a thread while it
        # waits for the other process: one thread a device, as two cores would
        # give, can deadlock.
        "NPROC": "32",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
      }
      streams = [
        open(self.folder / f"{name}.{stream}{index}", "w")  # noqa: SIM115
        for stream in ("output", "errors")
      ]
      started.append(
        subprocess.Popen(
          command,
          cwd=ROOT,
          env=environment,
          stdout=streams[0],
          stderr=streams[1],
        )
      )
    try:
      codes = [process.wait(timeout=300) for process in started]
    finally:
      for process in started:
        process.kill()
        process.wait()
    return [
      (
        code,
        *(
          (self.folder / f"{name}.{stream}{index}").read_text()
          for stream in ("output", "errors")
        ),
      )
      for index, code in enumerate(codes)
    ]

  def finish(self, name, processes):
    ended = self(name, processes)
    assert [code for code, *_ in ended] == [0] * processes, ended
    return self.folder / name

  def rows(self, name, process):
    lines = (self.folder / f"{name}.rows{process}").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs):
  return runs.finish("alone", 1)


@pytest.fixture(scope="module")
def pair(runs):
  return runs.finish("pair", 2)


def figures(workdir):
  """Returns all metrics by step and name, without those of the clock."""
  return {
    (line["step"], name): value
    for line in read_metrics(str(workdir))
    for name, value in line.items()
    if name not in ("train/tokens_per_second", "train/input_wait_fraction")
    and not name.startswith("time/")
  }


def restored(workdir):
  """Returns the newest checkpoint's arrays and its position in the data."""
  experiment = edl_jax.load(str(workdir)).experiment
  optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  checkpointer = Checkpointer(str(workdir), 2)
  state, data = checkpointer.restore(
    checkpointer.latest_step(),
    abstract_state(experiment, optimizer, mesh),
  )
  checkpointer.close()
  return jax.device_get(jax.tree.leaves(state)), data


def test_two_processes_leave_what_one_leaves(runs, alone, pair):
  got, want = figures(pair), figures(alone)
  assert got.keys() == want.keys() and len(got) > 100
  assert (20, "eval/task/letters/bpb") in got
  for key, value in want.items():
    # float32 after 20 steps: variances are small differences of squares, and
    # inter_fraction is a ratio of small differences of entropies.
    tolerance = 1e-4 if "variance" in key[1] else 1e-5
    tolerance = 1e-3 if key[1].endswith("inter_fraction") else tolerance
    assert got[key] == pytest.approx(value, rel=tolerance), key
  assert {path.name for path in pair.iterdir()} == {
    path.name for path in alone.iterdir()
  }
  (leaves, data), (wanted, wanted_data) = restored(pair), restored(alone)
  assert data == wanted_data
  for leaf, other in zip(leaves, wanted, strict=True):
    np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5)
  # Only the first process reports. Gloo may greet in the other, from several
  # threads at once, whose lines then run into each other.
  assert "step 20" in (runs.folder / "pair.output0").read_text()
  said = (runs.folder / "pair.output1").read_text().splitlines()
  assert [line for line in said if line and "peer ranks" not in line] == []


def test_each_process_reads_only_its_rows(runs, alone, pair):
  del alone, pair
  every = runs.rows("alone", 0)
  for process in range(2):
    rows = runs.rows("pair", process)
    # 20 steps of four rows, and half of the held-out rows.
    assert len(rows) >= 20 * 4
    assert rows[: len(every) // 2] == every[process::2][: len(rows)]


@pytest.mark.parametrize("struck", [(0,), (1,), (0, 1)], ids=str)
def test_both_end_at_one_step_and_go_on(runs, pair, struck):
  name = f"terminated {struck}"
  ended = runs(name, 2, {process: (7, TERMINATE) for process in struck})
  assert [code for code, *_ in ended] == [128 + TERMINATE] * 2, ended
  newest = checkpoint_steps(str(runs.folder / name / "checkpoints"))[-1]
  assert 7 <= newest < 20
  for _, _, errors in ended:
    assert f"checkpoint of step {newest} is" in errors.splitlines()[-1]
  workdir = runs.finish(name, 2)
  assert figures(workdir) == figures(pair)
  (leaves, data), (wanted, wanted_data) = restored(workdir), restored(pair)
  assert data == wanted_data
  for leaf, other in zip(leaves, wanted, strict=True):
    np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("struck", [0, 1])
def test_no_process_waits_for_one_that_was_killed(runs, struck):
  ended = runs(f"killed {struck}", 2, {struck: (7, KILL)})
  assert ended[struck][0] == -KILL
  assert ended[1 - struck][0] != 0


@pytest.mark.parametrize("wrong", [0, 1])
def test_no_process_waits_for_one_that_was_refused(runs, wrong):
  arguments = {wrong: ("--workdir=/dev/null/run",)}
  ended = runs(f"refused {wrong}", 2, arguments=arguments)
  assert ended[wrong][0] == 2
  assert "cannot write to --workdir" in ended[wrong][2].splitlines()[-1]
  assert ended[1 - wrong][0] != 0
  assert not (runs.folder / f"refused {wrong}").exists()


def test_processes_that_differ_are_refused(runs):
  ended = runs("different", 2, arguments={1: ("--experiment.seed=1",)})
  assert [code for code, *_ in ended] == [2, 2]
  for _, _, errors in ended:
    assert "differ in experiment or text" in errors.splitlines()[-1]
  assert not (runs.folder / "different").exists()


def test_a_process_that_does_not_know_the_others_is_refused(runs):
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.main", "--distributed"),
      *(f"--experiment={TINY}", f"--workdir={runs.folder / 'lost'}"),
      f"--experiment.data.files={runs.folder / 'texts.jsonl'}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: --distributed: ")
  assert "JAX_COORDINATOR_ADDRESS=HOST:PORT" in line
