"""Documents of files: order, duplicates, caps, and errors by place."""

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
  taxonomy, documents = read_documents(DataConfig(files=f"{tmp_path}/*.jsonl"))
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
  _, documents = read_documents(
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
