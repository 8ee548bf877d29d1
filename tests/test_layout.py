"""Tests mirror the code; files and functions are short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LINES_OF_A_FILE = 499
LINES_OF_A_FUNCTION = 80

# Modules without a test file of their own name, and the file that tests them.
TESTED_ELSEWHERE = {
  # TensorFlow Datasets dictates these two names, of one small data set.
  "data/domain_text/__main__.py": "data/test_domain_text.py",
  "data/domain_text/domain_text_dataset_builder.py": "data/test_domain_text.py",
}


def sources(*folders: str) -> list[pathlib.Path]:
  found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
  assert len(found) > len(folders)
  return sorted(path.relative_to(ROOT) for path in found)


def place_of_tests(source: pathlib.Path) -> str:
  """Returns where the tests of a module are, below tests/."""
  parts = source.parent.parts
  folder = pathlib.Path(*parts[1:] if parts[0] == "edl_jax" else parts)
  return str(folder / f"test_{source.stem.strip('_')}.py")


def test_every_module_has_a_test_file_of_its_name():
  missing = {
    str(source)
    for source in sources("edl_jax", "data")
    if source.name != "__init__.py"
    and not (ROOT / "tests" / place_of_tests(source)).exists()
  }
  assert missing == set(TESTED_ELSEWHERE)
  for elsewhere in TESTED_ELSEWHERE.values():
    assert (ROOT / "tests" / elsewhere).exists()


@pytest.mark.parametrize(
  "folder",
  ["benchmarks", "data", "edl_jax", "examples", "experiments", "tests"],
)
def test_files_are_short(folder):
  lines = {
    str(source): len((ROOT / source).read_text().splitlines())
    for source in sources(folder)
  }
  assert {
    source: count for source, count in lines.items() if count > LINES_OF_A_FILE
  } == {}


def test_functions_are_short():
  long = {
    f"{source}: {node.name}"
    for source in sources("edl_jax", "data")
    for node in ast.walk(ast.parse((ROOT / source).read_text()))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    and node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION
  }
  assert long == set()
