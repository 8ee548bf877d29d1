"""The command line: what is wrong is said in one line, and nothing is made."""

import json
import logging
import os
import pathlib
import random
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from edl_jax import config_files, main
from edl_jax.checkpoint import Provenance, check_workdir, describe_workdir
from edl_jax.config import UserError
from edl_jax.text.mixture import load_corpus
from edl_jax.text.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))


def write_texts(path, seed=0):
  """Writes 3 domains of 20 documents with 100 characters each."""
  rng = random.Random(seed)
  with open(path, "w") as file:
    for domain in ("words/low", "words/high", "digits"):
      for _ in range(20):
        text = domain + "".join(rng.choices("abcdefgh ", k=100))
        file.write(json.dumps({"text": text, "domain": domain}) + "\n")
  return str(path)


@pytest.fixture
def files(tmp_path):
  return write_texts(tmp_path / "texts.jsonl")


def snapshot(folder):
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
    if "cache" not in path.relative_to(folder).parts
  }


def refused(experiment, workdir, mode="train"):
  """Returns the message of a run that is refused before any device work."""
  with pytest.raises(UserError) as caught:
    main.prepare(experiment, str(workdir), mode)
  message = str(caught.value)
  assert "\n" not in message
  return message


def start_of_run(workdir, **overrides):
  """Makes `workdir` what it is when a run has begun."""
  experiment = config_files.load(TINY, overrides)
  corpus = load_corpus(experiment.data)
  provenance = Provenance(
    experiment,
    corpus.taxonomy,
    load_tokenizer(experiment, corpus),
    corpus.content_hash,
  )
  describe_workdir(str(workdir), provenance)
  return provenance


COMMANDS = {
  "nothing": ([], "--experiment is missing"),
  "no such file": (["--experiment=none.py"], "none.py: no such file"),
  "no such file, spaced": (
    ["--experiment", "none.py"],
    "none.py: no such file",
  ),
  "no such variant's file": (["--experiment=none.py:big"], "none.py"),
  "unknown key": (
    [f"--experiment={TINY}", "--experiment.model.num_expert=2"],
    "did you mean model.num_experts?",
  ),
  "wrong type": (
    [f"--experiment={TINY}", "--experiment.model.num_experts=many"],
    "many",
  ),
  "unknown flag": ([f"--experiment={TINY}", "--workdri=x"], "workdri"),
  "wrong mode": ([f"--experiment={TINY}", "--mode=test"], "test"),
  "stray argument": ([f"--experiment={TINY}", "train"], "train"),
}


@pytest.mark.parametrize(
  ("arguments", "named"), COMMANDS.values(), ids=COMMANDS.keys()
)
def test_wrong_command_line_ends_with_code_2(arguments, named):
  # Fails if the answer needs JAX.
  program = (
    "import sys; sys.modules['jax'] = None\n"
    "from edl_jax import main\n"
    "sys.exit(main.main())\n"
  )
  ended = subprocess.run(
    [sys.executable, "-c", program, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2, ended.stderr
  assert ended.stdout == ""
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert named in line


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"mesh.fsdp": 3}, "mesh.fsdp=3"),
    ({"model.num_active_experts": 9}, "model.num_active_experts=9"),
  ],
)
def test_module_ends_with_code_2_and_makes_nothing(
  tmp_path, files, overrides, named
):
  before = snapshot(tmp_path)
  overrides = overrides | {"data.files": files}
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.main", f"--experiment={TINY}"),
      f"--workdir={tmp_path / 'run'}",
      *(f"--experiment.{key}={value}" for key, value in overrides.items()),
    ],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    },
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2, ended.stderr
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: ") and named in line
  assert snapshot(tmp_path) == before


def test_bad_line_names_file_and_line_and_makes_nothing(tmp_path, files):
  with open(files, "a") as file:
    file.write("not json\n")
  before = snapshot(tmp_path)
  experiment = config_files.load(TINY, {"data.files": files})
  assert f"{files}:61" in refused(experiment, tmp_path / "run")
  assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    (
      {"data.domains": "('low', 'high', 'digits', 'empty')"},
      "empty domain 'empty'",
    ),
    ({"train.sequence_length": 4000}, "less than one row"),
    ({"data.weights": "(1.0, 1.0)"}, "3 domains"),
    ({"train.task_every": 5, "train.task_files": "none"}, "no task files"),
  ],
)
def test_unfit_text_makes_nothing(tmp_path, files, overrides, named):
  experiment = config_files.load(TINY, {"data.files": files} | overrides)
  before = snapshot(tmp_path)
  assert named in refused(experiment, tmp_path / "run")
  assert snapshot(tmp_path) == before


def test_rows_longer_than_every_document_hold_several(tmp_path, files):
  settings = {"data.files": files, "train.sequence_length": 600}
  experiment = config_files.load(TINY, settings)
  run = main.prepare(experiment, str(tmp_path / "run"), "train")
  (note,) = run.notes
  assert "sequence_length=600 is more than any training document has" in note
  rows, _ = run.training
  for number in range(9):
    row = rows[number]
    # A number counts the documents of a row; all of it is text.
    assert row.tokens_BT.shape == (600,) and row.segments_BT.max() >= 2
    assert (np.diff(row.segments_BT) >= 0).all() and row.segments_BT.min() == 1
  short = config_files.load(TINY, settings | {"train.sequence_length": 64})
  assert not main.prepare(short, str(tmp_path / "run"), "train").notes


