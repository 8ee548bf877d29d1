import csv
import io
import json

import pyarrow
import pytest

from data.benchmarks_extract import EXTRACTORS
from edl_jax.text.task_files import TaskDocument


def extracted(name, form, *contents):
  return list(EXTRACTORS[name](contents, form))


def request(number, context, continuation, *, choice=0, label=None):
  return {
    "request_type": "loglikelihood",
    "doc": {},
    "request": {"context": context, "continuation": continuation},
    "idx": choice,
    "task_name": "own",
    "doc_id": number,
    "native_id": None,
    "label": label,
  }


def lines(records):
  return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def arrow(rows):
  table = pyarrow.Table.from_pylist(rows)
  stream = io.BytesIO()
  with pyarrow.ipc.new_stream(stream, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)
  return stream.getvalue()


# --- Prepared requests -------------------------------------------------------


def test_twins_give_the_unconditioned_context_and_no_documents():
  records = [
    request(number + twin, context or f"Which? {number}", text, **more)
    for twin, context in ((0, ""), (1_000_000, "Answer:"))
    for number in (0, 1)
    # The choices of a document in any order.
    for text, more in (
      (" b", {"choice": 1, "label": number}),
      (" a", {"choice": 0, "label": number}),
    )
  ]
  assert extracted("requests", "rc", lines(records)) == [
    TaskDocument(
      str(number),
      (f"Which? {number}",) * 2,
      (" a", " b"),
      number,
      "Answer:",
    )
    for number in (0, 1)
  ]


def test_choices_may_differ_in_the_context():
  records = [
    request(0, f"It was dark, so {name}", " slept.", choice=choice, label=1)
    for choice, name in enumerate(("Ann", "Bo"))
  ]
  (document,) = extracted("requests", "rc", lines(records))
  assert document == TaskDocument(
    "0",
    ("It was dark, so Ann", "It was dark, so Bo"),
    (" slept.", " slept."),
    1,
  )


@pytest.mark.parametrize("label", [None, "7", ["7", "seven"], [["7"]]])
def test_gold_answers_have_one_continuation(label):
  record = request(0, "3 + 4 =", " 7", label=label)
  (document,) = extracted("requests", "bpb", lines([record]))
  assert document == TaskDocument("0", ("3 + 4 =",), (" 7",), 0)


@pytest.mark.parametrize(
  ("written", "answer"),
  [
    (" ('one',)", " one"),
    (" ('it\\'s', \"a 'b'\")", " it's, a 'b'"),
  ],
)
def test_tuples_of_drop_become_text(written, answer):
  (document,) = extracted("drop", "bpb", lines([request(0, "Who?", written)]))
  assert document.continuations == (answer,)


# --- Prompts -----------------------------------------------------------------


def subject_row(question, choices, answer):
  return {
    "question": question,
    "subject": "garden_work",
    "choices": choices,
    "answer": answer,
  }


DEV = arrow([subject_row("What digs?", ["spade", "pot"], 0)])
TEST = arrow(
  [
    subject_row("What waters?", ["rake", "can"], 1),
    subject_row("What cuts?", ["bag", "shears"], 1),
    subject_row("What lifts? ", ["fork ", "bed"], 0),
  ]
)


def test_mmlu_as_cloze():
  documents = extracted("mmlu", "rc", DEV, TEST)
  head = (
    "Questions about garden work, each with its answer.\n\n"
    "Question: What digs?\nAnswer: spade\n\n"
  )
  assert documents[0] == TaskDocument(
    "0",
    (f"{head}Question: What waters?\nAnswer:",) * 2,
    (" rake", " can"),
    1,
    "Answer:",
  )
  assert documents[2] == TaskDocument(
    "2",
    (f"{head}Question: What lifts?\nAnswer:",) * 2,
    (" fork", " bed"),
    0,
    "Answer:",
  )
  assert len(documents) == 3


def test_mmlu_as_multiple_choice():
  document, *_ = extracted("mmlu", "mc", DEV, TEST)
  context = (
    "Questions about garden work, each with its answer.\n\n"
    "Question: What digs?\n A. spade\n B. pot\nAnswer: A\n\n"
    "Question: What waters?\n A. rake\n B. can\nAnswer:"
  )
  assert document == TaskDocument("0", (context,) * 2, (" A", " B"), 1)


