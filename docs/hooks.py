"""Fills in what the site's pages do not hold themselves.

Tables come from the code that they describe, and two pages from files of the
repository. Formulas become MathML, which browsers show without a script.
"""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_ROOT = Path(__file__).parents[1]
# mkdocs runs without the checkout on its path.
sys.path.insert(0, str(_ROOT))

_MARKER = re.compile(r"^<!-- insert (.+) -->$", re.MULTILINE)
# `pymdownx.arithmatex` turns $...$ and $$...$$ into these elements.
_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
_LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")


def _insert(name: str, page: str) -> str:
  """Returns the Markdown that `<!-- insert NAME -->` stands for.

  Raises:
    ValueError: nothing has this name.
  """
  if name == "configuration":
    from edl_jax.describe import reference_markdown

    return reference_markdown()
  if name == "loss terms":
    from edl_jax.losses.objective import loss_table_markdown

    return loss_table_markdown()
  if name.endswith(".md"):
    return _moved_links((_ROOT / name).read_text())
  raise ValueError(f"{page}: nothing is named {name!r}")


def _moved_links(text: str) -> str:
  """Mends the links of a page of the root that is shown as a page of docs/.

  A link to a file outside of docs/ becomes its text: the site has no such page.
  """

  def moved(link: re.Match[str]) -> str:
    label, target = link.groups()
    if target.startswith(("http", "#")):
      return link[0]
    if target.startswith("docs/"):
      return f"[{label}]({target.removeprefix('docs/')})"
    return label

  return _LINK.sub(moved, text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
  """Inserts tables and files."""
  return _MARKER.sub(
    lambda marker: _insert(marker[1], page.file.src_uri), markdown
  )


def on_page_content(content: str, **_: Any) -> str:
  """Renders formulas."""

  def render(match: re.Match[str]) -> str:
    display = "inline" if match[1] == "span" else "block"
    return convert(html.unescape(match[2]), display=display)

  return _FORMULA.sub(render, content)
