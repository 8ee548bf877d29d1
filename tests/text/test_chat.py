"""Chat templates: what they write, where the assistant speaks, what fails."""

import sys

import pytest

from edl_jax.config import DataConfig, UserError
from edl_jax.text.chat import ChatTemplate, find_template
from edl_jax.text.documents import SupervisedExample

# ChatML, as Qwen and others use it.
CHATML = (
  "{% for m in messages %}\n"
  "  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
  "{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n"
  "  {{- '<|im_start|>assistant\\n' }}\n"
  "{%- endif %}\n"
)
MARKED = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
  "A: {% generation %}{{ m.content + eos_token }}{% endgeneration %}"
  "{{ '\\n' }}"
  "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
)
# The thoughts of earlier turns are not kept, as in Qwen3's template.
FORGETFUL = (
  "{% for m in messages %}<{{ m.role }}>"
  "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
  "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
  "{% endif %}"
)


def talk(*contents):
  roles = ("user", "assistant")
  return [
    {"role": roles[number % 2], "content": content}
    for number, content in enumerate(contents)
  ]


def make(template, **variables):
  variables = {"bos_token": "<s>", "eos_token": "</s>"} | variables
  return ChatTemplate(template, "the template", ["<s>", "</s>"], variables)


def parts(template, messages):
  text, cuts = make(template).render(messages, "file:3")
  return SupervisedExample(text, "", "", cuts).parts()


def test_a_turn_is_what_follows_the_prompt_for_an_answer():
  assert parts(CHATML, talk("1+1?", "2", "why?", "because\n")) == [
    ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", False),
    ("2<|im_end|>\n", True),
    ("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n", False),
    ("because\n<|im_end|>\n", True),
  ]
  # The conversation may go on after the assistant.
  assert parts(CHATML, talk("a", "b", "c"))[-1] == (
    "<|im_start|>user\nc<|im_end|>\n",
    False,
  )


def test_marks_decide_and_leave_no_trace():
  # Rows begin with <s> already.
  assert parts(MARKED, talk("1+1?", "2", "why?", "so")) == [
    *(("Q: 1+1?\nA: ", False), ("2</s>", True)),
    *(("\nQ: why?\nA: ", False), ("so</s>", True)),
    ("\n", False),
  ]


def test_a_template_may_rewrite_the_last_turn_alone():
  assert parts(FORGETFUL, talk("a", "b"))[1] == ("<think></think>b", True)
  with pytest.raises(
    UserError,
    match=r"^file:3: in what the template writes, message 2 does not continue"
    r" the .* \{% generation %\} and \{% endgeneration %\}",
  ):
    parts(FORGETFUL, talk("a", "b", "c", "d"))


@pytest.mark.parametrize(
  ("template", "reason"),
  [
    ("{{ messages[5].content }}", r"fails on these messages \(.*list object"),
    ("{{ raise_exception('no\nsystem') }}", r"\(no system\); mend the record"),
    ("{{ 1 / 0 }}", r"fails on these messages \(division by zero\)"),
    ("{% for %}", r"the template is no Jinja template \(.*\); set"),
    ("{{ messages[0].content }}", r"writes no text of the assistant"),
    ("{% generation %}{% endgeneration %}x", "writes no text of the assistant"),
  ],
)
def test_templates_that_fail_are_named(template, reason):
  with pytest.raises(UserError, match=reason) as caught:
    parts(template, talk("a", "b"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "program",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
  ],
)
def test_templates_run_in_a_sandbox(program):
  messages = talk("a", "b")
  try:
    text, _ = make(CHATML + program).render(messages, "file:3")
    # Jinja writes nothing for what it does not let a template see.
    assert text == make(CHATML).render(messages, "file:3")[0]
  except UserError:
    pass
  assert messages == talk("a", "b")


def test_templates_have_no_clock():
  clock = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
  assert parts(clock + CHATML, talk("a", "b")) == parts(CHATML, talk("a", "b"))


def test_json_is_not_escaped_and_tools_are_given():
  template = make("{{ tools | tojson }}{{ '|' }}" + CHATML)
  text, _ = template.render(talk("a", "b"), "x", [{"name": "<é>"}])
  assert text.startswith('[{"name": "<é>"}]|')


def test_jinja_is_optional_and_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
  with pytest.raises(UserError, match="needs the package jinja2: pip install"):
    parts(CHATML, talk("a", "b"))


def test_where_the_template_comes_from(tmp_path):
  assert not find_template(DataConfig()).renders
  source = {"tokenizer_config": {"eos_token": "</s>"}}
  found = find_template(DataConfig(), source, ["<s>", "</s>"])
  assert not found.renders and found.end == "</s>"
  # Without a token of its own, the next document's start ends a completion.
  assert find_template(DataConfig(), source, ["</s>"]).end == ""
  assert find_template(DataConfig(), source, ["<s>"]).end == ""
  config = {"chat_template": MARKED, "bos_token": "<s>", "eos_token": "!"}
  found = find_template(DataConfig(), {"tokenizer_config": config}, ["<s>"])
  assert found.render(talk("a", "b"), "x")[0] == "Q: a\nA: b!\n"
  named = [
    {"name": "tools", "template": "x"},
    {"name": "default", "template": MARKED},
  ]
  config["chat_template"] = named
  found = find_template(DataConfig(), {"tokenizer_config": config}, ["<s>"])
  assert found.render(talk("a", "b"), "x")[0] == "Q: a\nA: b!\n"
  # A file overrules it. Tokenizers made here have one special token.
  path = tmp_path / "chat.jinja"
  path.write_text(MARKED.replace("Q: ", "? "))
  data = DataConfig(chat_template=str(path))
  found = find_template(data, {"tokenizer_config": config}, ["<s>"])
  assert found.render(talk("a", "b"), "x")[0] == "? a\nA: b!\n"
  found = find_template(data)
  assert found.render(talk("a", "b"), "x")[0] == "? a\nA: b<|document|>\n"
  assert found.reserved[0] == "<|document|>"


def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
  from edl_jax.text.tokenizer import byte_tokenizer

  (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
  (tmp_path / "chat.jinja").write_text(CHATML)
  data = DataConfig(
    chat_template=str(tmp_path / "chat.jinja"),
    tokenizer=str(tmp_path / "tokenizer.json"),
  )
  assert find_template(data).reserved[:-2] == ("<|document|>",)


def test_a_missing_file_is_named():
  with pytest.raises(
    UserError, match=r"^data\.chat_template=none\.jinja: cannot be read \(No"
  ):
    find_template(DataConfig(chat_template="none.jinja"))
