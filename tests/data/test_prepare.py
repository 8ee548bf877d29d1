"""Prepared text: the same as in memory, resumed when killed, errors named."""

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import prepare as command
from data.prepare import Options, prepare
from edl_jax.config import (
  DataConfig,
  Experiment,
  ModelConfig,
  TrainConfig,
  UserError,
)
from edl_jax.text.input_pipeline import (
  eval_batches,
  train_dataset,
  train_iterator,
)
from edl_jax.text.mixture import load_corpus
from edl_jax.text.prepared import load_prepared
from edl_jax.text.tokenizer import byte_tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))


def write_texts(folder, count=400):
  """Three domains and rows without one, duplicates and books, in two files."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh汉字", k=5)) for _ in range(90)]
  records = []
  for n in range(count):
    domain = rng.choice(["g/low", "g/high", "odd", None])
    record = {"text": " ".join(rng.choices(words, k=rng.randrange(30)))}
    record |= {"domain": domain} if domain else {}
    record |= {"origin": f"book {n // 7}"} if n % 3 else {}
    records.append(record)
    if n % 11 == 0:
      records.append({**record, "domain": "odd"})
  lines = [json.dumps(record) + "\n" for record in records]
  folder.mkdir(exist_ok=True)
  (folder / "b.jsonl").write_text("".join(lines[count // 2 :]))
  first = "".join(lines[: count // 2]).encode()
  (folder / "a.jsonl.gz").write_bytes(gzip.compress(first))
  (folder / "taxonomy.yaml").write_text(
    "domains: [{fine: odd}, {fine: low, coarse: g, weight: 2}, {fine: high,"
    " coarse: g}]\nunlabelled: {weight: 0.5}\n"
  )


@pytest.fixture
def texts(tmp_path):
  write_texts(tmp_path / "texts")
  return tmp_path / "texts"


def options_for(texts, out, **changes):
  return Options(
    **{
      "files": f"{texts}/*.jsonl*",
      "taxonomy": f"{texts}/taxonomy.yaml",
      "out": str(out),
      "tokenizer": "byte",
      # Some twenty chunks.
      "chunk_characters": 5000,
    }
    | changes
  )


def experiment_for(**data):
  return Experiment(
    model=ModelConfig(vocabulary_size=400),
    train=TrainConfig(batch_size=4, sequence_length=32, eval_rows=-1),
    data=DataConfig(**{"tokenizer": "byte"} | data),
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows_of(dataset, count=120):
  return [[np.asarray(a).tolist() for a in dataset[i]] for i in range(count)]


# --- The same as in memory ---------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:350"])
@pytest.mark.parametrize("limit", [None, 4000])
def test_rows_are_those_of_the_files_themselves(
  texts, tmp_path, tokenizer, limit
):
  made = options_for(
    texts,
    tmp_path / "out",
    tokenizer=tokenizer,
    held_out_fraction=0.2,
    max_characters_per_domain=limit,
  )
  manifest = prepare(made)
  assert manifest["token_files"] > 5
  kind, _, size = tokenizer.partition(":")
  common = {
    "mixing": "bytes",
    "temperature": 2.0,
    "held_out_fraction": 0.2,
    "weight_phases": ((0.1, 1.0, 0.0, 2.0, 1.0),),
  }
  read = experiment_for(
    files=made.files,
    taxonomy=made.taxonomy,
    tokenizer=kind,
    **common,
    **({"max_characters_per_domain": limit} if limit else {}),
  )
  read.model.vocabulary_size = int(size or 400)
  mapped = experiment_for(prepared=made.out, **common)
  corpus, prepared = load_corpus(read.data), load_prepared(mapped)
  own = load_tokenizer(read, corpus)
  assert prepared.tokenizer.to_json() == own.to_json()
  assert prepared.taxonomy == corpus.taxonomy
  assert prepared.taxonomy.sources == ("odd", "low", "high", "unlabelled")
  assert prepared.content_hash == corpus.content_hash
  assert prepared.sizes() == corpus.sizes()
  if limit:
    assert max(characters for _, characters in corpus.sizes()) == limit
  assert prepared.train_bytes() == corpus.train_bytes()

  ways = [(corpus, own, read), (prepared, prepared.tokenizer, mapped)]
  (expected, epochs), (got, got_epochs) = (train_dataset(*way) for way in ways)
  # Across the change of weights, and beyond an epoch.
  assert got_epochs.at(1200) == epochs.at(1200)
  assert max(epochs.at(1200).values()) > 1
  assert rows_of(got, 1200) == rows_of(expected, 1200)
  for batch, other in zip(*(eval_batches(*way) for way in ways), strict=True):
    for array, expected_array in zip(batch, other):
      np.testing.assert_array_equal(array, expected_array)


def test_resume_from_prepared_text_is_exact(texts, tmp_path):
  made = options_for(texts, tmp_path / "out")
  prepare(made)
  experiment = experiment_for(prepared=made.out)

  def iterate():
    corpus = load_prepared(experiment)
    rows, _ = train_dataset(corpus, corpus.tokenizer, experiment)
    return train_iterator(rows, experiment, 3, unlabelled=True)

  iterator, resumed = iterate(), iterate()
  for _ in range(50):
    next(iterator)
  resumed.set_state(json.loads(json.dumps(iterator.get_state())))
  for _ in range(20):
    for array, expected in zip(next(resumed), next(iterator)):
      np.testing.assert_array_equal(array, expected)
  for each in (iterator, resumed):
    each.close()


def test_processes_and_chunks_do_not_change_the_tokens(texts, tmp_path):
  one = options_for(texts, tmp_path / "one", tokenizer="bpe:350")
  two = dataclasses.replace(one, out=str(tmp_path / "two"), workers=2)
  prepare(one)
  prepare(two)
  assert contents(one.out) == contents(two.out)
  whole = dataclasses.replace(
    one, out=str(tmp_path / "whole"), chunk_characters=10**9
  )
  manifest = prepare(whole)
  assert manifest["token_files"] == 1
  datasets = []
  for made in (one, whole):
    corpus = load_prepared(experiment_for(prepared=made.out))
    experiment = experiment_for(prepared=made.out)
    dataset, _ = train_dataset(corpus, corpus.tokenizer, experiment)
    datasets.append(dataset)
  assert rows_of(datasets[0]) == rows_of(datasets[1])


def test_many_sources_open_no_threads(tmp_path):
  (tmp_path / "a.jsonl").write_text(
    "".join(
      json.dumps({"text": f"{half} {n} {'x' * 40}", "domain": f"d{n}"}) + "\n"
      for n in range(1000)
      for half in (0, 1)
    )
  )
  made = options_for(
    tmp_path, tmp_path / "out", files=f"{tmp_path}/a.jsonl", taxonomy=""
  )
  prepare(made)
  experiment = experiment_for(prepared=made.out)
  before = threading.active_count()
  corpus = load_prepared(experiment)
  rows, _ = train_dataset(corpus, corpus.tokenizer, experiment)
  iterator = train_iterator(rows, experiment, 1000)
  labels = [label for _ in range(250) for label in next(iterator).domain_B]
  assert sorted(labels) == list(range(1000))
  assert threading.active_count() - before <= 3
  iterator.close()


# --- Ended and continued -----------------------------------------------------


# Prepares, and may not write files of more bytes than it is told.
PROGRAM = """
import json, resource, sys
from data.prepare import Options, prepare
from edl_jax.command import Command
if sys.argv[2:]:
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
options = Options(**json.loads(sys.argv[1]))
main = Command("").main(lambda: prepare(options) and 0)
sys.exit(main([]))
"""


def start(made, *limit):
  arguments = [json.dumps(dataclasses.asdict(made)), *map(str, limit)]
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *arguments],
    cwd=ROOT,
    stderr=subprocess.PIPE,
  )


def children_of(process):
  found = subprocess.run(
    ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True
  )
  pairs = [line.split() for line in found.stdout.splitlines()]
  return [int(pid) for pid, parent in pairs if int(parent) == process.pid]


def alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  # A zombie that nobody has waited for is dead.
  stat = Path(f"/proc/{pid}/stat")
  return (
    not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
  )


def wait_until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  assert condition()


@pytest.mark.parametrize("stage", ["work/scan-*.npz", "tokens-*.bin"])
def test_killed_and_continued(texts, tmp_path, stage):
  whole = options_for(texts, tmp_path / "whole", chunk_characters=1000)
  prepare(whole)
  made = dataclasses.replace(whole, out=str(tmp_path / "out"), workers=2)
  out = Path(made.out)
  process = start(made)
  wait_until(lambda: len(list(out.glob(stage))) > 3 or process.poll())
  # Before it can get any further.
  process.send_signal(signal.SIGSTOP)
  children = children_of(process)
  process.kill()
  process.communicate()
  assert not (out / "manifest.json").exists()
  # The workers end with their parent.
  assert len(children) >= 2
  wait_until(lambda: not any(map(alive, children)))
  with pytest.raises(UserError, match="not finished"):
    load_prepared(experiment_for(prepared=made.out))
  # Older than whatever is written from now on.
  done = list(out.glob(stage))
  for path in done:
    os.utime(path, (1, 1))
  assert len(done) > 3
  # A failing machine may have lost the end of a file.
  lost = sorted(out.glob("work/scan-*.npz"))[0]
  lost.write_bytes(lost.read_bytes()[:99])
  with pytest.raises(UserError, match="damaged; the same command writes it"):
    prepare(dataclasses.replace(made, workers=1))
  prepare(dataclasses.replace(made, workers=1))
  assert contents(made.out) == contents(whole.out)
  if stage == "tokens-*.bin":
    # Those whose documents were written too; the last may have been under way.
    kept = [path for path in done if path.stat().st_mtime == 1]
    assert len(kept) >= len(done) - 2


def test_finished_folder_is_checked_and_left_alone(texts, tmp_path, capsys):
  made = options_for(texts, tmp_path / "out")
  manifest = prepare(made)
  before = {p: p.stat().st_mtime_ns for p in Path(made.out).iterdir()}
  assert prepare(dataclasses.replace(made, workers=2)) == manifest
  assert before == {p: p.stat().st_mtime_ns for p in Path(made.out).iterdir()}
  path = Path(made.out, "tokens-00002.bin")
  content = bytearray(path.read_bytes())
  content[100] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"tokens-00002\.bin: damaged"):
    prepare(made)
  path.write_bytes(content[:-1])
  with pytest.raises(UserError, match=r"tokens-00002\.bin: damaged"):
    load_prepared(experiment_for(prepared=made.out))


def test_folder_of_another_command_is_refused(texts, tmp_path):
  made = options_for(texts, tmp_path / "out")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").touch()
  with pytest.raises(UserError, match="holds other files"):
    prepare(made)
  (tmp_path / "out" / "mine").unlink()
  prepare(made)
  with pytest.raises(UserError, match=r"held_out_fraction: 0\.05 -> 0\.1;?"):
    prepare(dataclasses.replace(made, held_out_fraction=0.1))
  with open(texts / "b.jsonl", "a") as file:
    file.write("\n")
  with pytest.raises(UserError, match=r"\(inputs: "):
    prepare(made)


def test_a_checkpoint_folder_gives_tokenizer_and_start(texts, tmp_path):
  hub, out = tmp_path / "hub", tmp_path / "out"
  hub.mkdir()
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().tokenizers_json())
  library.add_special_tokens(["<|start|>"])
  library.save(str(hub / "tokenizer.json"))
  (hub / "tokenizer_config.json").write_text('{"bos_token": "<|start|>"}')
  options = options_for(texts, out, tokenizer=str(hub))
  assert options.settings([])["content of tokenizer"]
  prepare(options)
  corpus = load_prepared(experiment_for(prepared=str(out)))
  assert corpus.tokenizer.document_start_id == 257


def test_two_at_once_are_refused(texts, tmp_path):
  made = options_for(texts, tmp_path / "out")
  with (
    command._opened(made.out, {}),
    pytest.raises(UserError, match="another process is writing it"),
    command._opened(made.out, {}),
  ):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_leaves_what_can_be_continued(texts, tmp_path, workers):
  whole = options_for(texts, tmp_path / "whole", chunk_characters=30_000)
  prepare(whole)
  made = dataclasses.replace(whole, out=str(tmp_path / "out"), workers=workers)
  # Some files fit and some do not.
  sizes = sorted(len(content) for content in contents(whole.out).values())
  process = start(made, sizes[-2])
  _, message = process.communicate()
  assert process.returncode == 2
  lines = message.decode().splitlines()
  # Lines of progress come first when preparing takes long.
  (error,) = [line for line in lines if line.startswith("error: ")]
  assert f"error: cannot write to --out={made.out}: File too large" in error
  assert not list(Path(made.out).glob("**/*.tmp"))
  assert not Path(made.out, "manifest.json").exists()
  assert prepare(made)
  assert contents(made.out) == contents(whole.out)


# --- Bad input ---------------------------------------------------------------


def test_beam_is_optional(texts, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  made = options_for(texts, tmp_path / "out", runner="FlinkRunner")
  with pytest.raises(UserError, match=r"install -r requirements-beam\.txt"):
    prepare(made)
  assert not Path(made.out).exists()


def test_bad_records_are_named_or_skipped(tmp_path):
  good = [
    {"text": f"good {d} {n}", "domain": d} for d in "ab" for n in range(9)
  ]
  lines = [json.dumps(record) for record in good]
  bad = {
    "{": r"c\.jsonl:4: not JSON",
    '{"text": "x", "domain": "c"}': r"c\.jsonl:4: unknown domain 'c'",
    '{"text": "x"}': r"c\.jsonl:4: key 'domain' is missing",
    '{"text": "x", "domain": "a", "id": 1}': "c.jsonl:4: id '1' occurs a",
  }
  lines[0] = json.dumps(good[0] | {"id": 1})
  (tmp_path / "taxonomy.yaml").write_text("domains: [{fine: a}, {fine: b}]")
  path = tmp_path / "c.jsonl"
  made = options_for(tmp_path, tmp_path / "out", files=str(path))
  for number, (line, message) in enumerate(bad.items()):
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    out = str(tmp_path / f"out {number}")
    with pytest.raises(UserError, match=message):
      prepare(dataclasses.replace(made, out=out))
    assert not Path(out, "manifest.json").exists()
  path.write_text("\n".join([*lines[:3], *bad, *lines[3:]]))
  (tmp_path / "clean.jsonl").write_text("\n".join(lines))
  skipped = prepare(dataclasses.replace(made, skip_bad=True))
  clean = prepare(
    dataclasses.replace(
      made,
      files=f"{tmp_path}/clean.jsonl",
      out=str(tmp_path / "clean"),
    )
  )
  assert skipped["content_hash"] == clean["content_hash"]
  assert skipped["skipped"]["bad"] == len(bad)
  assert len(skipped["skipped"]["messages"]) == len(bad)
  assert skipped["bad_records"] == {
    str(path): {
      "id occurs a second time": 1,
      "key 'domain' is missing": 1,
      "not JSON": 1,
      "unknown domain": 1,
    }
  }
  assert clean["skipped"]["bad"] == 0


def test_command(texts, tmp_path, capsys):
  (tmp_path / "rules.yaml").write_text(
    "rules: [{by: column, column: domain, labels: {g/low: low, odd: odd}}]"
  )
  (tmp_path / "low.yaml").write_text(
    "domains: [{fine: low}, {fine: odd}]\nunlabelled: true"
  )
  arguments = [
    sys.executable,
    "-m",
    "data.prepare",
    f"--files={texts}/*.jsonl*",
    f"--taxonomy={tmp_path}/low.yaml",
    f"--labels={tmp_path}/rules.yaml",
    "--tokenizer=byte",
    f"--out={tmp_path}/out",
    "--workers=1",
  ]
  done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  rows = {row["label"]: row for row in manifest["domains"]}
  assert list(rows) == ["low", "odd", "unlabelled"]
  assert (
    rows["low"]["confidence"] == 1 and rows["unlabelled"]["confidence"] == 0
  )
  assert all(row["tokens"] == row["bytes"] for row in rows.values())
  lines = done.stdout.splitlines()
  assert lines[1].split() == ["label", "documents", "bytes", "confidence"]
  assert lines[3].split()[:2] == ["odd", f"{rows['odd']['documents']:,}"]
  assert lines[5].startswith("left out: 0 bad, ")
  assert manifest["skipped"]["duplicate"] > 5
  for wrong, named in (
    ("--tokenizer=bpe:9", "at least 300"),
    ("--tokenizer=none.json", "none.json"),
    ("--workers=0", "--workers=0: must be at least 1"),
    ("--runner=none", "--runner=none: must be local or one of DirectRunner"),
    ("--runner=DataflowRunner", "DataflowRunner needs it in a bucket"),
    ("--workers=none", "--workers=none: must be an integer"),
    ("--held_out_fraction=2", "--held_out_fraction=2"),
    ("--max_characters_per_domain=0", "--max_characters_per_domain=0"),
    ("--max-characters-per-domain=9", "write --max_characters_per_domain"),
    ("--files=none*", "--files=none*: no such file"),
    ("--taxonomy=none.yaml", "none.yaml"),
    ("--worker=1", "did you mean --workers?"),
  ):
    assert command.main([*arguments[3:], f"--out={tmp_path}/other", wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line
    assert not (tmp_path / "other" / "manifest.json").exists()
