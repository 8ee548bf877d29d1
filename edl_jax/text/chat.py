"""Chat templates: Jinja programs that write messages as text.

A template comes with somebody's checkpoint, so it runs in Jinja's sandbox: it
reads the messages and can neither reach Python's objects nor change anything.
It gets the names that Transformers gives it (messages, tools, special tokens,
add_generation_prompt, raise_exception, the filter tojson), but no clock: the
same messages are the same text tomorrow.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edl_jax.config import DataConfig, UserError
from edl_jax.text.streams import need_package, reason
from edl_jax.text.tokenizer_files import (
  DOCUMENT_START,
  document_start,
  read_tokenizer,
  special_tokens,
)

ASSISTANT = "assistant"

# Around what a template marks by {% generation %}. Unicode reserves both for
# use inside a program; they are no characters of any text.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
  """Renders messages as text, and says where the assistant speaks."""

  def __init__(
    self,
    template: str | None,
    source: str,
    special: Sequence[str],
    variables: Mapping[str, Any],
  ):
    """Keeps the template, which is compiled when it is first used.

    Args:
      template: a Jinja program; None if there is none.
      source: where it is from, for messages.
      special: the tokenizer's special tokens; the first one opens documents.
      variables: what the template reads besides messages, such as bos_token.
    """
    self._template, self._source = template, source
    self._start, self._variables = next(iter(special), ""), variables
    self.renders = template is not None
    # The special token that ends a completion, "" for the document start.
    end = str(variables.get("eos_token", ""))
    self.end = end if end in special and end != self._start else ""
    # What no message may hold.
    self.reserved = (*special, _BEGIN, _END)

  def render(
    self, messages: Sequence[Mapping[str, Any]], where: str, tools: Any = None
  ) -> tuple[str, tuple[int, ...]]:
    """Renders a conversation.

    The assistant speaks where the template says so by {% generation %}, as
    Transformers reads it. Without these marks, a turn of the assistant is what
    its message adds to the messages before it and the prompt for an answer: the
    text that a model is asked to generate, with what ends it.

    Returns:
      The text without the token that opens documents, which rows have already;
      and where its parts begin, see `SupervisedExample.cuts`.

    Raises:
      UserError: the template fails or writes nothing for the assistant, or a
        turn cannot be told from the rest.
    """
    assert self._template is not None, "the caller checks"
    marked = _MARK.search(self._template) is not None
    whole = self._write(messages, tools, where)
    if marked:
      text, cuts = _without_marks(whole)
    else:
      text, cuts = whole, self._turns(whole, messages, tools, where)
    if not any(a < b for a, b in zip(cuts[::2], (*cuts[1::2], len(text)))):
      raise UserError(
        f"{where}: {self._source} writes no text of the assistant"
      )
    if text.startswith(self._start):
      skip = len(self._start)
      text, cuts = text[skip:], [max(0, cut - skip) for cut in cuts]
    return text, tuple(cuts)

  def _turns(
    self,
    whole: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    where: str,
  ) -> list[int]:
    """Returns the cuts of a template without marks."""
    cuts: list[int] = []
    for number, message in enumerate(messages):
      if message["role"] != ASSISTANT:
        continue
      before = self._write(messages[:number], tools, where, prompt=True)
      through = self._write(messages[: number + 1], tools, where)
      known = whole.startswith(through) and through.startswith(before)
      if not known or len(before) < max(cuts, default=0):
        raise UserError(
          f"{where}: in what {self._source} writes, message {number + 1} does"
          " not continue the messages before it and the prompt for an answer,"
          " so its tokens cannot be told; set data.chat_template to a copy that"
          " puts {% generation %} and {% endgeneration %} around what the"
          " assistant says"
        )
      cuts += [len(before), len(through)]
    # No last part without text.
    return cuts[:-1] if cuts[-1] == len(whole) else cuts

  def _write(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    where: str,
    prompt: bool = False,
  ) -> str:
    try:
      return self._program.render(
        **self._variables,
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=prompt,
      )
    except UserError:
      raise
    except Exception as error:  # A program can fail in any way.
      raise UserError(
        f"{where}: {self._source} fails on these messages ({reason(error)});"
        " mend the record, or set data.chat_template to another template"
      ) from error

  @functools.cached_property
  def _program(self) -> Any:
    """The compiled template."""
    environment = _environment()
    try:
      return environment.from_string(self._template)
    except Exception as error:  # As above; syntax errors among others.
      raise UserError(
        f"{self._source} is no Jinja template ({reason(error)}); set"
        " data.chat_template to one"
      ) from error


def _without_marks(text: str) -> tuple[str, list[int]]:
  """Returns a text without marks, and where they were."""
  pieces = re.split(f"[{_BEGIN}{_END}]", text)
  cuts, at = [], 0
  for piece in pieces[:-1]:
    at += len(piece)
    cuts.append(at)
  if cuts and not pieces[-1]:
    cuts.pop()
  return "".join(pieces), cuts


def _environment() -> Any:
  """Returns the sandbox, set up as Transformers sets it up."""
  purpose = "rendering messages by a chat template"
  sandbox = need_package("jinja2.sandbox", purpose)
  nodes = need_package("jinja2.nodes", purpose)
  extension = need_package("jinja2.ext", purpose)

  class Generation(extension.Extension):
    """The block {% generation %}, whose output it puts between marks."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno

      def mark(character: str) -> Any:
        return nodes.Output([nodes.TemplateData(character)], lineno=line)

      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return [mark(_BEGIN), nodes.Scope(body, lineno=line), mark(_END)]

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, extension.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  return environment


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Writes JSON as it is; Jinja's own filter escapes it for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise_exception(message: str) -> None:
  raise ValueError(message)


def find_template(
  data: DataConfig,
  source: Mapping[str, Any] | None = None,
  special: Sequence[str] = (),
) -> ChatTemplate:
  """Returns the template of `data.chat_template`, else of imported weights.

  Without either, it renders nothing, but knows how completions end.

  Args:
    data: settings.
    source: of the provenance of the weights that the run starts from.
    special: the special tokens of the tokenizer, of which the first opens
      documents; if empty, those of `data.tokenizer`.

  Raises:
    UserError: a file cannot be read.
  """
  variables = dict((source or {}).get("tokenizer_config", {}))
  template = variables.pop("chat_template", None)
  name = "the chat template of the imported checkpoint"
  if data.chat_template:
    name = f"data.chat_template={data.chat_template}"
    try:
      template = Path(data.chat_template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{name}: cannot be read ({reason(error)})") from error
  elif isinstance(template, list):
    # Several templates with names, of which "default" is the one to chat.
    by_name = {each["name"]: each["template"] for each in template}
    template = by_name.get("default")
  if not isinstance(template, str):
    return ChatTemplate(None, name, special, variables)
  special = special or _special_tokens(data.tokenizer)
  if not source:
    # What the export of such a run tells Transformers.
    variables = {"bos_token": special[0], "eos_token": special[0]}
  return ChatTemplate(template, name, special, variables)


def _special_tokens(tokenizer: str) -> list[str]:
  """Returns the special tokens of `data.tokenizer`, document start first."""
  if tokenizer in ("bpe", "byte"):
    return [DOCUMENT_START]
  library, start = read_tokenizer(tokenizer)
  start = start or document_start(library)
  names = special_tokens(library).values()
  return sorted(names, key=lambda name: name != start)
