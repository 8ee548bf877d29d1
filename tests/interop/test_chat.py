"""Chats against Transformers' apply_chat_template: text, tokens and mask."""

import json
import pathlib

import pytest

from edl_jax.config import DataConfig
from edl_jax.interop.tokenizer import read_hub_tokenizer
from edl_jax.text.chat import find_template
from edl_jax.text.encode import encode_corpus
from edl_jax.text.examples import read_example
from edl_jax.text.mixture import Corpus, Taxonomy

PROGRAM = pathlib.Path(__file__).with_name("chat_program.py")
CHATML = (
  "{%- for m in messages %}\n"
  "  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
  "{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n"
  "  {{- '<|im_start|>assistant\\n' }}\n"
  "{%- endif %}\n"
)
TEMPLATES = {
  "chatml": CHATML,
  "marked": (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m['role'] == 'assistant' %}\n"
    "    {% generation %}\n"
    "    {{- m['content'] | trim + eos_token }}{% endgeneration %}\n\n"
    "  {% else %}\n"
    "<|im_start|>{{ m['role'] }}: {{ m | tojson }}<|im_end|>\n"
    "  {% endif %}\n"
    "{% endfor %}"
  ),
  # Macros, namespaces, loop controls and tests of what is defined.
  "program": (
    "{% macro say(m) %}{{ m.role | upper }}>{{ m.content }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ say(m) }}</s>"
    "{% if tools is not none or documents %}{{ raise_exception('x') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ns.n + 1 }}ASSISTANT>{% endif %}"
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_elsewhere):
  folder = tmp_path_factory.mktemp("chats")
  (folder / "templates.json").write_text(json.dumps(TEMPLATES))
  run_elsewhere(PROGRAM, folder / "templates.json", folder)
  return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats(folder, name):
  tokenizer, source = read_hub_tokenizer(str(folder / name))
  special = tuple(tokenizer.special_ids)
  template = find_template(DataConfig(), source, special)
  assert template is not None
  chats = json.loads((folder / name / "chats.json").read_text())
  examples = tuple(
    read_example({"messages": chat["messages"]}, "a", "x", template)
    for chat in chats
  )
  corpus = Corpus(Taxonomy.from_names(["a"]), (examples,), ((),), "hash")
  (encoded,) = encode_corpus(corpus, "train", tokenizer)
  for number, (chat, example) in enumerate(zip(chats, examples)):
    # Rows begin with the token that opens documents.
    start = special[0] if chat["text"].startswith(special[0]) else ""
    assert start + example.text == chat["text"]
    tokens, counted = encoded.read(number)
    skip = 1 if start else 0
    assert tokens.tolist() == chat["ids"][skip:]
    if chat["mask"] is not None:
      assert counted.astype(int).tolist() == chat["mask"][skip:]
      assert 0 < counted.sum() < len(counted)
    said = tokenizer.decode(tokens[counted])
    for message in chat["messages"]:
      if message["role"] == "assistant":
        assert message["content"].strip() in said
      else:
        assert message["content"] not in said
