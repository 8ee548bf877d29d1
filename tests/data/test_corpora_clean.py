"""Cleaning of texts, and the scrub of what held-out text says."""

import re

import pytest

from data.corpora_clean import Scrub, clean


def cleaned(texts, *, is_chinese=False, repeats="none", max_bytes=10**9):
  """Texts of one file each; returns the documents in the order given."""
  files = [(f"{number:03}", [text]) for number, text in enumerate(texts)]
  documents, removed = clean(
    files, is_chinese=is_chinese, repeats=repeats, max_bytes=max_bytes
  )
  return [text for _, text in sorted(documents)], removed


def filler(number):
  return "".join(f"word{number}x{n} " for n in range(20)).strip()


def test_clean_drops_controls_and_spaces():
  (text,), _ = cleaned([f"a\x00b \t\r\nc\u200b\n\n\n\nd\n{filler(0)}\n\n"])
  assert text == f"ab\nc\n\nd\n{filler(0)}\n"


def test_chinese_keeps_lines_of_a_fifth():
  fifth = "中" * 20 + "x" * 80
  less = "中" * 20 + "x" * 81
  (text,), removed = cleaned([f"{fifth}\n{less}\nplain"], is_chinese=True)
  assert text == fifth + "\n"
  assert removed["bytes_not_chinese"] == 60 + 81 + 1 + 5 + 1


@pytest.mark.parametrize(
  ("repeats", "expected"),
  [
    ("lines", ["A\n\nB\n", "C\n"]),
    ("paragraphs", ["A\n\nB\nA\n", "A\nC\n"]),
    ("none", ["A\n\nB\nA\n", "A\n\nA\nC\n"]),
  ],
)
def test_repeats(repeats, expected):
  """A, B and C are long enough; each of the two files is one document."""
  long = {name: filler(name) for name in "ABC"}

  def spelled(text):
    return re.sub("[ABC]", lambda m: long[m[0]], text)

  # Files of more than 2,000 characters in all would be cut elsewhere.
  found, removed = cleaned(
    [spelled("A\n\nB\nA\n"), spelled("A\n\nA\nC\n")], repeats=repeats
  )
  assert found == [spelled(text) for text in expected]
  if repeats == "none":
    assert "bytes_repeated" not in removed


def test_short_lines_may_repeat():
  text = "}\n" * 60
  assert cleaned([text], repeats="lines")[0] == [text]


def test_short_texts_of_a_file_are_joined_and_stubs_dropped():
  texts = [f"{number:04}" * 175 for number in range(7)]
  documents, removed = clean(
    [("f", texts), ("g", ["stub"])],
    is_chinese=False,
    repeats="none",
    max_bytes=10**9,
  )
  a, b, c = (text for _, text in sorted(documents))
  assert a == "\n\n".join(texts[:3]) + "\n"
  assert b == "\n\n".join(texts[3:6]) + "\n"
  assert c == texts[6] + "\n"
  assert removed["short_documents"] == 1


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_long_texts_are_cut(separator):
  parts = [filler(number) for number in range(1000)]
  text = separator.join(parts)
  assert len(text) > 100_000
  documents, _ = clean(
    [("f", [text])], is_chinese=False, repeats="none", max_bytes=10**9
  )
  documents.sort(key=lambda d: int(d[0].partition("#")[2] or 0))
  assert len({origin for origin, _ in documents}) == len(documents) > 5
  assert all(len(text) < 25_000 for _, text in documents)
  assert separator.join(t.rstrip("\n") for _, t in documents) == text


def test_cap_and_duplicates():
  texts = [filler(number) + "\n" for number in range(50)]
  every, removed = cleaned(texts + texts[:5])
  assert every == texts and removed["duplicate_documents"] == 5
  some, removed = cleaned(texts, max_bytes=10 * len(texts[0].encode()) + 50)
  assert 8 <= len(some) <= 10 and set(some) < set(texts)
  assert removed["documents_over_the_cap"] == 50 - len(some)
  # Not the first ones: a fair sample.
  assert some != texts[: len(some)]


# --- Scrub -------------------------------------------------------------------


def numbered(first, last):
  return " ".join(f"w{n}" for n in range(first, last))


def test_scrub_removes_lines_that_share_13_words():
  held_out = f"start {numbered(0, 40)} end"
  own = filler("own")
  scrub = Scrub([held_out])
  twelve = f"{own}\n{numbered(3, 15)}\n{own}"
  assert scrub(twelve) == twelve
  # Words may be spelled differently and cross lines; all of these go.
  thirteen = numbered(3, 10).upper() + ",\n" + numbered(10, 16)
  assert scrub(f"{own}\n{thirteen}\n{own}") == f"{own}\n{own}"
  assert scrub(numbered(0, 40)) == ""
  # Also where a gap that was cut joins them.
  gap = f"{numbered(3, 10)}\n{numbered(20, 40)}\n{numbered(10, 16)}"
  assert scrub(f"{own}\n{gap}\n{own}") == f"{own}\n{own}"
  assert scrub("short") == "short"
  assert Scrub([])(held_out) == held_out


def test_scrub_counts_chinese_characters_as_words():
  sentence = "为了保护专利权人的合法权益。鼓励发明创造"
  other = "完全不同的文字" * 20
  scrub = Scrub([sentence])
  assert scrub(f"{sentence[:12]}\n{other}") == f"{sentence[:12]}\n{other}"
  assert scrub(f"{sentence[1:15]}\n{other}") == other
