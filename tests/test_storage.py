"""Runs in a bucket, here one in memory that can do no more than a real one."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

import edl_jax
from data.prepare import Options, prepare
from edl_jax import checkpoint, config, config_files, main, metrics, storage
from edl_jax.analysis import report
from edl_jax.config import UserError
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.prepared import load_prepared
from edl_jax.text.tokenizer import byte_tokenizer

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")
# Measured, and so other in each run.
TIMES = ("train/tokens_per_second", "train/input_wait_fraction")


class Bucket(MemoryFileSystem):
  """gs://test holds objects, gs://locked may not be read or written."""

  cachable = False

  def __init__(self):
    super().__init__(global_store=False)
    self.pseudo_dirs = ["", "/test"]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))

  def _check(self, path):
    bucket = self._strip_protocol(path).split("/")[1]
    if bucket == "locked":
      raise OSError("Forbidden: b/locked\nno access")
    if bucket != "test":
      raise FileNotFoundError(path)

  def info(self, path, **options):
    self._check(path)
    return super().info(path, **options)

  def _open(self, path, mode="rb", **options):
    self._check(path)
    assert mode in ("rb", "wb")
    return super()._open(path, mode, **options)

  def mkdir(self, path, **options):
    raise AssertionError("gcsfs would make a bucket of that name")

  def mv(self, *paths, **options):
    raise AssertionError("objects cannot be renamed")


@pytest.fixture
def bucket(monkeypatch):
  bucket = Bucket()
  monkeypatch.setattr(
    backend.fsspec_backend, "_get_filesystem", lambda name: bucket
  )
  return bucket


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))


def test_files_are_found_and_read(bucket, tmp_path):
  (tmp_path / "c").mkdir()
  for folder in (str(tmp_path), "gs://test/run"):
    storage.write_bytes(f"{folder}/a b.txt", b"abcdef")
    storage.write_bytes(f"{folder}/c/d.txt", b"x")
    assert storage.names(folder) == {"a b.txt", "c"}
    assert storage.names(f"{folder}/none") == set()
    path = f"{folder}/a b.txt"
    assert storage.size(path) == 6
    with storage.open_bytes(path) as file:
      file.seek(2)
      assert file.read(2) == b"cd" and file.tell() == 4
    before = storage.states([path, f"{folder}/c/d.txt"])
    storage.write_bytes(path, b"abcdeg")
    after = storage.states([path, f"{folder}/c/d.txt"])
    assert before[0] != after[0] and before[1] == after[1]
    assert storage.read_bytes(path) == b"abcdeg"
    with pytest.raises(FileNotFoundError):
      storage.read_bytes(f"{folder}/none")
  assert storage.find("gs://test/run/*/*.txt") == [("gs://test/run/c/d.txt", 1)]
  assert storage.find("gs://test/run/a b.txt") == [("gs://test/run/a b.txt", 6)]
  with pytest.raises(OSError, match="Forbidden"):
    storage.size("gs://locked/a")


def test_files_are_replaced_as_a_whole(bucket, tmp_path):
  for folder in (str(tmp_path / "made" / "run"), "gs://test/run"):
    storage.make_folder(folder)
    for content in (b"first and long", b"second"):
      storage.write_bytes(f"{folder}/a", content)
    assert epath.Path(folder, "a").read_bytes() == b"second"
    assert [path.name for path in epath.Path(folder).iterdir()] == ["a"]


def test_file_stays_as_it_was_when_its_writer_fails(bucket, tmp_path):
  for folder in (str(tmp_path), "gs://test/run"):
    storage.write_bytes(f"{folder}/a", b"first")
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
      with storage.whole_file(f"{folder}/a") as file:
        file.write(b"half of the sec")
        1 / 0  # noqa: B018
    assert epath.Path(folder, "a").read_bytes() == b"first"
    assert [path.name for path in epath.Path(folder).iterdir()] == ["a"]


