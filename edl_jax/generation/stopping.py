"""The text of a continuation while it grows: where it ends, what is final."""

from collections.abc import Sequence

# What stands in decoded text for bytes that are no character, or not yet one.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def cut(text: str, stop: Sequence[str]) -> str | None:
  """Returns the text before the first stop string, None if there is none."""
  places = [place for each in stop if (place := text.find(each)) >= 0]
  return text[: min(places)] if places else None


def settled(text: str, stop: Sequence[str]) -> str:
  """Returns the beginning of the text that later tokens cannot take back.

  What follows may be part of a character, or of a stop string.
  """
  text = text.rstrip(_INCOMPLETE)
  held = max(
    (
      size
      for each in stop
      for size in range(1, min(len(each), len(text) + 1))
      if text.endswith(each[:size])
    ),
    default=0,
  )
  return text[: len(text) - held]
