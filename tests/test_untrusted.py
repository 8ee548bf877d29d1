"""What people give as data is never code, and never a traceback."""

import ast
import gzip
import json
import pathlib
import pickle
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.labels import load_rules
from edl_jax import config_files
from edl_jax.cache import write_cache
from edl_jax.checkpoint import saved_provenance
from edl_jax.config import FIELDS, DataConfig, UserError
from edl_jax.text import encode
from edl_jax.text.files import find_files
from edl_jax.text.readers import read_records
from edl_jax.text.sources import read_documents
from edl_jax.text.task_files import read_task
from edl_jax.text.taxonomy import load_taxonomy
from edl_jax.text.tokenizer import open_tokenizer
from tests.checkpoint.small_run import PROVENANCE

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")
# Python's own names for running what it is given.
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
LOADS_OBJECTS = {
  "pickle",
  "cPickle",
  "dill",
  "cloudpickle",
  "shelve",
  "marshal",
}

FUZZ = settings(
  deadline=None,
  database=None,
  max_examples=60,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["text", "domain", "origin", "id", "meta", "x"]),
      inner,
      max_size=4,
    )
  ),
  max_leaves=8,
)


def trees():
  for folder in ("edl_jax", "data"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      yield path.relative_to(ROOT), ast.parse(path.read_text())


def test_no_module_runs_or_unpickles_what_it_reads():
  for path, tree in trees():
    for node in ast.walk(tree):
      where = f"{path}:{getattr(node, 'lineno', 0)}"
      if isinstance(node, ast.Import):
        names = {alias.name.partition(".")[0] for alias in node.names}
        assert not names & LOADS_OBJECTS, where
      elif isinstance(node, ast.ImportFrom):
        assert (node.module or "").partition(".")[0] not in LOADS_OBJECTS, where
      elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        assert name not in RUNS_CODE, where
        assert not re.fullmatch(r"yaml\.(unsafe_|full_)?load(_all)?", name), (
          where
        )
        for keyword in node.keywords:
          if keyword.arg == "allow_pickle":
            assert ast.unparse(keyword.value) == "False", where


def refused_or_fine(function, *arguments):
  """Calls a function, which may raise one line for the user, and no more."""
  try:
    return function(*arguments)
  except UserError as error:
    assert "\n" not in str(error)
    return None


def read_all(path):
  for where, found in read_records(str(path)):
    assert where.startswith(str(path))
    if isinstance(found, UserError):
      assert "\n" not in str(found)
    else:
      assert isinstance(found["text"], str)
      found["text"].encode()


NAMES = ["a.jsonl", "a.json", "a.parquet", "a.txt", "a", "a.jsonl.gz", "a.zst"]


@FUZZ
@given(
  name=st.sampled_from(NAMES),
  content=st.binary(max_size=300)
  | JSON.map(lambda value: json.dumps(value).encode())
  | st.lists(JSON, max_size=3).map(
    lambda values: b"\n".join(json.dumps(v).encode() for v in values)
  ),
  packed=st.booleans(),
)
def test_readers(tmp_path, name, content, packed):
  path = tmp_path / name
  path.write_bytes(gzip.compress(content) if packed else content)
  read_all(path)
  refused_or_fine(read_documents, DataConfig(files=str(path), skip_bad=packed))


@FUZZ
@given(at=st.integers(0, 4000), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_parquet(tmp_path, at, bit, cut):
  path = tmp_path / "a.parquet"
  rows = [{"text": f"text {n}", "domain": "d", "n": n} for n in range(20)]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  content = bytearray(path.read_bytes())
  at %= len(content)
  if cut:
    del content[at:]
  else:
    content[at] ^= 1 << bit
  path.write_bytes(content)
  read_all(path)


YAML = JSON.map(json.dumps) | st.text(max_size=60) | st.just("&a [*a]")


@FUZZ
@given(text=YAML | JSON.map(lambda value: json.dumps({"domains": [value]})))
def test_taxonomies(tmp_path, text):
  path = tmp_path / "t.yaml"
  path.write_text(text, encoding="utf-8", errors="replace")
  refused_or_fine(load_taxonomy, str(path))


@FUZZ
@given(text=YAML | JSON.map(lambda value: json.dumps({"rules": [value]})))
def test_rules(tmp_path, text):
  path = tmp_path / "r.yaml"
  path.write_text(text, encoding="utf-8", errors="replace")
  refused_or_fine(load_rules, str(path))


@FUZZ
@given(
  key=st.sampled_from(sorted(FIELDS)),
  text=st.text(max_size=12) | JSON.map(repr),
)
def test_overrides(key, text):
  refused_or_fine(config_files.load, TINY, {key: text})


@FUZZ
@given(value=JSON, content=st.binary(max_size=60), suffix=st.booleans())
def test_tokenizer_files(tmp_path, value, content, suffix):
  path = tmp_path / ("t.model" if suffix else "t.json")
  path.write_bytes(content)
  refused_or_fine(open_tokenizer, str(path))
  path.write_text(json.dumps({"model": value, "normalizer": value}))
  refused_or_fine(open_tokenizer, str(path))


@FUZZ
@given(values=st.lists(JSON, max_size=3))
def test_task_files(tmp_path, values):
  path = tmp_path / "t.jsonl"
  path.write_text("\n".join(map(json.dumps, values)))
  refused_or_fine(read_task, str(path))


@FUZZ
@given(pattern=st.text(alphabet="a*?[]!-/\\.~\x01", max_size=10))
def test_globs(tmp_path, pattern):
  (tmp_path / "a").write_text("x")
  refused_or_fine(find_files, f"{tmp_path}/{pattern}", "data.files")


@FUZZ
@given(value=JSON)
def test_descriptions_of_runs(tmp_path, value):
  (tmp_path / "run.json").write_text(json.dumps(value))
  refused_or_fine(saved_provenance, str(tmp_path))


class Bomb:
  """Unpickling it makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self.path,))


def test_code_in_data_does_not_run(tmp_path, monkeypatch):
  monkeypatch.setenv("EDL_JAX_CACHE", str(tmp_path / "cache"))
  hit = tmp_path / "hit"
  bomb = pickle.dumps(Bomb(hit))
  pickle.loads(bomb)
  assert hit.exists()  # It would work.
  hit.unlink()
  tag = f"domains: !!python/object/apply:pathlib.Path.touch [{str(hit)!r}]"
  for name in (*NAMES, "t.json", "t.model", "t.yaml", "array.npz"):
    path = tmp_path / name
    for content in (bomb, tag.encode()):
      path.write_bytes(content)
      refused_or_fine(lambda path=path: list(read_records(str(path))))
      for read in (open_tokenizer, load_taxonomy, load_rules):
        refused_or_fine(read, str(path))
  # An array of objects in the cache of tokens is one that was never written.
  content = tmp_path / "objects.npz"
  np.savez(content, tokens=np.array([Bomb(hit)], object), lengths=np.array([1]))
  write_cache("tokens-x.npz", content.read_bytes())
  assert encode._unpack(content.read_bytes()) is None
  assert not hit.exists()
  with pytest.raises(yaml.YAMLError):
    yaml.safe_load(tag)


def test_a_description_of_a_run_is_read_back(tmp_path):
  (tmp_path / "run.json").write_text(json.dumps(PROVENANCE.to_dict()))
  assert saved_provenance(str(tmp_path)) is not None
