"""Axis letters mean in every file what the package's docstring says."""

import ast
import collections
import pathlib
import re
from collections.abc import Iterator

import pytest

import edl_jax
from edl_jax.losses import divergence

PACKAGE = pathlib.Path(edl_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAME = re.compile(r"(?=.*[a-z])\w*[a-z0-9]_([A-Z0-9]+)")
EINSUM = re.compile(r"[A-Za-z]+(,[A-Za-z]+)*->[A-Za-z]*")


def glossary() -> dict[str, str]:
  """Returns what each letter stands for, from the package's docstring."""
  entries = re.findall(r"^  ([A-Z]) (.+)$", edl_jax.__doc__, re.MULTILINE)
  assert len(dict(entries)) == len(entries), "a letter is defined twice"
  assert len({meaning for _, meaning in entries}) == len(entries)
  return dict(entries)


def nodes(path: pathlib.Path) -> Iterator[ast.AST]:
  return ast.walk(ast.parse(path.read_text()))


def names(node: ast.AST) -> list[str]:
  """Returns the names, and the strings that are names, of one node."""
  match node:
    case ast.Name(id=name) | ast.Attribute(attr=name):
      return [name]
    case ast.arg(arg=name) | ast.keyword(arg=str(name)):
      return [name]
    case ast.FunctionDef(name=name):
      return [name]
    case ast.Constant(value=str(name)):
      return [name]
  return []


def suffix(name: str) -> str | None:
  found = NAME.fullmatch(name)
  return found and found[1]


def used_letters(path: pathlib.Path) -> dict[str, set[str]]:
  """Returns the letters of a file's arrays, each with its names."""
  used = collections.defaultdict(set)
  for node in nodes(path):
    for name in names(node):
      letters = suffix(name) or (
        re.sub("[,>-]", "", name) if EINSUM.fullmatch(name) else ""
      )
      for letter in letters:
        used[letter.upper()].add(name)
  return used


@pytest.mark.parametrize(
  "path", FILES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_axis_letter_is_in_the_glossary(path):
  # 1 and 2 are sizes of axes.
  unknown = set(used_letters(path)) - set(glossary()) - {"1", "2"}
  assert not unknown, {letter: used_letters(path)[letter] for letter in unknown}


def test_every_letter_of_the_glossary_is_used():
  used = set().union(*map(used_letters, FILES))
  assert set(glossary()) <= used
  # The search finds the arrays: attention and losses name hundreds.
  assert {"query_MNH", "out_NHM"} <= used_letters(
    PACKAGE / "model" / "attention.py"
  )["H"]


def operand_suffix(node: ast.AST) -> str | None:
  """Returns the axes of an einsum's operand as einsum writes them, if named."""
  if isinstance(node, (ast.Name, ast.Attribute)):
    letters = suffix(names(node)[0])
    return letters and letters.replace("2", "O")
  return None


def einsums() -> Iterator[tuple[str, list[str | None]]]:
  """Yields einsum strings with the suffixes of operands and result.

  None stands for an operand, or a result, that is not a plain name.
  """
  for path in FILES:
    found = list(nodes(path))
    results = {
      id(node.value): operand_suffix(node.targets[0])
      for node in found
      if isinstance(node, ast.Assign)
    }
    for node in found:
      match node:
        case ast.Call(
          func=ast.Attribute(attr="einsum"),
          args=[ast.Constant(value=str(equation)), *operands],
        ):
          result = results.get(id(node))
          yield equation, [*map(operand_suffix, operands), result]


def test_einsum_strings_agree_with_the_names_of_their_arrays():
  checked = 0
  for equation, suffixes in einsums():
    assert EINSUM.fullmatch(equation), equation
    terms = re.split(",|->", equation)
    assert len(terms) == len(suffixes), equation
    for term, letters in zip(terms, suffixes):
      if letters is not None:
        assert term.upper() == letters, (equation, letters)
        checked += 1
    # A lower-case letter is a second axis of a kind that is there already.
    small = {letter for letter in equation if letter.islower()}
    assert {letter.upper() for letter in small} <= set(equation)
  assert checked > 20


def test_the_liftable_file_defines_the_letters_that_it_uses():
  """It stands alone, so it has a glossary of its own, which must agree."""
  text = " ".join(divergence.__doc__.split("Axis letters:")[1].split())
  own = dict(re.findall(r"([A-Z]) ([^,.]+)[,.]", text))
  used = used_letters(PACKAGE / "losses" / "divergence.py").keys() - {"1", "2"}
  assert own.keys() == used
  for letter, meaning in own.items():
    assert meaning.split()[0].rstrip("s") in glossary()[letter], letter
