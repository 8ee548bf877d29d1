"""Tables of text: aligned columns for a terminal, and Markdown.

This module imports no JAX: reports and sweeps need no device.
"""

from collections.abc import Collection, Sequence


def _cells(
  row: Sequence[str], widths: Sequence[int], left: Collection[int]
) -> list[str]:
  return [
    cell.ljust(width) if column in left else cell.rjust(width)
    for column, (cell, width) in enumerate(zip(row, widths, strict=True))
  ]


def aligned(
  rows: Sequence[Sequence[str]],
  left: Collection[int] = (0,),
  min_widths: Sequence[int] = (),
) -> list[str]:
  """Returns a line for each row, its columns padded to one width.

  Args:
    rows: cells of equal number; the first row may be a heading.
    left: columns of words, aligned at their left; all others hold figures.
    min_widths: characters that the first columns take at least.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for index, least in enumerate(min_widths):
    widths[index] = max(widths[index], least)
  return ["  ".join(_cells(row, widths, left)).rstrip() for row in rows]


def markdown(
  headings: Sequence[str],
  rows: Sequence[Sequence[str]],
  left: Collection[int] = (0,),
) -> str:
  """Returns a Markdown table whose source is aligned too; see `aligned`."""
  widths = [max(map(len, (*column, "---"))) for column in zip(headings, *rows)]
  rule = [
    "-" * width if column in left else "-" * (width - 1) + ":"
    for column, width in enumerate(widths)
  ]
  return "\n".join(
    f"| {' | '.join(cells)} |"
    for cells in (
      _cells(headings, widths, left),
      rule,
      *(_cells(row, widths, left) for row in rows),
    )
  )
