"""Imports run one way, along the arrows between rooms that are listed here."""

import ast
import collections
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# The rooms that each room imports. A folder of the package is a room, and so is
# each module beside the folders; "data" is the folder of that name in the
# checkout. Modules of one room may import each other, but not in a cycle.
ARROWS = {
  "analysis": {
    *("checkpoint", "command", "config", "fields", "losses", "metrics"),
    *("model", "optim", "runtime", "sharding", "step", "storage", "tables"),
    "text",
  },
  "aot": {
    *("command", "config", "config_files", "model", "progress"),
    *("rematerialization", "runtime", "sharding", "step", "storage"),
    *("tables", "text", "tracing"),
  },
  "cache": {"storage"},
  "checkpoint": {
    *("command", "config", "generation", "model", "optim", "sharding", "step"),
    *("storage", "text"),
  },
  "clock": {"storage"},
  "command": {"config", "config_files", "output", "tables"},
  "config": {"fields"},
  "config_files": {"config", "fields", "validation"},
  "data": {
    *("cache", "command", "config", "progress", "storage", "tables", "text"),
  },
  "describe": {"config", "fields", "tables"},
  "environment": set(),
  "evaluate": {
    *("checkpoint", "config", "losses", "model", "sharding", "storage"),
    *("tables", "text"),
  },
  "fields": set(),
  "generate": {
    *("checkpoint", "command", "config", "generation", "runtime", "sharding"),
    "tables",
  },
  "generation": {"config", "model", "sharding", "text"},
  "interop": {
    *("checkpoint", "command", "config", "generation", "model", "runtime"),
    *("sharding", "storage", "tables", "tasks", "text", "validation"),
  },
  "losses": {"config", "fields", "sharding", "tables"},
  "main": {
    *("checkpoint", "command", "config", "describe", "evaluate", "model"),
    *("output", "peers", "preemption", "runtime", "sharding", "step"),
    *("storage", "tasks", "text", "train"),
  },
  "metric_writers": {"config", "fields", "storage"},
  "metrics": {"config", "metric_writers", "storage"},
  "model": {"config", "losses", "sharding", "text"},
  "muon": {"sharding"},
  "optim": {"config", "fields", "muon", "sharding"},
  "output": {"config"},
  "peers": {"command"},
  "preemption": set(),
  "profiling": {"storage"},
  "progress": set(),
  "rematerialization": {
    *("cache", "config", "runtime", "step", "text", "tracing"),
  },
  "runtime": {"cache", "config"},
  "sharding": {"config"},
  "spikes": set(),
  "step": {
    *("config", "losses", "model", "optim", "runtime", "sharding", "spikes"),
    "text",
  },
  "storage": {"config"},
  "launcher": {"config"},
  "sweep": {
    *("analysis", "command", "config", "config_files", "launcher", "storage"),
  },
  "tables": set(),
  "tasks": {
    *("checkpoint", "command", "config", "losses", "model", "progress"),
    *("runtime", "sharding", "storage", "tables", "text"),
  },
  "text": {"cache", "config", "progress", "storage"},
  "tracing": {"config", "optim", "sharding", "step", "text"},
  "train": {
    *("analysis", "checkpoint", "clock", "config", "environment"),
    *("evaluate", "losses", "metric_writers", "metrics", "model", "optim"),
    *("peers", "preemption", "profiling", "progress", "rematerialization"),
    *("runtime", "sharding", "step", "storage", "tasks", "text"),
  },
  "validation": {"config", "fields", "metric_writers", "profiling"},
}


def imports(path: pathlib.Path) -> set[str]:
  """Returns the dotted names that a file imports, also inside functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: a relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def modules(*folders: str) -> dict[str, pathlib.Path]:
  """Returns the files in these folders by dotted name."""
  return {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
      ".__init__"
    ): path
    for folder in folders
    for path in sorted((ROOT / folder).rglob("*.py"))
  }


def graph() -> dict[str, set[str]]:
  """Returns the modules that each module of the package and of data imports."""
  known = modules("edl_jax", "data")
  # The package's own __init__ only says what users import.
  del known["edl_jax"]
  edges = {}
  for name, path in known.items():
    found = imports(path)
    # A name may be that of a module, or of something in a module or package.
    found |= {each.rpartition(".")[0] for each in found}
    edges[name] = found & set(known)
  return edges


def room(module: str) -> str:
  """Returns the room of a module, such as "text" of "edl_jax.text.batch"."""
  package, *names = module.split(".")
  return package if package == "data" else names[0]


def test_rooms_import_along_the_arrows_alone():
  arrows = collections.defaultdict(set)
  for module, needed in graph().items():
    arrows[room(module)] |= set(map(room, needed)) - {room(module)}
  # Equal, so that an arrow leaves the list with its last import.
  assert dict(arrows) == ARROWS


def assert_no_cycle(edges: dict[str, set[str]]) -> None:
  done: set[str] = set()
  while len(done) < len(edges):
    free = {m for m, needs in edges.items() if m not in done and needs <= done}
    assert free, f"cycle among {sorted(set(edges) - done)}"
    done |= free


def test_no_import_cycles():
  assert_no_cycle(graph())
  assert_no_cycle(ARROWS)


def test_a_cycle_is_found():
  with pytest.raises(AssertionError, match=r"cycle among \['a', 'b'\]"):
    assert_no_cycle({"a": {"b"}, "b": {"a"}, "c": set()})


def test_package_imports_nothing_of_the_checkout():
  outside = {"benchmarks", "data", "examples", "experiments", "tests"}
  for name, path in modules("edl_jax").items():
    assert not {each.split(".")[0] for each in imports(path)} & outside, name


def test_divergence_stands_alone():
  path = ROOT / "edl_jax" / "losses" / "divergence.py"
  assert {name.split(".")[0] for name in imports(path)} == {"jax", "math"}


def test_experiments_import_only_config():
  found = modules("experiments")
  assert "experiments.demo" in found
  for name, path in found.items():
    own = {each for each in imports(path) if each.startswith("edl_jax")}
    assert own and all(each.startswith("edl_jax.config.") for each in own), name
