"""Documents of files: order, duplicates, caps, and errors by place."""

import dataclasses
import json

import pytest

from edl_jax.config import DataConfig, UserError
from edl_jax.text.sources import read_documents


def write(path, *records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return str(path)


def test_json_lines(tmp_path):
  write(
    tmp_path / "b.jsonl",
    {"text": "two", "domain": "web"},
    "",
    {"text": "one", "domain": "web"},
    {"text": " \n", "domain": "web"},
  )
  write(
    tmp_path / "a.jsonl",
    {"text": "zwei\u2028", "domain": "de/books"},
    {"text": "one", "domain": "books"},
    {"text": "drei", "domain": "books", "origin": "shelf"},
  )
  taxonomy, documents, _ = read_documents(
    DataConfig(files=f"{tmp_path}/*.jsonl")
  )
  assert taxonomy.names == ("de/books", "web")
  assert [(d.domain, d.text, d.origin) for d in documents] == [
    ("books", "zwei\u2028", "zwei\u2028"),
    ("books", "one", "one"),
    ("books", "drei", "shelf"),
    # "one" again is a duplicate, in another domain too.
    ("web", "two", "two"),
  ]


def test_json_lines_are_cut_at_the_cap(tmp_path):
  files = write(
    tmp_path / "a.jsonl",
    *({"text": f"{n:010}", "domain": "x"} for n in range(5)),
    {"text": "short", "domain": "y"},
  )
  _, documents, _ = read_documents(
    DataConfig(files=files, max_characters_per_domain=25)
  )
  assert [len(d.text) for d in documents] == [10, 10, 5, 5]


def test_byte_order_mark_is_accepted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "t", "domain": "d"}\n')
  assert read_documents(DataConfig(files=str(path)))[0].fine == ("d",)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{'text': 1}", "not JSON"),
    ('{"text": "cut', "not JSON"),
    ("9" * 5000, "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "not an object, but list"),
    ('{"domain": "a"}', "key 'text' is missing"),
    ('{"text": "t"}', "key 'domain' is missing"),
    ('{"text": 3, "domain": "a"}', "text must be a string, not int"),
    ('{"text": "t", "domain": null}', "domain must be a string"),
    ('{"text": "t", "domain": "a", "origin": 1}', "origin must be a string"),
    ('{"text": "t", "domain": "c"}', "unknown domain 'c'; .* a, g/b"),
    ('{"text": "t", "domain": "x/y/a"}', "must be fine or coarse/fine"),
    ('{"text": "t", "domain": ""}', "must be fine or coarse/fine"),
    (r'{"text": "\ud800", "domain": "a"}', "half a surrogate pair"),
    (b'{"text": "\xff", "domain": "a"}', "not UTF-8"),
  ],
)
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "a.jsonl"
  good = b'{"text": "good", "domain": "a"}\n'
  bad = line if isinstance(line, bytes) else line.encode()
  path.write_bytes(good + b"\n" + bad + b"\n" + good)
  data = DataConfig(files=str(path), domains=("a", "g/b"))
  with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}") as error:
    read_documents(data)
  assert "\n" not in str(error.value)


def test_empty_domain_and_missing_files(tmp_path):
  files = write(tmp_path / "a.jsonl", {"text": "t", "domain": "a"})
  with pytest.raises(UserError, match="empty domain 'b'"):
    read_documents(DataConfig(files=files, domains=("a", "b")))
  with pytest.raises(UserError, match=r"nothing\*: no such file"):
    read_documents(DataConfig(files=f"{tmp_path}/nothing*"))
  blank = write(tmp_path / "blank.jsonl", "")
  with pytest.raises(UserError, match="no text"):
    read_documents(DataConfig(files=blank))


def test_bad_records_are_left_out_and_counted(tmp_path):
  bad = ["{", "[1]", {"text": 3}, {"text": "x", "domain": "c"}, '"\\ud800"']
  good = {"text": "good", "domain": "a", "id": 1}
  path = write(tmp_path / "a.jsonl", *bad, good, {**good, "text": "again"})
  data = DataConfig(files=path, domains=("a",), skip_bad=True)
  taxonomy, documents, notes = read_documents(data)
  assert taxonomy.fine == ("a",) and [d.text for d in documents] == ["good"]
  assert notes[0] == "left out 6 bad records:"
  assert len(notes) == 6 and notes[1].startswith(f"  {path}:1: not JSON")
  with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON"):
    read_documents(dataclasses.replace(data, skip_bad=False))


def test_a_domain_that_vanishes_is_told(tmp_path):
  path = write(
    tmp_path / "a.jsonl",
    {"text": "t", "domain": "a"},
    {"text": "t", "domain": "copies"},
    {"text": " ", "domain": "copies"},
    {"text": "", "domain": "blank"},
  )
  taxonomy, _, notes = read_documents(DataConfig(files=path))
  assert taxonomy.fine == ("a",)
  assert [note.split(":")[0] for note in notes] == [
    "domain 'copies' is left out",
    "domain 'blank' is left out",
  ]
  assert "each of its 2 texts" in notes[0]


SHARED = [
  {"text": f"{coarse} {n}", "domain": f"{coarse}/news"}
  for n in range(3)
  for coarse in ("en", "de", "fr")
] + [{"text": "x", "domain": "en/law"}, {"text": "y", "domain": "code"}]


def test_fine_labels_that_coarse_ones_share(tmp_path):
  path = write(tmp_path / "a.jsonl", *SHARED)
  taxonomy, documents, _ = read_documents(DataConfig(files=path))
  assert taxonomy.names == (
    *("code", "de/de_news", "en/en_news", "en/law", "fr/fr_news"),
  )
  assert [(d.domain, d.text) for d in documents] == [
    ("code", "y"),
    *(("de_news", f"de {n}") for n in range(3)),
    *(("en_news", f"en {n}") for n in range(3)),
    ("law", "x"),
    *(("fr_news", f"fr {n}") for n in range(3)),
  ]
  declared = ("de/news", "fr/news", "en/news", "code", "law")
  taxonomy, documents, _ = read_documents(
    DataConfig(files=path, domains=declared)
  )
  assert taxonomy.fine == ("de_news", "fr_news", "en_news", "code", "law")
  assert [d.text for d in documents[:4]] == ["de 0", "de 1", "de 2", "fr 0"]
  # The names that result may be declared too.
  again = read_documents(DataConfig(files=path, domains=taxonomy.names))
  assert again[:2] == (taxonomy, documents)


@pytest.mark.parametrize("other", ["news", "x/en_news"])
def test_fine_labels_that_nothing_tells_apart(tmp_path, other):
  path = write(tmp_path / "a.jsonl", *SHARED, {"text": "z", "domain": other})
  with pytest.raises(
    UserError, match="domain 'news' occurs under several coarse"
  ):
    read_documents(DataConfig(files=path))
