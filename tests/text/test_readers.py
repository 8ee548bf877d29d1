import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from edl_jax.config import DataConfig, UserError
from edl_jax.text import readers
from edl_jax.text.files import find_files
from edl_jax.text.readers import SeenIds, read_records
from edl_jax.text.sources import read_documents

RECORDS = [
  {"text": f"text {n} \u2028 汉", "domain": "g/a", "origin": f"book {n // 3}"}
  for n in range(2500)
]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


def write(path, content):
  path.write_bytes(content)
  return str(path)


def read(path, root=""):
  """Returns the records without their path, and the places and messages."""
  records, problems = [], []
  for where, found in read_records(path, root):
    if isinstance(found, UserError):
      assert "\n" not in str(found) and str(found).startswith(path)
      assert where.startswith(path)
      problems.append(str(found).removeprefix(path))
    else:
      assert found.pop("path") == path
      records.append(found)
  return records, problems


def parquet(path, records, **columns):
  table = pyarrow.Table.from_pylist(records)
  for name, values in columns.items():
    table = table.append_column(name, [values])
  pyarrow.parquet.write_table(table, path, row_group_size=600)
  return str(path)


# --- Good files --------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a"])
@pytest.mark.parametrize(
  ("suffix", "compress"),
  [
    ("", bytes),
    (".gz", gzip.compress),
    (".zst", zstandard.compress),
    # Files appended to each other.
    (".gz", lambda b: gzip.compress(b[:999]) + gzip.compress(b[999:])),
    (
      ".zst",
      lambda b: zstandard.compress(b[:999]) + zstandard.compress(b[999:]),
    ),
  ],
)
def test_json_lines(tmp_path, name, suffix, compress):
  path = write(tmp_path / f"{name}{suffix}", compress(LINES))
  assert read(path) == (RECORDS, [])


def test_parquet(tmp_path):
  path = parquet(tmp_path / "a.parquet", RECORDS)
  assert read(path) == (RECORDS, [])
  places = [where for where, _ in read_records(path)]
  assert places[::2499] == [f"{path}:row 1", f"{path}:row 2500"]


