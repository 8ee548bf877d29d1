"""Imports run one way, along the arrows between rooms that are listed here."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "edl_jax"

# What each room may import: a folder of the package is a room, and so is each
# module beside them. Within a room only cycles are forbidden.
ARROWS = {
  "analysis": {"config", "metrics", "storage", "tables"},
  "aot": {
    *("command", "config", "config_files", "model", "optim", "progress"),
    *("runtime", "sharding", "step", "storage", "tables", "text"),
  },
  "cache": {"storage"},
  "checkpoint": {"config", "model", "sharding", "step", "storage", "text"},
  "command": {"config", "config_files", "tables"},
  "config": {"fields"},
  "config_files": {"config", "fields", "validation"},
  "describe": {"config", "fields", "tables"},
  "evaluate": {
    *("checkpoint", "config", "losses", "model", "sharding", "storage"),
    *("tables", "text"),
  },
  "fields": set(),
  "losses": {"config", "fields", "sharding", "tables"},
  "main": {
    *("checkpoint", "command", "config", "describe", "evaluate", "runtime"),
    *("sharding", "storage", "text", "train"),
  },
  "metrics": {"config", "storage"},
  "model": {"config", "losses", "sharding", "text"},
  "optim": {"config", "sharding"},
  "progress": set(),
  "runtime": {"cache"},
  "sharding": {"config"},
  "step": {"config", "losses", "model", "optim", "sharding", "text"},
  "storage": {"config"},
  "sweep": {"analysis", "command", "config", "config_files"},
  "tables": set(),
  "text": {"cache", "config", "storage"},
  "train": {
    *("analysis", "checkpoint", "config", "evaluate", "losses", "metrics"),
    *("model", "optim", "progress", "runtime", "sharding", "step"),
    *("storage", "text"),
  },
  "validation": {"config", "fields"},
}


def imported(path: pathlib.Path) -> set[str]:
  """Returns the dotted names that a file imports from the package."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    found |= {name for name in names if name.startswith("edl_jax.")}
  return found


def modules() -> dict[str, pathlib.Path]:
  """Returns the package's files by dotted name."""
  return {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
  }


def module_of(name: str) -> str:
  """Returns the module of an imported name, which may be in a module."""
  known = modules()
  return name if name in known else name.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
  return {
    name: {module_of(found) for found in imported(path)}
    for name, path in modules().items()
  }


def test_rooms_import_along_the_arrows_alone():
  arrows = collections.defaultdict(set)
  for name, needed in graph().items():
    own = name.split(".")[1]
    arrows[own] |= {other.split(".")[1] for other in needed} - {own}
  # Equal, not less: an arrow that is no longer used is taken from the list.
  assert dict(arrows) == ARROWS


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
  done: set[str] = set()
  while len(done) < len(graph):
    free = {m for m, needs in graph.items() if m not in done and needs <= done}
    assert free, f"cycle among {sorted(set(graph) - done)}"
    done |= free


def test_no_import_cycles():
  assert_no_cycle(graph())
  assert_no_cycle(ARROWS)


def test_divergence_stands_alone():
  path = PACKAGE / "losses" / "divergence.py"
  roots = {
    (node.names[0].name if isinstance(node, ast.Import) else node.module).split(
      "."
    )[0]
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, (ast.Import, ast.ImportFrom))
  }
  assert roots <= {"jax", "math"}


def test_experiments_import_only_config():
  for path in (ROOT / "experiments").glob("*.py"):
    assert {module_of(name) for name in imported(path)} <= {"edl_jax.config"}
