"""Documents out of the files of a benchmark package.

An extractor takes the contents of a task's files, decompressed, and the form
wanted; it yields the documents. Prepared requests are taken as they are, to the
character; MMLU, GLUE, SuperGLUE and the Chinese questions get the prompts that
are worded here.
"""

import ast
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edl_jax.text.streams import need_package
from edl_jax.text.task_files import TaskDocument

Extractor = Callable[[Sequence[bytes], str], Iterator[TaskDocument]]

# Document ids from here on are copies of a document, this much below, whose
# question is left out: their context is the one for PMI normalisation.
_TWINS = 1_000_000
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# --- Prepared requests -------------------------------------------------------


def _requests(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
  """Yields the documents of a requests.jsonl, which has a line per choice."""
  choices: dict[int, list[tuple[int, str, str]]] = {}
  gold: dict[int, int] = {}
  unconditioned: dict[int, str] = {}
  for line in io.BytesIO(contents[0]):
    record = json.loads(line)
    number, request = record["doc_id"], record["request"]
    if number >= _TWINS:
      unconditioned[number - _TWINS] = request["context"]
      continue
    choices.setdefault(number, []).append(
      (record["idx"], request["context"], request["continuation"])
    )
    # Labels of gold answers are their texts.
    gold[number] = 0 if form == "bpb" else record["label"]
  for number, own in choices.items():
    own.sort()
    yield TaskDocument(
      id=str(number),
      contexts=tuple(context for _, context, _ in own),
      continuations=tuple(continuation for _, _, continuation in own),
      gold=gold[number],
      unconditioned=unconditioned.get(number),
    )


def _drop(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
  """Yields DROP, whose answers the package writes as Python's tuples.

  " ('swedish',)" becomes " swedish"; several spans are joined by ", ".
  """
  for document in _requests(contents, form):
    spans = ast.literal_eval(document.continuations[0].strip())
    yield dataclasses.replace(document, continuations=(f" {', '.join(spans)}",))


# --- Prompts of this project -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Language:
  """How a prompt is written in a language."""

  answer: str
  # Before an answer and before the letter of a choice.
  space: str


_ENGLISH = _Language("Answer:", " ")
_CHINESE = _Language("答案：", "")  # noqa: RUF001


def _question(
  number: int,
  question: str,
  choices: Sequence[str],
  gold: int,
  form: str,
  language: _Language = _ENGLISH,
) -> TaskDocument:
  """Returns a question as a cloze (rc) or with its choices lettered (mc)."""
  space = language.space
  if form == "mc":
    letters = _LETTERS[: len(choices)]
    for letter, choice in zip(letters, choices):
      question += f"\n{space}{letter}. {choice}"
    choices = letters
  return TaskDocument(
    id=str(number),
    contexts=(f"{question}\n{language.answer}",) * len(choices),
    continuations=tuple(space + choice for choice in choices),
    gold=gold,
    unconditioned=language.answer if form == "rc" else None,
  )


def _mmlu(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
  """Yields the test split of a subject, the dev split as shots."""
  shots, documents = (
    [
      _question(
        number,
        f"Question: {row['question'].strip()}",
        [choice.strip() for choice in row["choices"]],
        row["answer"],
        form,
      )
      for number, row in enumerate(_arrow_rows(content))
    ]
    for content in contents
  )
  subject = next(_arrow_rows(contents[0]))["subject"].replace("_", " ")
  head = f"Questions about {subject}, each with its answer.\n\n"
  for shot in shots:
    head += f"{shot.contexts[0]}{shot.continuations[shot.gold]}\n\n"
  for document in documents:
    contexts = tuple(head + context for context in document.contexts)
    yield dataclasses.replace(document, contexts=contexts)


def _mrpc(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
  return (
    f"First: {row['sentence1'].strip()}\nSecond: {row['sentence2'].strip()}\n"
    "Question: Do the two sentences say the same?",
    ("no", "yes"),
  )


def _rte(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
  return (
    f"Text: {row['sentence1'].strip()}\nClaim: {row['sentence2'].strip()}\n"
    "Question: Does the claim follow from the text?",
    ("yes", "no"),
  )


def _sst2(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
  return (
    f"Review: {row['sentence'].strip()}\n"
    "Question: Is the review negative or positive?",
    ("negative", "positive"),
  )


def _cb(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
  return (
    f"Text: {row['premise'].strip()}\nClaim: {row['hypothesis'].strip()}\n"
    "Question: Given the text, is the claim true, false, or neither?",
    ("true", "false", "neither"),
  )


def _copa_question(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
  asked = "the cause" if row["question"] == "cause" else "the result"
  return (
    f"{row['premise'].strip()}\nQuestion: What was {asked}?",
    (row["choice1"].strip(), row["choice2"].strip()),
  )


def _labelled(
  ask: Callable[[Mapping[str, Any]], tuple[str, tuple[str, ...]]],
) -> Extractor:
  """Makes an extractor of rows whose label is the index of a choice."""

  def extract(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
    for number, row in enumerate(_arrow_rows(contents[0])):
      question, choices = ask(row)
      yield _question(number, question, choices, row["label"], form)

  return extract


def _copa(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
  """Yields COPA; its cloze goes on with "because" or "so"."""
  if form == "mc":
    yield from _labelled(_copa_question)(contents, form)
    return
  for number, row in enumerate(_arrow_rows(contents[0])):
    link = "because" if row["question"] == "cause" else "so"
    _, choices = _copa_question(row)
    yield TaskDocument(
      id=str(number),
      contexts=(f"{row['premise'].strip().rstrip('.')} {link}",) * 2,
      continuations=tuple(f" {_within(choice)}" for choice in choices),
      gold=row["label"],
      unconditioned=link,
    )


def _within(sentence: str) -> str:
  """Returns a sentence as it reads after a conjunction."""
  if sentence.split(maxsplit=1)[0] in ("I", "I'm", "I've"):
    return sentence
  return sentence[:1].lower() + sentence[1:]


def _arrow_rows(content: bytes) -> Iterator[dict[str, Any]]:
  """Yields the rows of an Arrow stream."""
  arrow = need_package("pyarrow", "reading Arrow files")
  for batch in arrow.ipc.open_stream(content):
    yield from batch.to_pylist()


# --- Chinese law -------------------------------------------------------------

# The package writes this behind the last option of some files.
_INSTRUCTION = "选择正确的答案。"


def _law(contents: Sequence[bytes], form: str) -> Iterator[TaskDocument]:
  """Yields the questions that have one right answer, with its text.

  Some files have lost the text of option A; such a question keeps the other
  options, lettered anew. Of the options only the last has a full stop, which
  would tell it apart: it is dropped.
  """
  rows = csv.DictReader(io.StringIO(contents[0].decode("utf-8-sig")))
  for number, row in enumerate(rows):
    options = {
      letter: row[letter].removesuffix(_INSTRUCTION).strip().rstrip("。")
      for letter in _LETTERS
      if (row.get(letter) or "").strip()
    }
    if row["answer"] not in options:
      continue
    yield _question(
      number,
      f"问题：{row['question'].strip()}",  # noqa: RUF001
      list(options.values()),
      list(options).index(row["answer"]),
      form,
      _CHINESE,
    )


EXTRACTORS: dict[str, Extractor] = {
  "cb": _labelled(_cb),
  "copa": _copa,
  "drop": _drop,
  "law": _law,
  "mmlu": _mmlu,
  "mrpc": _labelled(_mrpc),
  "requests": _requests,
  "rte": _labelled(_rte),
  "sst2": _labelled(_sst2),
}