def test_plain_files_are_labelled_by_folder(tmp_path):
  for name in ("top.txt", "x/a.md", "x/y/b.txt", "x/y/z/c.py", "x/y/empty.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"{name}\n" * (name != "x/y/empty.txt"))
  write(tmp_path / "x/z.txt.gz", gzip.compress(b"x/z.txt\n"))
  root, paths = find_files(f"{tmp_path}/**", "data.files")
  assert root == str(tmp_path)
  found = [record for path in paths for record in read(path, root)[0]]
  assert [(record["text"], record["domain"]) for record in found] == [
    ("top.txt\n", None),
    ("x/a.md\n", "x"),
    ("x/y/b.txt\n", "x/y"),
    ("x/y/z/c.py\n", "x/y"),
    ("x/z.txt\n", "x"),
  ]
  taxonomy, documents, _ = read_documents(DataConfig(files=f"{tmp_path}/*/**"))
  assert taxonomy.names == ("x", "x/y")
  taxonomy, documents, _ = read_documents(
    DataConfig(files=f"{tmp_path}/x/y/**/*.py")
  )
  assert (taxonomy.fine, documents[0].text) == (("z",), "x/y/z/c.py\n")


@pytest.fixture(scope="module")
def tfds_files(tmp_path_factory):
  """A TFDS data set in ArrayRecord, written as TFDS does."""
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  features = tfds.features.FeaturesDict(
    {
      "text": tfds.features.Text(),
      "fine": tfds.features.ClassLabel(names=["code", "law"]),
      "coarse": tfds.features.ClassLabel(names=["code", "prose"]),
      "origin": tfds.features.Text(),
    }
  )
  folder = tmp_path_factory.mktemp("tfds")
  features.save_config(folder)
  path = str(folder / "domain_text-train.array_record-00000-of-00001")
  writer = ArrayRecordWriter(path, "group_size:1")
  for n in range(1500):
    fine = ("code", "law")[n % 2]
    example = {
      "text": f"汉 {n}",
      "fine": fine,
      "coarse": "code" if fine == "code" else "prose",
      "origin": f"o{n}",
    }
    writer.write(features.serialize_example(features.encode_example(example)))
  writer.close()
  return path


def test_array_record(tfds_files):
  records, problems = read(tfds_files)
  assert not problems
  assert [record["text"] for record in records] == [
    f"汉 {n}" for n in range(1500)
  ]
  assert [r["domain"] for r in records[:3]] == ["code", "prose/law", "code"]
  assert records[7]["origin"] == "o7"


def test_every_kind_gives_the_same_documents(tmp_path):
  (tmp_path / "shelf").mkdir()
  write(tmp_path / "a.jsonl.zst", zstandard.compress(LINES))
  parquet(tmp_path / "b.parquet", RECORDS, note=[1] * 2500)
  zst, rows = (
    read_documents(DataConfig(files=f"{tmp_path}/{name}"))
    for name in ("a.*", "b.*")
  )
  assert zst == rows and len(zst[1]) == 2500
  assert read_documents(DataConfig(files=f"{tmp_path}/*")) == zst


# --- Bad files ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_cut_off_and_damaged_streams(tmp_path, suffix, compress):
  whole = compress(LINES)
  for content in (whole[:-9], whole[: len(whole) // 2]):
    records, problems = read(write(tmp_path / f"a.jsonl{suffix}", content))
    # Whole lines before the cut may be there; none is made up.
    assert records == RECORDS[: len(records)]
    (problem,) = problems
    assert problem.startswith(f":{len(records) + 1}: cannot be read further")
  damaged = bytearray(whole)
  damaged[len(whole) // 2] ^= 0xFF
  for content in (bytes(damaged), b"no archive", whole + b"?"):
    records, problems = read(write(tmp_path / f"a.jsonl{suffix}", content))
    # Checksums come last: damage may show in lines before.
    assert "cannot be read further" in problems[-1]
    path = write(tmp_path / f"a.txt{suffix}", content)
    records, problems = read(path)
    assert not records and "cannot be read further" in problems[0]


def test_what_a_bad_line_leaves_is_read(tmp_path):
  bad = [b"{", b'{"text": 1}', b"\xff", b'{"domain": "d"}', b'"' + b"x" * 99]
  good = b'{"text": "t"}'
  path = write(tmp_path / "a.jsonl", b"\n".join([good, *bad, good, b"", good]))
  records, problems = read(path)
  assert records == [{"text": "t"}] * 3
  assert [p.split(": ")[0] for p in problems] == [":2", ":3", ":4", ":5", ":6"]
  assert "not UTF-8 (invalid start byte at byte 1)" in problems[2]


@pytest.mark.parametrize("last", [b"", b"\n", b'\n{"text": "t"}\n'])
def test_endless_line(tmp_path, monkeypatch, last):
  monkeypatch.setattr(readers, "LONGEST_RECORD", 100)
  longest = json.dumps({"text": "x" * (99 - len('{"text": ""}'))}).encode()
  assert len(longest) == 99
  content = longest + b"\n" + b'{"text": "' + b"x" * 1000 + last
  records, problems = read(write(tmp_path / "a.jsonl", content))
  assert len(records) == 1 + last.endswith(b"}\n")
  (problem,) = problems
  end = 1110 + len(last[:1])
  assert problem == (
    f":2: longer than 100 bytes (the line from byte 100 to {end})"
  )
  path = write(tmp_path / "a.txt", b"x" * 101)
  assert read(path) == ([], [": a text of more than 100 bytes"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_line_of_two_gigabytes_does_not_fill_the_memory(tmp_path):
  path = tmp_path / "a.jsonl"
  with open(path, "wb") as file:
    file.write(b'{"text": "t"}\n')
    file.truncate(2**31)  # Zeros, that take no room.
  program = (
    "import sys\n"
    "from edl_jax.text.readers import read_records\n"
    "found = [str(f)[-70:] for _, f in read_records(sys.argv[1])]\n"
    # getrusage would count the tests too, which started this program.
    "status = open('/proc/self/status').read().split()\n"
    "print(status[status.index('VmHWM:') + 1], found[1])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(path)],
    capture_output=True,
    text=True,
    check=True,
  )
  peak, message = done.stdout.split(" ", 1)
  assert f"the line from byte 14 to {2**31})" in message
  assert int(peak) < 2**20  # Kibibytes.


@pytest.mark.parametrize(
  ("name", "compress"),
  [
    ("a.jsonl", bytes),
    ("a.jsonl.gz", gzip.compress),
    ("a.jsonl.zst", zstandard.compress),
    ("a.parquet", bytes),
    ("a", bytes),
    ("a.txt", bytes),
  ],
)
def test_empty_files_have_no_records(tmp_path, name, compress):
  assert read(write(tmp_path / name, compress(b""))) == ([], [])
  schema = pyarrow.schema([("text", pyarrow.string())])
  pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "b.parquet")
  assert read(str(tmp_path / "b.parquet")) == ([], [])


def test_bad_parquet(tmp_path):
  path = parquet(tmp_path / "a.parquet", [{"content": "x", "domain": "d"}])
  assert read(path)[1] == [": no column 'text'; there are: content, domain"]
  rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
  path = parquet(tmp_path / "b.parquet", rows)
  records, problems = read(path)
  assert [record["text"] for record in records] == ["a", "b"]
  assert problems == [":row 2: text must be a string, not NoneType"]
  content = (tmp_path / "b.parquet").read_bytes()
  path = write(tmp_path / "c.parquet", content[:-20])
  assert ":row 1: cannot be read further" in read(path)[1][0]
  # The footer is whole, a column's page is not.
  path = parquet(tmp_path / "d.parquet", RECORDS)
  content = bytearray((tmp_path / "d.parquet").read_bytes())
  content[4:900] = b"?" * 896
  _, problems = read(write(tmp_path / "d.parquet", bytes(content)))
  assert "cannot be read further" in problems[0]


def test_bad_array_record(tmp_path, tfds_files):
  with open(tfds_files, "rb") as file:
    content = file.read()
  path = write(tmp_path / "a-train.array_record-00000-of-00001", content)
  _, problems = read(path)
  assert "cannot be read further" in problems[0]  # No features.json.
  for name in ("features.json", "fine.labels.txt", "coarse.labels.txt"):
    source = f"{tfds_files.rsplit('/', 1)[0]}/{name}"
    with open(source, "rb") as file:
      write(tmp_path / name, file.read())
  assert len(read(path)[0]) == 1500
  write(tmp_path / "a-train.array_record-00000-of-00001", content[: 1 << 14])
  assert read(path)[1]


def test_plain_file_in_another_encoding(tmp_path):
  path = write(tmp_path / "a.txt", "caf\xe9".encode("latin-1"))
  (problem,) = read(path)[1]
  assert problem.startswith(": not UTF-8 (") and "at byte 4" in problem
  assert read(str(tmp_path)) == (
    [],
    [": cannot be read further (Is a directory)"],
  )


def test_errors_reach_the_user(tmp_path):
  write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)[:-9])
  with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: cannot be read"):
    read_documents(DataConfig(files=f"{tmp_path}/*"))
  with pytest.raises(UserError, match=r"data\.files=.*none: no such file"):
    find_files(f"{tmp_path}/none", "data.files")
  path = tmp_path / "b.jsonl"
  path.write_text('{"text": "a", "domain": "d", "id": 7}\n' * 2)
  with pytest.raises(UserError, match=r"b\.jsonl:2: id '7' occurs a second"):
    read_documents(DataConfig(files=str(path)))


def test_ids():
  seen = SeenIds()
  for record in ({"id": "a"}, {}, {"id": None}, {}, {"id": 1}):
    assert seen.problem(record, "there") is None
  assert seen.problem({"id": 1}, "f:1") is None
  assert str(seen.problem({"id": "1"}, "f:9")) == (
    "f:9: id '1' occurs a second time"
  )
  # Data sets count the records of each file anew.
  assert seen.problem({"id": 1}, "g:1") is None


# --- What people really have --------------------------------------------------


def test_arrays_of_objects(tmp_path):
  for indent in (None, 2):
    content = json.dumps(RECORDS, indent=indent).encode()
    path = write(tmp_path / "a.json", content)
    assert read(path) == (RECORDS, [])
  places = [where for where, _ in read_records(path)]
  assert places[::2499] == [f"{path}:item 1", f"{path}:item 2500"]
  packed = write(tmp_path / "a.JSON.GZ", gzip.compress(content))
  assert read(packed) == (RECORDS, [])
  assert read(write(tmp_path / "b.json", b" [ ] ")) == ([], [])


@pytest.mark.parametrize(
  ("content", "good", "message"),
  [
    (
      b'[{"text": "t"}, 3, {"text": "u"}]',
      2,
      ":item 2: not an object, but int",
    ),
    (b'[{"text": "t"}, {"te', 1, ":item 2: not JSON"),
    (
      b'[{"text": "t"} {"text": "u"}]',
      1,
      ":item 2: not JSON (, or ] is missing",
    ),
    (b'[{"text": "t"}', 1, ":item 2: not JSON (, or ] is missing)"),
    (b'[{"text": "\xff"}]', 0, ":item 1: cannot be read further"),
    (b"[" * 100_000, 0, ":item 1: not JSON"),
  ],
)
def test_bad_arrays(tmp_path, content, good, message):
  records, (problem,) = read(write(tmp_path / "a.json", content))
  assert len(records) == good and problem.startswith(message)


def test_text_that_begins_with_a_bracket_is_text(tmp_path):
  ((record,), _) = read(write(tmp_path / "song", b"[Intro] la la\n"))
  assert record["text"] == "[Intro] la la\n"


def test_one_row_that_cannot_be_read_leaves_the_others(tmp_path):
  offsets = pyarrow.array(["a", "xxxx", "b"]).buffers()[1]
  bad = pyarrow.Array.from_buffers(
    pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"aa\xff\xfebb")]
  )
  table = pyarrow.table({"text": bad, "domain": ["d"] * 3})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  records, (problem,) = read(str(tmp_path / "a.parquet"))
  assert [record["text"] for record in records] == ["a", "b"]
  assert problem.startswith(":row 2: text cannot be read ('utf-8' codec")


def test_columns_that_nobody_needs_are_not_read(tmp_path):
  # Python has no nanoseconds: these cannot be converted without pandas.
  moments = pyarrow.array([1, 2, 3], pyarrow.timestamp("ns"))
  path = parquet(
    tmp_path / "a.parquet",
    [{"text": t, "meta": {"set": "s"}} for t in "abc"],
    date=moments,
  )
  assert read(path) == ([{"text": t} for t in "abc"], [])
  found = [record for _, record in read_records(path, columns=["meta"])]
  assert [record["meta"] for record in found] == [{"set": "s"}] * 3


def test_text_stored_as_bytes(tmp_path):
  table = pyarrow.table({"text": [b"a", "é".encode(), b"\xff"]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  records, problems = read(str(tmp_path / "a.parquet"))
  assert [record["text"] for record in records] == ["a", "é"]
  assert problems[0].startswith(":row 3: text cannot be read (")


def test_domains_of_hive_folders(tmp_path):
  for label in ("news", "a%2Fb", "__HIVE_DEFAULT_PARTITION__"):
    folder = tmp_path / "t" / "year=2024" / f"domain={label}"
    folder.mkdir(parents=True)
    parquet(folder / "x.parquet", [{"text": label}])
    write(folder / "y.jsonl", b'{"text": "own", "domain": "d"}\n')
    write(folder / "z.txt", label.encode())
  _, paths = find_files(f"{tmp_path}/t/**/*", "data.files")
  found = [r for path in paths for r in read(path, str(tmp_path / "t"))[0]]
  assert {(r["text"], r["domain"]) for r in found} == {
    ("__HIVE_DEFAULT_PARTITION__", None),
    ("a%2Fb", "a/b"),
    ("news", "news"),
    ("own", "d"),
  }
  assert {r["year"] for r in found} == {"2024"}


@pytest.mark.parametrize(
  ("label", "name"), [(3, "3"), (0, "0"), (-1, "-1"), (4.0, "4")]
)
def test_labels_that_are_integers(tmp_path, label, name):
  record = {"text": "t", "domain": label}
  path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
  assert read(path)[0][0]["domain"] == name
  assert read(parquet(tmp_path / "a.parquet", [record]))[0][0]["domain"] == name


@pytest.mark.parametrize("label", [True, 1.5, ["a"], {"a": 1}])
def test_labels_that_are_no_name(tmp_path, label):
  record = {"text": "t", "domain": label}
  path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
  assert "domain must be a string" in read(path)[1][0]