@pytest.mark.parametrize(
  ("path", "kept"), [("/x/orbax/save.py", False), ("/x/edl_jax/a.py", True)]
)
def test_orbax_logs_no_traceback(path, kept):
  try:
    raise ValueError("the disk")
  except ValueError:
    record = logging.LogRecord(
      *("absl", logging.ERROR, path, 1, "failed", (), sys.exc_info())
    )
  assert main._without_traceback(record)
  assert ("Traceback" in logging.Formatter().format(record)) == kept


def test_nothing_to_evaluate(tmp_path, files):
  experiment = config_files.load(TINY, {"data.files": files})
  message = refused(experiment, tmp_path / "run", "eval")
  assert "no checkpoint to evaluate" in message
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_experiment_shows_the_keys(tmp_path, files):
  run = tmp_path / "run"
  start_of_run(run, **{"data.files": files})
  before = snapshot(tmp_path)
  other = config_files.load(
    TINY, {"data.files": files, "seed": 4, "name": "new"}
  )
  message = refused(other, run)
  assert "another experiment: seed: 0 -> 4; choose" in message
  assert "name:" not in message
  assert snapshot(tmp_path) == before


def test_workdir_of_other_text(tmp_path, files):
  run = tmp_path / "run"
  provenance = start_of_run(run, **{"data.files": files})
  write_texts(files, seed=1)
  before = snapshot(tmp_path)
  assert "content hash" in refused(provenance.experiment, run)
  assert snapshot(tmp_path) == before


@pytest.mark.parametrize("holder", ["run.json", "checkpoint"])
@pytest.mark.parametrize(
  ("key", "value", "named"),
  [
    ("content_hash", "0" * 64, "content hash"),
    ("tokenizer", "{}", "another tokenizer"),
    ("taxonomy", {"fine": ["a"], "coarse": ["a"], "parent": [0]}, "domains"),
  ],
)
def test_workdir_that_differs_in_what_was_saved(
  tmp_path, files, holder, key, value, named
):
  run = tmp_path / "run"
  provenance = start_of_run(run, **{"data.files": files})
  saved = json.loads((run / "run.json").read_text()) | {key: value}
  if holder == "run.json":
    (run / "run.json").write_text(json.dumps(saved))
  else:
    # The newest checkpoint decides, not an older one or run.json.
    for step, content in ((4, provenance.to_dict()), (12, saved)):
      folder = run / "checkpoints" / str(step) / "provenance"
      folder.mkdir(parents=True)
      (folder / "metadata").write_text(json.dumps(content))
  before = snapshot(tmp_path)
  assert named in refused(provenance.experiment, run)
  assert snapshot(tmp_path) == before


def test_damaged_description_is_named(tmp_path, files):
  provenance = start_of_run(tmp_path / "run", **{"data.files": files})
  (tmp_path / "run" / "run.json").write_text('{"experi')
  message = refused(provenance.experiment, tmp_path / "run")
  assert "run.json is damaged" in message


def test_workdir_below_a_file_or_read_only(tmp_path, files):
  experiment = config_files.load(TINY, {"data.files": files})
  message = refused(experiment, tmp_path / "texts.jsonl" / "run")
  assert "cannot write to --workdir" in message
  message = refused(experiment, files)
  assert "cannot write to --workdir" in message
  if sys.platform == "linux" and os.path.isdir("/sys/kernel"):
    # Not even the superuser can write there.
    message = refused(experiment, "/sys/kernel/run")
    assert "cannot write to --workdir=/sys/kernel/run" in message
  if os.geteuid():
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "Permission denied" in refused(experiment, folder / "run")


def test_full_workdir(tmp_path, files, monkeypatch):
  provenance = start_of_run(tmp_path / "run", **{"data.files": files})
  old = tmp_path / "run" / "checkpoints" / "old"
  old.mkdir(parents=True)
  (old / "data").write_bytes(bytes(2**20))
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20)
  )
  # Two checkpoints are kept and one is being written; what is there already
  # makes room.
  fits, too_large = 2 * 2**20 // 3, 2 * 2**20 // 3 + 1
  check_workdir(str(tmp_path / "run"), provenance, fits)
  with pytest.raises(
    UserError, match=r"has room for .* but 2 \+ 1 checkpoints"
  ):
    check_workdir(str(tmp_path / "run"), provenance, too_large)
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0)
  )
  shutil.rmtree(old)
  before = snapshot(tmp_path)
  assert "make room" in refused(provenance.experiment, tmp_path / "run")
  assert snapshot(tmp_path) == before


def test_prepared_text_that_is_not_there_is_refused(tmp_path):
  experiment = config_files.load(TINY, {"data.prepared": f"{tmp_path}/none"})
  message = refused(experiment, tmp_path / "run")
  assert message == f"data.prepared={tmp_path}/none: no such folder"


@pytest.mark.parametrize(
  ("argument", "shown", "hidden"),
  [
    ("--describe", ["model.width", "losses.z_weight"], []),
    ("--describe=losses", ["losses.z_weight"], ["model.width"]),
    ("--describe=losses.z_weight", ["0.25"], ["losses.balance_weight"]),
  ],
)
def test_describe_lists_settings_without_a_folder(
  capsys, argument, shown, hidden
):
  arguments = [f"--experiment={TINY}", "--experiment.losses.z_weight=0.25"]
  assert main.main([*arguments, argument]) == 0
  text = capsys.readouterr().out
  assert all(word in text for word in ["losses.z_weight", "0.25", *shown])
  assert not any(word in text for word in hidden)


def test_describe_of_an_unknown_part_names_the_nearest(capsys):
  assert main.main([f"--experiment={TINY}", "--describe=loses"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: --describe=loses") and "losses" in line
