"""Sweeps: points, commands, skipping, signals, and the report over seeds."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from edl_jax import config, metrics, sweep
from edl_jax.analysis import sweep_report
from edl_jax.analysis.carve import swept

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")
WEIGHT = "losses.divergence_weight"


def test_points_are_the_product_in_order():
  grids = [f"{WEIGHT}=0,1e-2", "seed=0,1"]
  made = sweep.points(TINY, grids, {"train.num_steps": "7"})
  assert [point.name for point in made] == [
    "divergence_weight=0,seed=0",
    "divergence_weight=0,seed=1",
    "divergence_weight=0.01,seed=0",
    "divergence_weight=0.01,seed=1",
  ]
  last = made[-1]
  assert last.experiment.losses.divergence_weight == 0.01
  assert last.experiment.seed == 1
  assert last.experiment.train.num_steps == 7
  assert last.experiment.model.num_experts == 4  # from the file
  assert sweep.command(last, TINY, "runs/s") == [
    sys.executable,
    "-m",
    "edl_jax.main",
    f"--experiment={TINY}",
    "--workdir=runs/s/divergence_weight=0.01,seed=1",
    "--experiment.train.num_steps=7",
    f"--experiment.{WEIGHT}=1e-2",
    "--experiment.seed=1",
  ]


def test_values_with_commas_are_separated_by_semicolons():
  assert sweep.parse_grid(["data.weights=0.5,0.5;1,2"]) == {
    "data.weights": ["0.5,0.5", "1,2"]
  }
  made = sweep.points(TINY, ["data.weights=0.5,0.5;1,2"], {})
  assert [point.experiment.data.weights for point in made] == [
    (0.5, 0.5),
    (1.0, 2.0),
  ]
  assert [point.name for point in made] == ["weights=0.5+0.5", "weights=1+2"]


def test_names_use_whole_keys_where_last_parts_collide():
  assert sweep_report.short_names(["a.width", "b.width", "b.seed"]) == {
    "a.width": "a.width",
    "b.width": "b.width",
    "b.seed": "seed",
  }


def test_names_are_single_folders():
  (point,) = sweep.points(TINY, ["data.files=/text/a b/*.jsonl"], {})
  assert point.name == "files=_text_a_b_.jsonl"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--grid=seed="], "empty value"),
    (["--grid=seed=0,,1"], "empty value"),
    (["--grid=seed"], "empty value"),
    ([], "--grid is missing"),
    (["--grid=losses.divergence_wieght=1"], f"did you mean {WEIGHT}"),
    (["--grid=losses=1"], "losses is a group"),
    (["--grid=seed=0,x"], "seed=x"),
    (["--grid=seed=0", "--grid=seed=1"], "in another --grid"),
    ([f"--grid={WEIGHT}=0.01,1e-2"], "divergence_weight=0.01 more than once"),
    (["--grid=model.num_heads=2,0"], "model.num_heads=0: must be at least 1"),
    (["--grid=seed=1", "--experiment.seed=2"], "set by both"),
    (["--grid=seed=1", "--experiment.sede=2"], "did you mean seed"),
    (["--grid=seed=1", "--experiment.seed"], "needs a value"),
    (["--grid=seed=1", "--frobnicate"], "frobnicate"),
    (["--grid=seed=1", "more"], "unexpected argument 'more'"),
    (["--grid=seed=1", "--carve=5"], "seed=1 has only model.num_experts=4"),
    (["--grid=model.num_experts=3,4", "--carve=4"], "num_experts=3 has only"),
    (["--grid=seed=1", "--carve=2", "--dry_run"], "leave out --dry_run"),
    (
      [
        *("--carve=2", "--grid=model.router=domain"),
        f"--experiment.{WEIGHT}=0",
      ],
      "there is nothing to choose",
    ),
    (["--carve=2", "--report"], "--report takes --workdir alone"),
    (["--grid=seed=1", "--report"], "--report takes --workdir alone"),
    (["--grid=seed=1", "--experiment=no.py"], "no.py: no such file"),
    (["--grid=seed=1", "--workdir="], "--workdir is missing"),
    (["--grid=seed=1", "--workdir=gs://a/b"], "sweeps need a local folder"),
  ],
)
def test_bad_usage_is_one_line_and_creates_nothing(
  tmp_path, capsys, arguments, message
):
  workdir = tmp_path / "sweep"
  code = sweep.main(
    [f"--experiment={TINY}", f"--workdir={workdir}", *arguments]
  )
  output = capsys.readouterr()
  assert code == 2
  assert output.out == ""
  assert output.err.startswith("error: ") and output.err.count("\n") == 1
  assert message in output.err
  assert not workdir.exists()


def test_report_without_runs_is_a_user_error(tmp_path, capsys):
  assert sweep.main(["--report", f"--workdir={tmp_path}"]) == 2
  assert "no folder in it has a result.json" in capsys.readouterr().err


def test_help_is_short_and_shows_examples(capsys):
  assert sweep.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert len(text.splitlines()) < 40
  assert "--grid=losses.divergence_weight=0,0.003,0.01" in text
  assert "--dry_run" in text


def test_dry_run_prints_commands_and_does_nothing(tmp_path, capsys):
  workdir = tmp_path / "a sweep"
  grid = "data.weights=(1,2);(2,1)"
  arguments = [f"--experiment={TINY}", f"--workdir={workdir}"]
  assert sweep.main([*arguments, f"--grid={grid}", "--dry_run"]) == 0
  lines = capsys.readouterr().out.splitlines()
  made = sweep.points(TINY, [grid], {})
  assert [shlex.split(line) for line in lines] == [
    sweep.command(point, TINY, str(workdir)) for point in made
  ]
  assert not workdir.exists()


def make_result(experiment, lm_loss, diversity=0.5, speed=1000.0):
  layer = {
    "diversity": diversity,
    "inter_fraction": 0.25,
    "max_violation": 1.0,
    "purity": 0.5,
    "normalized_mutual_information": 0.125,
  }
  domain = {"lm_loss": lm_loss, "bits_per_byte": 1.0, "tokens": 9, "bytes": 30}
  return {
    "experiment": config.flatten(experiment),
    "step": experiment.train.num_steps,
    "content_hash": "0",
    "parameters": {"total": 100, "active": 50},
    "tokens_per_second": speed,
    "eval": {
      "lm_loss": lm_loss,
      "bits_per_byte": 1.0,
      "domains": {"python": domain, "legal": domain | {"lm_loss": 2 * lm_loss}},
    },
    "routing": {**layer, "layers": [layer, layer]},
  }


def write_sweep(workdir, grids, lm_loss):
  """Writes the folders of a finished sweep; returns the points."""
  made = sweep.points(TINY, grids, {})
  for point in made:
    folder = workdir / point.name
    with metrics.MetricsWriter(str(folder)) as writer:
      for step in range(1, 5):
        writer.write(step, {"train/lm_loss": 5.0 / step})
      writer.write(4, {"eval/lm_loss": lm_loss(point.experiment)})
    result = make_result(point.experiment, lm_loss(point.experiment))
    (folder / "result.json").write_text(json.dumps(result))
  return made


# Loss by seed, and the gain of a divergence weight by weight and seed.
BASE = {0: 3.0, 1: 3.5, 2: 4.25}
GAIN = {0.0: (0, 0, 0), 0.01: (0.5, 0.25, 0.75), 0.1: (1, 1, 1)}


def loss_of(experiment):
  gain = GAIN[experiment.losses.divergence_weight][experiment.seed]
  return BASE[experiment.seed] - gain


def test_two_runs_print_the_comparison(tmp_path, capsys):
  write_sweep(tmp_path, [f"{WEIGHT}=0,0.1"], loss_of)
  assert sweep.main(["--report", f"--workdir={tmp_path}"]) == 0
  text = capsys.readouterr().out
  assert "difference" in text and "-1.0000" in text
  assert "loss_by_step.png" in os.listdir(tmp_path)


def write_carved(workdir, made, rise):
  """Writes what carving the points to two experts would."""
  results = [
    {
      "workdir": str(workdir / point.name),
      "step": point.experiment.train.num_steps,
      "experiment": config.flatten(point.experiment),
      "score": "assignments",
      "greedy": False,
      "costs": [],
      "whole": {"python": {"loss": 3.0, "calibration_tokens": 8}},
      "calibration": [],
      "points": [
        {
          "domain": "python",
          "keep": 2,
          "loss": 3.0 + rise(point.experiment),
          "others_loss": None,
          "most_used_loss": 4.0,
          "random_losses": [],
        }
      ],
    }
    for point in made
  ]
  (workdir / "carve").mkdir()
  path = workdir / "carve" / "carve.json"
  path.write_text(json.dumps(results))


def test_two_carved_runs_print_what_their_parts_are_worth(tmp_path, capsys):
  made = write_sweep(tmp_path, [f"{WEIGHT}=0,0.1"], loss_of)
  write_carved(tmp_path, made, lambda e: 0.5 - e.losses.divergence_weight)
  assert sweep.main(["--report", f"--workdir={tmp_path}"]) == 0
  text = capsys.readouterr().out
  assert "LM loss with 2 of 4 experts in each layer" in text
  assert text.count("python") == 1  # The report has the whole model's losses.
  row = next(line.split() for line in text.splitlines() if "python" in line)
  assert row == ["python", "3.5000", "3.4000", "-0.1000"]
  written = (tmp_path / "report.md").read_text()
  assert "## Every figure" in written and "bits per byte" in written
  assert "## Carved: 2 run(s), 1 domain(s)" in written
  assert "most used over all domains" in written


def test_a_sweep_whose_carving_fails_still_reports(
  tmp_path, capfd, monkeypatch
):
  write_sweep(tmp_path, [f"{WEIGHT}=0,0.1"], loss_of)
  stand_in = [sys.executable, "-c", "import sys; sys.exit(3)"]
  monkeypatch.setattr(swept, "command", lambda *_: stand_in)
  flags = [f"--experiment={TINY}", f"--grid={WEIGHT}=0,0.1", "--carve=2"]
  assert sweep.main([*flags, f"--workdir={tmp_path}"]) == 1
  out, err = capfd.readouterr()
  assert err == (
    "error: carving ended with exit code 3; the report is without it\n"
  )
  assert "routing diversity" in out and "bits per byte" in out


def test_result_of_another_experiment_is_refused(tmp_path, capsys):
  (point,) = sweep.points(TINY, ["seed=3"], {})
  assert not sweep.is_finished(point, str(tmp_path))
  write_sweep(tmp_path, ["seed=3"], lambda experiment: 1.0)
  assert sweep.is_finished(point, str(tmp_path))
  arguments = ["--grid=seed=2,3", "--experiment.train.num_steps=9"]
  code = sweep.main(
    [f"--experiment={TINY}", f"--workdir={tmp_path}", *arguments]
  )
  assert code == 2
  assert "train.num_steps: 20 -> 9" in capsys.readouterr().err
  assert not (tmp_path / "seed=2").exists()


# Stands for edl_jax.main, whose start alone takes seconds. Writes a line when
# it starts and when it is told to end; seed 1 fails, or hangs until told to.
STAND_IN = """
import json, os, signal, sys, time
folder, seed, result, mode = sys.argv[1:]
os.makedirs(folder, exist_ok=True)
log = open(os.path.join(folder, "log"), "a", buffering=1)
def end(number, frame):
  log.write(f"{signal.Signals(number).name}\\n")
  sys.exit(7)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
