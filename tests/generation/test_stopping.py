"""Where a growing text ends, and what of it is final."""

import pytest

from edl_jax.generation.stopping import cut, settled


def test_cut_at_the_first_of_all_stop_strings():
  assert cut("one two three", ["three", "two"]) == "one "
  assert cut("stop", ["stop"]) == ""
  assert cut("one", ["two"]) is None
  assert cut("one", []) is None


@pytest.mark.parametrize(
  ("text", "stop", "want"),
  [
    ("ab", [], "ab"),
    ("ab\ufffd", [], "ab"),
    ("one\n", ["\n\n"], "one"),
    ("one\nt", ["\n\n"], "one\nt"),
    ("aab", ["aabb", "b!"], ""),
    ("xab", ["b!"], "xa"),
  ],
)
def test_settled_holds_back_what_may_belong_to_a_stop_string(text, stop, want):
  assert settled(text, stop) == want


def test_pieces_never_show_a_part_of_a_stop_string():
  text, stop = "to be or not to END be", ["to END"]
  shown = ""
  for size in range(1, len(text) + 1):
    before = cut(text[:size], stop)
    final = settled(text[:size], stop) if before is None else before
    assert final.startswith(shown)
    shown = final
    if before is not None:
      break
  assert shown == "to be or not "
