"""Imports run one way (from main down to config)."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "edl_jax"

# From the top: a module may import from its own row, and from rows below.
ROWS = (
  ("main", "sweep", "aot"),
  ("aot_report",),
  ("aot_compile",),
  ("train", "evaluate", "sweep_report"),
  (
    "bounds",
    "report",
    "checkpoint",
    "input_pipeline",
    "optim",
    "metrics",
    "model",
    "runtime",
  ),
  ("prepared",),
  ("attention", "moe", "losses", "tokenizer"),
  ("expert_parallel",),
  ("grouped_matmul", "routing", "mixture", "splash"),
  ("sources", "batch"),
  ("taxonomy", "readers", "token_stream"),
  (
    "divergence",
    "sharding",
    "arithmetic",
    "tokenizer_files",
    "topologies",
    "hlo",
    "hlo_costs",
  ),
  ("storage",),
  ("config",),
)
ROW_OF = {module: row for row, names in enumerate(ROWS) for module in names}


def local_imports(path: pathlib.Path) -> set[str]:
  """Returns the modules of the package that a file imports, at any depth."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "edl_jax":
      names = [f"edl_jax.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or ""]
    else:
      continue
    found |= {
      name.split(".")[1] for name in names if name.startswith("edl_jax.")
    }
  return found


def modules() -> list[pathlib.Path]:
  return sorted(
    path for path in PACKAGE.glob("*.py") if path.stem != "__init__"
  )


def test_every_module_has_a_row():
  assert {path.stem for path in modules()} == set(ROW_OF)


def test_imports_run_one_way():
  upward = [
    f"{path.stem} imports {name}"
    for path in modules()
    for name in local_imports(path)
    if ROW_OF[name] < ROW_OF[path.stem]
  ]
  assert not upward


def test_no_import_cycles():
  graph = {path.stem: local_imports(path) for path in modules()}
  done: set[str] = set()
  while len(done) < len(graph):
    free = {m for m, needs in graph.items() if m not in done and needs <= done}
    assert free, f"cycle among {sorted(set(graph) - done)}"
    done |= free


def test_divergence_stands_alone():
  assert local_imports(PACKAGE / "divergence.py") == set()
  tree = ast.parse((PACKAGE / "divergence.py").read_text())
  roots = {
    (node.names[0].name if isinstance(node, ast.Import) else node.module).split(
      "."
    )[0]
    for node in ast.walk(tree)
    if isinstance(node, (ast.Import, ast.ImportFrom))
  }
  assert roots <= {"jax", "math"}


def test_experiments_import_only_config():
  for path in (ROOT / "experiments").glob("*.py"):
    assert local_imports(path) <= {"config"}, path