def test_gzip_files_depend_on_their_content_alone(tmp_path):
  for name in ("a.gz", "b.gz"):
    with storage.whole_gzip_file(tmp_path / name) as file:
      file.write(b"new")
  assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"new"
  # Bytes 4 to 8 of the header are the time.
  assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4)
  assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
  with pytest.raises(ValueError), storage.whole_gzip_file(tmp_path / "a.gz"):
    raise ValueError
  assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"new"
  assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_whole_or_not_there(tmp_path):
  path = tmp_path / "parent" / "whole"
  broken = pytest.raises(ZeroDivisionError)
  with broken, storage.whole_folder(str(path)) as folder:
    Path(folder, "a").write_text("half")
    raise ZeroDivisionError
  assert os.listdir(path.parent) == []
  with storage.whole_folder(f"{path}/") as folder:
    Path(folder, "a").write_text("whole")
    assert not path.exists()
  assert os.listdir(path.parent) == ["whole"]
  assert (path / "a").read_text() == "whole"
  with pytest.raises(FileExistsError), storage.whole_folder(str(path)):
    raise AssertionError("not reached")
  assert (path / "a").read_text() == "whole"


def test_writers_of_one_file_do_not_mix(tmp_path):
  path = tmp_path / "a"
  with storage.whole_file(path) as one, storage.whole_file(path) as other:
    one.write(b"one")
    other.write(b"other")
    assert not path.exists()
  # The inner block ended first, the outer one last.
  assert path.read_bytes() == b"one"
  assert list(tmp_path.iterdir()) == [path]


