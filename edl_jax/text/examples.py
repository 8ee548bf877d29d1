"""Supervised examples: records with a prompt and a completion, or messages.

  {"prompt": "2 + 2 =", "completion": " 4", "domain": "math"}
  {"messages": [{"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "4"}], "domain": "math"}

The loss counts completions, and what the assistant says, alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from edl_jax.config import UserError
from edl_jax.text.chat import ASSISTANT, ChatTemplate
from edl_jax.text.documents import SupervisedExample

ROLES = ("system", "developer", "user", ASSISTANT, "tool")

_FORMS = "a supervised example has prompt and completion, or messages"


def is_example(record: Mapping[str, Any]) -> bool:
  """Returns whether a record is meant as a supervised example.

  A prompt beside a text is a column like any other.
  """
  return (
    _has(record, "messages")
    or _has(record, "completion")
    or (_has(record, "prompt") and not _has(record, "text"))
  )


def _has(record: Mapping[str, Any], key: str) -> bool:
  # A column of a table is null where a record has none.
  return record.get(key) is not None


def plain_text(record: Mapping[str, Any], where: str) -> str:
  """Returns what an example says, without a template, for rules and models.

  Raises:
    UserError: the record is no whole example; names its place, `where`.
  """
  forms = [k for k in ("text", "completion", "messages") if _has(record, k)]
  if len(forms) > 1:
    raise UserError(
      f"{where}: has both {forms[0]} and {forms[1]}; keep one of the two"
    )
  if _has(record, "messages"):
    _check_messages(record["messages"], where)
    return "\n\n".join(message["content"] for message in record["messages"])
  for key in ("prompt", "completion"):
    if not _has(record, key):
      raise UserError(f"{where}: key {key!r} is missing; {_FORMS}")
    _check_text(record[key], f"{where}: {key}")
  if not record["completion"].strip():
    raise UserError(f"{where}: completion is empty; leave the record out")
  return record["prompt"] + record["completion"]


def _check_text(value: Any, name: str) -> None:
  if not isinstance(value, str):
    raise UserError(f"{name} must be a string, not {type(value).__name__}")


def _check_messages(messages: Any, where: str) -> None:
  if not isinstance(messages, list) or not messages:
    raise UserError(f"{where}: messages must be a list that is not empty")
  spoken = False
  for number, message in enumerate(messages, start=1):
    name = f"{where}: message {number}"
    if not isinstance(message, dict):
      raise UserError(f"{name} must be an object with role and content")
    for key in ("role", "content"):
      if key not in message:
        raise UserError(f"{name}: key {key!r} is missing")
      _check_text(message[key], f"{name}: {key}")
    if message["role"] not in ROLES:
      raise UserError(
        f"{name}: unknown role {message['role']!r}; must be one of"
        f" {', '.join(ROLES)}"
      )
    if message["role"] == ASSISTANT:
      spoken = True
      if not message["content"].strip():
        raise UserError(
          f"{name}: the assistant's content is empty; leave the record out"
        )
  if not spoken:
    raise UserError(
      f"{where}: no message has the role {ASSISTANT}, so there is nothing to"
      " learn; leave the record out"
    )


def read_example(
  record: Mapping[str, Any],
  domain: str,
  where: str,
  template: ChatTemplate | None,
) -> SupervisedExample:
  """Returns the example of a record that `plain_text` has checked.

  An example without an origin has that of its first prompt, so that the
  completions of one prompt are on one side of the split.

  Args:
    record: with "prompt" and "completion", or with "messages".
    domain: its fine label.
    where: its place, for messages.
    template: renders messages, and knows how completions end. Without it they
      end as documents do.

  Raises:
    UserError: messages cannot be rendered.
  """
  if _has(record, "messages"):
    if template is None or not template.renders:
      raise UserError(
        f"{where}: messages need a chat template: start from an imported"
        " checkpoint that has one (train.initial_checkpoint), or set"
        " data.chat_template to a file"
      )
    _check_special(record, where, template)
    text, cuts = template.render(record["messages"], where, record.get("tools"))
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f"{where}: messages hold half a surrogate pair"
      ) from error
    special, end = True, ""
  else:
    text = record["prompt"] + record["completion"]
    cuts, special = (len(record["prompt"]),), False
    end = template.end if template else ""
  origin = record.get("origin") or text[: cuts[0]] or text
  return SupervisedExample(text, domain, origin, cuts, special, end)


def _check_special(
  record: Mapping[str, Any], where: str, template: ChatTemplate
) -> None:
  """Raises UserError if a message spells what only the template may write."""
  for text in _strings([record["messages"], record.get("tools")]):
    for name in template.reserved:
      if name in text:
        raise UserError(
          f"{where}: a message holds {name!r}, which the chat template writes"
          " between messages; remove it"
        )


def _strings(value: Any) -> Iterator[str]:
  """Yields every text of a JSON value, names of keys included."""
  left = [value]
  while left:
    value = left.pop()
    if isinstance(value, str):
      yield value
    elif isinstance(value, Mapping):
      left += [*value.keys(), *value.values()]
    elif isinstance(value, list):
      left += value
