"""Records of supervised examples: what is refused, and what is read."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from edl_jax.config import DataConfig, UserError
from edl_jax.text.chat import ChatTemplate
from edl_jax.text.documents import SupervisedExample
from edl_jax.text.examples import is_example, plain_text, read_example
from edl_jax.text.mixture import load_corpus
from edl_jax.text.readers import read_records
from edl_jax.text.sources import read_documents

ASKED = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4"}
TEMPLATE = ChatTemplate(
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}",
  "the template",
  ["<s>", "</s>"],
  {},
)


@pytest.mark.parametrize(
  ("record", "meant"),
  [
    ({"text": "a"}, False),
    # Corpora of synthetic text keep the prompt that made it.
    ({"text": "a", "prompt": "b"}, False),
    ({"text": "a", "messages": None, "completion": None}, False),
    ({"prompt": "a"}, True),
    ({"completion": "a"}, True),
    ({"messages": []}, True),
    ({"text": "a", "completion": "b"}, True),
    ({}, False),
  ],
)
def test_which_records_are_meant_as_examples(record, meant):
  assert is_example(record) == meant


@pytest.mark.parametrize(
  ("record", "reason"),
  [
    ({"prompt": "a"}, "key 'completion' is missing; a supervised example has"),
    ({"completion": "a"}, "key 'prompt' is missing; a supervised example has"),
    ({"prompt": "a", "completion": " \n"}, "completion is empty; leave"),
    ({"prompt": 3, "completion": "a"}, "prompt must be a string, not int"),
    (
      {"prompt": "a", "completion": "b", "messages": [ASKED, SAID]},
      "has both completion and messages; keep one",
    ),
    ({"text": "a", "messages": [SAID]}, "has both text and messages; keep one"),
    ({"messages": {}}, "messages must be a list that is not empty"),
    ({"messages": []}, "messages must be a list that is not empty"),
    ({"messages": ["a"]}, "message 1 must be an object with role and content"),
    ({"messages": [ASKED, {"role": "user"}]}, "message 2: key 'content' is"),
    ({"messages": [{"content": "a"}]}, "message 1: key 'role' is missing"),
    (
      {"messages": [ASKED, {"role": "bot", "content": "a"}]},
      "message 2: unknown role 'bot'; must be one of system, developer, user,",
    ),
    (
      {"messages": [ASKED, {"role": "assistant", "content": None}]},
      "message 2: content must be a string, not NoneType",
    ),
    (
      {"messages": [ASKED, {"role": "assistant", "content": " "}]},
      "message 2: the assistant's content is empty; leave",
    ),
    ({"messages": [ASKED]}, "no message has the role assistant, so there is"),
  ],
)
def test_what_is_refused_names_the_line(tmp_path, record, reason):
  with pytest.raises(UserError, match=f"^file:7: {reason}"):
    plain_text(record, "file:7")
  path = tmp_path / "bad.jsonl"
  path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(record))
  (_, good), (place, found) = read_records(str(path), examples=True)
  assert good["text"] == "a" and place == f"{path}:2"
  assert isinstance(found, UserError) and str(found).startswith(f"{path}:2: ")


CALLED = {
  "role": "assistant",
  "content": "so",
  "calls": [{"name": "sum", "terms": [2, 2]}],
}


def test_parquet_is_read_as_json_lines_are(tmp_path):
  # A column gives every message the keys of all, and every tool's arguments.
  tools = [{"name": "sum", "unit": "m"}, {"name": "max"}]
  records = [
    {"prompt": "2 + 2 =", "completion": " 4", "domain": "a", "origin": "b"},
    {"messages": [ASKED, SAID], "domain": "b"},
    {"messages": [ASKED, CALLED], "tools": tools, "domain": "b"},
    {"text": "plain", "domain": "c"},
  ]
  template = ChatTemplate(
    "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}"
    "{% if m.calls is defined %}!{% endif %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endfor %}",
    "the template",
    ["<s>"],
    {},
  )
  lines = tmp_path / "a.jsonl"
  lines.write_text("\n".join(json.dumps(record) for record in records))
  keys = dict.fromkeys(key for record in records for key in record)
  table = pyarrow.Table.from_pylist(
    [{key: record.get(key) for key in keys} for record in records]
  )
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  found = [
    read_documents(DataConfig(files=str(tmp_path / name)), template)
    for name in ("a.jsonl", "a.parquet")
  ]
  assert found[0] == found[1] and len(found[0].documents) == 4
  # A file may have no column of texts.
  table = table.select(["prompt", "completion", "domain"]).slice(0, 1)
  pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
  (document,) = read_documents(
    DataConfig(files=str(tmp_path / "b.parquet"))
  ).documents
  assert document.text == "2 + 2 = 4"


@pytest.mark.parametrize(
  ("record", "examples", "reason"),
  [
    ({"prompt": "a"}, True, "key 'completion' is missing; a supervised"),
    ({"prompt": "a", "completion": " "}, True, "completion is empty; leave"),
    ({"text": "a", "messages": [SAID]}, True, "has both text and messages;"),
    ({"messages": ["a"]}, True, "message 1 must be an object with role"),
    ({"messages": [ASKED]}, True, "no message has the role assistant, so"),
    ({"messages": [SAID]}, False, "a supervised example; only data.files"),
  ],
)
def test_refused_parquet_names_the_row(tmp_path, record, examples, reason):
  path = tmp_path / "bad.parquet"
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
  ((where, found),) = read_records(str(path), examples=examples)
  assert where == f"{path}:row 1" and isinstance(found, UserError)
  assert str(found).startswith(f"{where}: {reason}")


def test_parquet_of_texts_may_have_columns_of_examples(tmp_path):
  path = tmp_path / "a.parquet"
  record = {"text": "a", "messages": [SAID]}
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
  ((_, found),) = read_records(str(path))
  assert found == {"text": "a", "path": str(path)}


def test_other_readers_refuse_examples(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "a", "completion": "b"}')
  ((_, found),) = read_records(str(path))
  assert str(found) == (
    f"{path}:1: a supervised example; only data.files reads them"
  )


def test_rules_read_what_an_example_says():
  assert plain_text({"prompt": "2 + 2 =", "completion": " 4"}, "x") == (
    "2 + 2 = 4"
  )
  assert plain_text({"messages": [ASKED, SAID]}, "x") == "2 + 2?\n\n4"


def test_forms_are_read():
  record = {"prompt": "2 + 2 =", "completion": " 4"}
  assert read_example(record, "math", "x", None) == SupervisedExample(
    "2 + 2 = 4", "math", "2 + 2 =", (7,)
  )
  ended = ChatTemplate(None, "", ["<s>", "</s>"], {"eos_token": "</s>"})
  assert read_example(record, "math", "x", ended).end == "</s>"
  # All examples without a prompt would be on one side of the split.
  record = {"prompt": "", "completion": "4"}
  assert read_example(record, "math", "x", None).origin == "4"
  record = {"messages": [ASKED, SAID], "origin": "book"}
  assert read_example(record, "math", "x", TEMPLATE) == SupervisedExample(
    "[user]2 + 2?[assistant]4", "math", "book", (23,), special=True
  )


@pytest.mark.parametrize("template", [None, ChatTemplate(None, "", [], {})])
def test_messages_need_a_template(template):
  with pytest.raises(
    UserError,
    match=r"^file:7: messages need a chat template: .*"
    r"\(train\.initial_checkpoint\), or set data\.chat_template",
  ):
    read_example({"messages": [ASKED, SAID]}, "math", "file:7", template)


@pytest.mark.parametrize(
  "messages",
  [
    [{"role": "user", "content": "a</s>b"}, SAID],
    [ASKED, {**SAID, "calls": [{"name": "x", "arguments": {"</s>": 1}}]}],
  ],
)
def test_messages_cannot_imitate_the_template(messages):
  with pytest.raises(
    UserError, match=r"^file:7: a message holds '</s>', which"
  ):
    read_example({"messages": messages}, "math", "file:7", TEMPLATE)


def test_whatever_a_template_reads_must_be_text():
  template = ChatTemplate(
    "{% generation %}{{ messages[0].thought }}{% endgeneration %}",
    "the template",
    ["<s>"],
    {},
  )
  record = {"messages": [{**SAID, "thought": "a\ud800"}]}
  with pytest.raises(UserError, match=r"^file:7: messages hold half a surr"):
    read_example(record, "math", "file:7", template)


def test_deep_values_are_looked_through():
  deep = "</s>"
  for _ in range(3000):
    deep = [deep]
  record = {"messages": [ASKED, {**SAID, "calls": deep}]}
  with pytest.raises(UserError, match="a message holds '</s>'"):
    read_example(record, "math", "file:7", TEMPLATE)


def write(folder, records):
  path = folder / "data.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  return str(path)


def test_completions_of_a_prompt_are_on_one_side_of_the_split(tmp_path):
  records = [
    {"prompt": f"{n} is ", "completion": end, "domain": "a"}
    for n in range(40)
    for end in ("even", "odd")
  ]
  corpus = load_corpus(DataConfig(files=write(tmp_path, records)))
  sides = [
    {each.origin for each in group[0]}
    for group in (
      corpus.train,
      corpus.held_out,
    )
  ]
  assert corpus.supervised
  assert len(sides[0]) + len(sides[1]) == 40 and not sides[0] & sides[1]


def test_a_domain_has_one_kind(tmp_path):
  records = [{"text": f"text {n}", "domain": "a"} for n in range(5)]
  examples = [{"prompt": f"{n}", "completion": "b"} for n in range(5)]
  path = write(tmp_path, [*records, *({**e, "domain": "b"} for e in examples)])
  corpus = load_corpus(DataConfig(files=path))
  kinds = [isinstance(own[0], SupervisedExample) for own in corpus.train]
  assert kinds == [False, True] and corpus.supervised
  path = write(tmp_path, [*records, *({**e, "domain": "a"} for e in examples)])
  with pytest.raises(UserError, match="domain 'a' has both texts and superv"):
    load_corpus(DataConfig(files=path))


def test_bad_examples_may_be_left_out(tmp_path):
  records = [{"prompt": f"{n}", "completion": "b"} for n in range(5)]
  records[3]["completion"] = ""
  path = write(tmp_path, [{**each, "domain": "a"} for each in records])
  with pytest.raises(UserError, match=rf"^{path}:4: completion is empty"):
    load_corpus(DataConfig(files=path))
  corpus = load_corpus(DataConfig(files=path, skip_bad=True))
  assert corpus.notes[0] == "left out 1 bad records:"
  assert sum(count for count, _ in corpus.sizes()) == 4