log.write("start\\n")
if seed == "1" and mode == "fail":
  sys.exit(3)
deadline = time.monotonic() + 60
while seed == "1" and mode == "hang" or os.path.exists(mode):
  time.sleep(0.01)
  if time.monotonic() > deadline:
    sys.exit(8)
if hasattr(os, "sched_getaffinity"):
  with open(os.path.join(folder, "cores"), "w") as file:
    json.dump(sorted(os.sched_getaffinity(0)), file)
with open(os.path.join(folder, "result.json"), "w") as file:
  file.write(result)
"""

DRIVER = """
import json, os, sys
from edl_jax import sweep
sys.path.insert(0, {tests!r})
import test_sweep
def command(point, experiment, workdir):
  result = json.dumps(test_sweep.make_result(point.experiment, 2.0))
  folder = os.path.join(workdir, point.name)
  seed = str(point.experiment.seed)
  code = test_sweep.STAND_IN
  return [sys.executable, "-c", code, folder, seed, result, {mode!r}]
sweep.command = command
sys.exit(sweep.main())
"""


def start_sweep(workdir, mode, *flags):
  code = DRIVER.format(tests=str(ROOT / "tests"), mode=str(mode))
  return subprocess.Popen(
    [
      sys.executable,
      "-c",
      code,
      f"--experiment={TINY}",
      "--grid=seed=0,1,2",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(path):
  for _ in range(2000):
    if path.exists() and path.read_text():
      return
    time.sleep(0.01)
  raise TimeoutError(path)


def logs(workdir):
  return {
    path.parent.name: path.read_text().split() for path in workdir.glob("*/log")
  }


def test_failing_point_is_reported_and_the_others_run(tmp_path):
  process = start_sweep(tmp_path, "fail")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 1
  assert "seed=1 ended with exit code 3" in err
  assert "1 of 3 failed" in err
  assert logs(tmp_path) == {f"seed={seed}": ["start"] for seed in range(3)}
  assert "difference" in out  # of the two runs that finished
  process = start_sweep(tmp_path, "")
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, "")
  assert out.count("already finished, skipped") == 2
  assert logs(tmp_path)["seed=0"] == ["start"]
  assert logs(tmp_path)["seed=1"] == ["start", "start"]
  assert (tmp_path / "report.csv").exists()


@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
  reason="needs two cores that can be set",
)
def test_jobs_run_side_by_side_on_their_own_cores(tmp_path):
  hold = tmp_path / "hold"
  hold.touch()
  workdir = tmp_path / "sweep"
  process = start_sweep(workdir, hold, "--jobs=2")
  wait_for(workdir / "seed=1" / "log")
  wait_for(workdir / "seed=0" / "log")
  assert not (workdir / "seed=2").exists()  # two at a time
  hold.unlink()
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, "")
  assert out.count(": finished") == 3
  assert (workdir / "seed=0" / "output.txt").exists()
  cores = [
    set(json.loads((workdir / f"seed={seed}" / "cores").read_text()))
    for seed in range(2)
  ]
  assert cores[0] and cores[1] and not cores[0] & cores[1]
  assert cores[0] | cores[1] == os.sched_getaffinity(0)


def test_more_jobs_than_cores_are_refused(tmp_path, capsys):
  many = f"--jobs={(os.cpu_count() or 1) + 1}"
  arguments = [f"--experiment={TINY}", "--grid=seed=0", many]
  assert sweep.main([*arguments, f"--workdir={tmp_path / 'none'}"]) == 2
  assert "cores" in capsys.readouterr().err
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_passed_on_once_and_ends_the_sweep(tmp_path, number):
  process = start_sweep(tmp_path, "hang")
  wait_for(tmp_path / "seed=1" / "log")
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert err.count("\n") == 1 and f"stopped by {number.name}" in err
  assert logs(tmp_path) == {
    "seed=0": ["start"],
    "seed=1": ["start", number.name],
  }


def test_killed_sweep_waits_for_the_run_it_left_behind(tmp_path):
  hold = tmp_path / "hold"
  hold.touch()
  workdir = tmp_path / "sweep"
  first = start_sweep(workdir, hold)
  wait_for(workdir / "seed=0" / "log")
  first.kill()
  first.wait()
  # Not read to their ends: the run left behind holds the other ends.
  first.stdout.close()
  first.stderr.close()
  second = start_sweep(workdir, hold)
  line = second.stdout.readline()
  assert line.startswith("waiting for a run that is still active")
  hold.unlink()
  out, err = second.communicate(timeout=60)
  assert (second.returncode, err) == (0, "")
  assert "[1/3] seed=0: already finished, skipped" in out
  assert logs(workdir) == {f"seed={seed}": ["start"] for seed in range(3)}


@pytest.mark.slow
def test_sweep_of_real_runs_stopped_and_gone_on_with(tmp_path):
  first, second = (
    tmp_path / f"divergence_weight={weight}" for weight in ("0", "0.01")
  )
  arguments = [
    sys.executable,
    "-m",
    "edl_jax.sweep",
    f"--experiment={TINY}",
    f"--grid={WEIGHT}=0,0.01",
    f"--workdir={tmp_path}",
    "--carve=2",
  ]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(arguments, cwd=ROOT, **pipes)
  while not metrics.read_metrics(str(second)):
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM, err
  assert (first / "result.json").exists()
  assert not (second / "result.json").exists()
  before = (first / "metrics.jsonl").stat().st_mtime_ns

  done = subprocess.run(arguments, cwd=ROOT, timeout=240, **pipes)
  assert done.returncode == 0, done.stderr
  assert "divergence_weight=0: already finished, skipped" in done.stdout
  assert "routing diversity" in done.stdout and "difference" in done.stdout
  assert "carving to 2 experts in each layer" in done.stdout
  results = json.loads((tmp_path / "carve" / "carve.json").read_text())
  for result in results:
    for point in result["points"]:
      assert f"{point['loss']:.4f}" in done.stdout
  assert (first / "metrics.jsonl").stat().st_mtime_ns == before
  steps = [
    [
      line["step"]
      for line in metrics.read_metrics(str(folder))
      if "train/loss" in line
    ]
    for folder in (first, second)
  ]
  assert steps[0] == steps[1] == list(range(2, 21, 2))
  assert {path.name for path in tmp_path.glob("*.*") if path.is_file()} == {
    ".lock",
    "report.csv",
    "report.md",
    "loss_by_divergence_weight.png",
    "diversity_by_divergence_weight.png",
    "loss_by_step.png",
  }

  again = subprocess.run(arguments, cwd=ROOT, timeout=60, **pipes)
  assert again.returncode == 0
  assert again.stdout.count("already finished, skipped") == 2
  assert "already done, skipped" in again.stdout