PAIR = {"sentence1": "It rains.", "sentence2": "It is wet. ", "label": 1}


@pytest.mark.parametrize(
  ("name", "row", "context", "answers"),
  [
    (
      "mrpc",
      PAIR,
      "First: It rains.\nSecond: It is wet.\n"
      "Question: Do the two sentences say the same?\nAnswer:",
      (" no", " yes"),
    ),
    (
      "rte",
      PAIR,
      "Text: It rains.\nClaim: It is wet.\n"
      "Question: Does the claim follow from the text?\nAnswer:",
      (" yes", " no"),
    ),
    (
      "sst2",
      {"sentence": "a warm film ", "label": 1},
      "Review: a warm film\n"
      "Question: Is the review negative or positive?\nAnswer:",
      (" negative", " positive"),
    ),
    (
      "cb",
      {"premise": "It rains.", "hypothesis": "it is dry", "label": 1},
      "Text: It rains.\nClaim: it is dry\n"
      "Question: Given the text, is the claim true, false, or neither?\n"
      "Answer:",
      (" true", " false", " neither"),
    ),
  ],
)
def test_glue_as_cloze(name, row, context, answers):
  (document,) = extracted(name, "rc", arrow([row]))
  contexts = (context,) * len(answers)
  assert document == TaskDocument("0", contexts, answers, 1, "Answer:")


def test_glue_as_multiple_choice():
  (document,) = extracted("rte", "mc", arrow([PAIR]))
  assert document.contexts[0].endswith("text?\n A. yes\n B. no\nAnswer:")
  assert document.continuations == (" A", " B")


def copa_row(question, first, second):
  return {
    "premise": "The cup broke.",
    "choice1": first,
    "choice2": second,
    "question": question,
    "label": 1,
  }


def test_copa_goes_on_with_a_conjunction():
  rows = [
    copa_row("cause", "It was full.", "I dropped it."),
    copa_row("effect", "He drank.", "She swept."),
  ]
  assert extracted("copa", "rc", arrow(rows)) == [
    TaskDocument(
      "0",
      ("The cup broke because",) * 2,
      (" it was full.", " I dropped it."),
      1,
      "because",
    ),
    TaskDocument(
      "1", ("The cup broke so",) * 2, (" he drank.", " she swept."), 1, "so"
    ),
  ]
  cause, effect = extracted("copa", "mc", arrow(rows))
  assert cause.contexts[0] == (
    "The cup broke.\nQuestion: What was the cause?"
    "\n A. It was full.\n B. I dropped it.\nAnswer:"
  )
  assert "What was the result?" in effect.contexts[0]


# --- Chinese law -------------------------------------------------------------


def law_file(*rows):
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(["id", "question", "A", "B", "C", "answer"])
  writer.writerows(rows)
  return text.getvalue().encode("utf-8-sig")


def test_law_keeps_questions_with_one_known_answer():
  content = law_file(
    ("1", "租车纠纷", "租赁", "买卖", "借款。选择正确的答案。", "C"),
    ("2", "两个答案", "租赁", "买卖", "借款", "A、B"),
    ("3", "没有选项", "", "", "", "A"),
    ("4", "少了第一个", "", "买卖", "借款。", "B"),
    ("5", "答案没有文字", "", "买卖", "借款。", "A"),
    ("6", "没有答案", "租赁", "买卖", "借款。", ""),
  )
  assert extracted("law", "rc", content) == [
    TaskDocument(
      "0",
      ("问题：租车纠纷\n答案：",) * 3,  # noqa: RUF001
      ("租赁", "买卖", "借款"),
      2,
      "答案：",  # noqa: RUF001
    ),
    TaskDocument(
      "3",
      ("问题：少了第一个\n答案：",) * 2,  # noqa: RUF001
      ("买卖", "借款"),
      0,
      "答案：",  # noqa: RUF001
    ),
  ]
  _, short = extracted("law", "mc", content)
  assert short == TaskDocument(
    "3",
    ("问题：少了第一个\nA. 买卖\nB. 借款\n答案：",) * 2,  # noqa: RUF001
    ("A", "B"),
    0,
  )
