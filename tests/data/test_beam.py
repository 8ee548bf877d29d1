"""Prepared by Beam: the bytes of one machine, also when it was killed."""

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import chunks
from data.prepare import Options, prepare
from edl_jax.config import UserError

ROOT = Path(__file__).parents[2]
# Run by `make test-beam`, in an environment of its own.
beam = pytest.importorskip("apache_beam")

PROCESSES = ("direct_running_mode=multi_processing", "direct_num_workers=2")


def write_texts(folder, count=600):
  """Files of several kinds, duplicates across them, rows without a domain."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh汉字", k=5)) for _ in range(90)]
  records = []
  for n in range(count):
    record = {"text": " ".join(rng.choices(words, k=rng.randrange(30)))}
    record["domain"] = rng.choice(["g/low", "g/high", "odd"])
    record["origin"] = f"book {n // 7}"
    records.append(record)
    if n % 11 == 0:
      records.append({**rng.choice(records), "domain": "odd"})
  lines = [json.dumps(record) + "\n" for record in records]
  folder.mkdir()
  third = len(lines) // 3
  (folder / "a.jsonl").write_text("".join(lines[:third]))
  content = "".join(lines[third : 2 * third]).encode()
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(content))
  for n, line in enumerate(lines[2 * third :]):
    with open(folder / f"c{n % 7}.jsonl", "a") as file:
      file.write(line)
  return folder


@pytest.fixture
def texts(tmp_path):
  return write_texts(tmp_path / "texts")


def options_for(texts, out, **changes):
  return Options(
    **{
      "files": f"{texts}/*.jsonl*",
      "out": str(out),
      "tokenizer": "bpe:350",
      # Some thirty chunks, many of which span files.
      "chunk_characters": 4000,
    }
    | changes
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"beam": PROCESSES},
    {"max_characters_per_domain": 6000, "tokenizer": "byte"},
    {"near_duplicates": 0.2, "near_shingle": 1, "near_permutations": 32},
  ],
)
def test_same_bytes_as_one_machine(texts, tmp_path, changes):
  options = {key: value for key, value in changes.items() if key != "beam"}
  one = prepare(options_for(texts, tmp_path / "one", **options))
  assert one["token_files"] > 20 and one["skipped"]["duplicate"]
  if "near_duplicates" in changes:
    assert one["skipped"]["near duplicate"] > 50
  made = options_for(texts, tmp_path / "beam", runner="DirectRunner", **changes)
  assert prepare(made) == one
  assert contents(made.out) == contents(tmp_path / "one")
  # Finished: verified, and nothing is done again.
  assert prepare(dataclasses.replace(made, runner="local", beam=())) == one


def test_bad_records_have_the_same_words(texts, tmp_path):
  with open(texts / "a.jsonl", "a") as file:
    file.write("{\n" * 30 + '{"text": "unlabelled"}\n')
  (texts / "b2.jsonl").write_text('{"text": "x", "domain": "a/b/c"}\n{')
  options = options_for(texts, tmp_path / "one", tokenizer="byte")
  messages = []
  for runner in ("local", "DirectRunner"):
    out = str(tmp_path / f"stops {runner}")
    with pytest.raises(UserError) as error:
      prepare(dataclasses.replace(options, out=out, runner=runner))
    messages.append(str(error.value))
    assert not Path(out, "manifest.json").exists()
  assert messages[0] == messages[1] and "a.jsonl:" in messages[0]
  skips = dataclasses.replace(options, skip_bad=True)
  one = prepare(skips)
  assert one["skipped"]["bad"] == 33
  assert one["bad_records"] == {
    f"{texts}/a.jsonl": {"not JSON": 30, "key 'domain' is missing": 1},
    f"{texts}/b2.jsonl": {
      "domain must be fine or coarse/fine": 1,
      "not JSON": 1,
    },
  }
  made = dataclasses.replace(
    skips, out=str(tmp_path / "beam"), runner="DirectRunner"
  )
  assert prepare(made) == one
  assert contents(made.out) == contents(skips.out)


PROGRAM = """
import json, sys
from data.prepare import Options, prepare
prepare(Options(**json.loads(sys.argv[1])))
"""


def test_killed_and_continued(texts, tmp_path):
  one = options_for(texts, tmp_path / "one", chunk_characters=1500)
  prepare(one)
  made = dataclasses.replace(
    one, out=str(tmp_path / "out"), runner="DirectRunner", beam=PROCESSES
  )
  out = Path(made.out)
  for stage in ("work/costs-*", "work/scan-*", "tokens-*.bin"):
    done = list(out.glob(stage))
    process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, json.dumps(dataclasses.asdict(made))],
      cwd=ROOT,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    end = time.monotonic() + 120
    while len(list(out.glob(stage))) <= len(done) + 2:
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
  # Older than whatever is written from now on.
  done = [path for path in out.glob("tokens-*.bin")]
  for path in done:
    os.utime(path, (1, 1))
  prepare(made)
  assert contents(made.out) == contents(one.out)
  # The last two may have been under way, one in each process.
  assert sum(path.stat().st_mtime == 1 for path in done) >= len(done) - 2


def test_a_failing_worker_is_one_line(texts, tmp_path, monkeypatch):
  def fail(*arguments, **columns):
    raise OSError(28, "No space left on device")

  made = options_for(texts, tmp_path / "out", runner="DirectRunner")
  monkeypatch.setattr(chunks, "write_arrays", fail)
  with pytest.raises(UserError, match="No space left on device") as error:
    prepare(made)
  assert "the same command resumes" in str(error.value)
  assert "\n" not in str(error.value)
  monkeypatch.undo()
  assert prepare(made)


def test_a_wrong_argument_is_one_line(texts, tmp_path):
  made = options_for(texts, tmp_path / "out", runner="DirectRunner")
  wrong = dataclasses.replace(made, beam=("direct_running_mode=nonsense",))
  with pytest.raises(UserError, match=r"--beam: .*direct_running_mode"):
    prepare(wrong)