def test_devices_are_not_replaced(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  storage.write_bytes(pipe, b"content")
  assert os.read(reader, 100) == b"content"
  os.close(reader)
  assert list(tmp_path.iterdir()) == [pipe]


def test_folder_that_is_missing_is_an_error_in_one_line(tmp_path):
  with pytest.raises(OSError) as caught:
    storage.write_bytes(tmp_path / "none" / "a", b"content")
  assert caught.value.strerror == "No such file or directory"


def test_json_for_machines_and_for_people(tmp_path):
  value = {"name": "Ünïcode", "values": [1, 0.1]}
  path = tmp_path / "a.json"
  storage.write_json(path, value)
  assert path.read_bytes() == json.dumps(value).encode()
  storage.write_json(path, value, indent=2)
  assert path.read_text(encoding="utf-8").splitlines()[1] == (
    '  "name": "Ünïcode",'
  )
  assert json.loads(path.read_bytes()) == value


def test_absolute_paths(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert storage.absolute("runs/a/") == str(tmp_path / "runs" / "a")
  assert storage.absolute("gs://test/a/") == "gs://test/a"


def write_steps(workdir, steps, first_step=0, killed=False):
  """Writes figures as a run does that has a checkpoint every four steps."""
  writer = metrics.MetricsWriter(workdir, first_step=first_step)
  for step in steps:
    writer.write(step, {"train/lm_loss": 1 / step})
    if step % 4 == 0:
      writer.write(step, {"eval/lm_loss": step / 3})
      writer.sync()
  if not killed:
    writer.close()


def test_metrics_of_a_killed_run_equal_those_of_a_whole_one(bucket, tmp_path):
  write_steps(str(tmp_path), range(1, 13))
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  workdir = "gs://test/run"
  write_steps(workdir, range(1, 11), killed=True)
  assert [line["step"] for line in metrics.read_metrics(workdir)] == (
    [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
  )
  # The checkpoint of step 8 was not complete.
  write_steps(workdir, [], first_step=4, killed=True)
  assert len(metrics.read_metrics(workdir)) == 5
  write_steps(workdir, range(5, 13), first_step=4)
  assert epath.Path(workdir, "metrics.jsonl").read_bytes() == whole
  events = list(epath.Path(workdir, "tensorboard").iterdir())
  assert len(events) == 3
  assert any(b"eval/lm_loss" in path.read_bytes() for path in events)


def test_metrics_sync_writes_what_is_new(bucket, monkeypatch):
  written = []
  monkeypatch.setattr(
    storage, "write_bytes", lambda path, content: written.append(path)
  )
  with metrics.MetricsWriter("gs://test/run") as writer:
    writer.write(1, {"train/lm_loss": 1.0})
    written.clear()
    writer.sync()
    assert len(written) == 2
    writer.sync()
  assert len(written) == 2


def test_pictures_are_those_of_a_local_run(bucket, tmp_path):
  local, workdir = str(tmp_path / "run"), "gs://test/run"
  for folder in (local, workdir):
    write_steps(folder, range(1, 13))
  (path,) = report.write_run_report(workdir)
  assert path == "gs://test/run/report/loss.png"
  (local_path,) = report.write_run_report(local)
  assert epath.Path(path).read_bytes() == Path(local_path).read_bytes()


def test_only_complete_checkpoints_count(bucket):
  folder = "gs://test/run/checkpoints"
  for name in ("5/commit_success.txt", "10/parameters/a", "readme/b"):
    storage.write_bytes(f"{folder}/{name}", b"")
  assert checkpoint.checkpoint_steps(folder) == [5]
  storage.write_bytes(f"{folder}/10/commit_success.txt", b"")
  assert checkpoint.checkpoint_steps(folder) == [5, 10]
  with pytest.raises(UserError, match=r"no checkpoint in gs://test/none"):
    edl_jax.load("gs://test/none/")


def test_workdir_is_tried_and_described(bucket):
  provenance = checkpoint.Provenance(
    config.Experiment(), Taxonomy.from_names(["a"]), byte_tokenizer(), "hash"
  )
  workdir = "gs://test/run"
  checkpoint.check_workdir(workdir, provenance, 2**60)
  assert not bucket.store
  checkpoint.describe_workdir(workdir, provenance)
  saved = checkpoint.saved_provenance(workdir)
  assert saved == json.loads(json.dumps(provenance.to_dict()))
  with pytest.raises(UserError, match=r"^cannot write to .*no access; choose"):
    checkpoint.check_workdir("gs://locked/run", provenance, 0)


def refused(path):
  with pytest.raises(UserError) as caught:
    storage.check_access(path)
  message = str(caught.value)
  assert "\n" not in message and message.startswith(f"{path}")
  return message


def test_buckets_that_cannot_be_used_are_refused(bucket):
  storage.check_access("runs/a")
  storage.check_access("gs://test/run")
  assert "only gs://" in refused("s3://test/run")
  assert "there is no bucket gs://none" in refused("gs://none/run")
  assert "(Forbidden: b/locked no access); log in" in refused("gs://locked/a")
  for mode in ("train", "eval"):
    with pytest.raises(UserError, match=r"^--workdir=gs://none/run: there is"):
      main.prepare(config_files.load(TINY), "gs://none/run", mode)
  for key in ("data.prepared", "train.initial_checkpoint"):
    experiment = config_files.load(TINY, {key: "gs://none/a"})
    with pytest.raises(UserError, match=f"{key}.*there is no bucket gs://none"):
      main.prepare(experiment, "runs/none", "train")


def test_without_gcsfs_the_command_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  backend.fsspec_backend._get_filesystem.cache_clear()
  assert "pip install -r requirements-gcs.txt" in refused("gs://test/run")


@pytest.fixture
def prepared(tmp_path):
  lines = [
    json.dumps({"text": f"{n} words" * n, "domain": "ab"[n % 2]})
    for n in range(100)
  ]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  prepare(
    Options(
      files=f"{tmp_path}/a.jsonl",
      out=str(tmp_path / "prepared"),
      tokenizer="byte",
    )
  )
  return tmp_path / "prepared"


def upload(folder, target):
  for path in folder.rglob("*"):
    if path.is_file():
      storage.write_bytes(f"{target}/{path.name}", path.read_bytes())


def tokens_of(folder):
  experiment = config_files.load(TINY, {"data.prepared": folder})
  corpus = load_prepared(experiment)
  text = b"".join(np.asarray(array).tobytes() for array in corpus._arrays)
  return corpus.content_hash, hashlib.sha256(text).hexdigest(), corpus.sizes()


def test_prepared_text_is_copied_once(bucket, prepared, capsys, tmp_path):
  upload(prepared, "gs://test/corpus")
  capsys.readouterr()
  local = tokens_of(str(prepared))
  assert capsys.readouterr().out == ""
  assert tokens_of("gs://test/corpus") == local
  assert "MiB of gs://test/corpus to " in capsys.readouterr().out
  assert tokens_of("gs://test/corpus") == local
  assert capsys.readouterr().out == ""
  # A killed process leaves an incomplete copy, which does not count.
  (copy,) = (p for p in (tmp_path / "cache/prepared").iterdir() if p.is_dir())
  copy.rename(f"{copy}.partial")
  Path(f"{copy}.partial", "tokens-00000.bin").write_bytes(b"torn")
  assert tokens_of("gs://test/corpus") == local


def test_prepared_text_that_is_damaged_or_too_large(
  bucket, prepared, monkeypatch
):
  upload(prepared, "gs://test/corpus")
  damaged = "gs://test/corpus/tokens-00000.bin"
  storage.write_bytes(damaged, b"other")
  with pytest.raises(UserError, match=f"^{damaged}: damaged"):
    tokens_of("gs://test/corpus")
  epath.Path(damaged).unlink()
  with pytest.raises(UserError, match=f"^{damaged}: missing"):
    tokens_of("gs://test/corpus")
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100)
  )
  with pytest.raises(
    UserError, match=r"MiB, but 0 MiB are free; .*EDL_JAX_CACHE"
  ):
    tokens_of("gs://test/corpus")
  with pytest.raises(UserError, match="corpus/b: no such folder"):
    tokens_of("gs://test/corpus/b")
  epath.Path("gs://test/corpus/manifest.json").unlink()
  with pytest.raises(UserError, match="corpus: not finished"):
    tokens_of("gs://test/corpus")


def start(workdir, *flags):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "edl_jax.main",
      f"--experiment={TINY}",
      f"--workdir={workdir}",
      "--experiment.train.num_steps=100",
      *flags,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.skipif(
  not os.environ.get("STORAGE_EMULATOR_HOST"),
  reason="needs a server that stands in for Google Cloud Storage",
)
def test_terminated_run_in_a_served_bucket_goes_on(tmp_path):
  workdir = f"gs://test/{uuid.uuid4().hex}"
  local = start(tmp_path / "run")
  assert local.communicate() and local.returncode == 0
  process = start(workdir)
  for line in process.stdout:
    if line.startswith("step 12/"):  # Long before the end.
      process.send_signal(signal.SIGTERM)
  assert process.wait() == 128 + signal.SIGTERM
  assert checkpoint.checkpoint_steps(f"{workdir}/checkpoints")[-1] < 100
  process = start(workdir)
  assert process.communicate() and process.returncode == 0
  figures, others = (
    [
      {
        k: v
        for k, v in line.items()
        if k not in TIMES and not k.startswith("time/")
      }
      for line in metrics.read_metrics(str(folder))
    ]
    for folder in (tmp_path / "run", workdir)
  )
  assert figures == others
  process = start(workdir, "--mode=eval")
  assert process.communicate() and process.returncode == 0
  result = json.loads(epath.Path(workdir, "result.json").read_text())
  found = json.loads(epath.Path(workdir, "eval.json").read_text())
  assert found["eval"] == result["eval"]
  assert edl_jax.load(workdir).step == 100


def test_a_folder_is_flushed_file_by_file(tmp_path, monkeypatch):
  for name in ("a", "b/c", "b/d/e"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  flushed = set()

  def fsync(descriptor):
    flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

  monkeypatch.setattr(os, "fsync", fsync)
  storage.flush_folder(str(tmp_path))
  wanted = {tmp_path, *tmp_path.rglob("*")}
  assert {path.rstrip("/") for path in flushed} == set(map(str, wanted))
