"""The documents: their links, the files and commands they name, examples."""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from edl_jax import config, config_files
from edl_jax.analysis import comparison
from edl_jax.metric_writers import METRICS_FILE

ROOT = Path(__file__).parents[1]
PAGES = sorted(
  [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("data/*.md"),
    *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("examples/**/*.md"),
  ]
)
# The changelog also names what is gone.
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
OUR_FOLDERS = "edl_jax|experiments|data|benchmarks|tests|notebooks|docs"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTS = re.compile(
  r"^```python\n(.*?)^```\n\nprints[^\n]*\n\n```\n(.*?)^```$",
  re.MULTILINE | re.DOTALL,
)


def name_of(page):
  return str(page.relative_to(ROOT))


def prose(page):
  """Returns the text of a page without its code blocks."""
  return _BLOCK.sub("", page.read_text())


def code(page):
  """Returns code blocks and code spans, lines joined at a backslash."""
  spans = re.findall(r"`([^`]+)`", prose(page))
  blocks = [text for _, text in _BLOCK.findall(page.read_text())]
  return [
    re.sub(r"\\\n\s*", "", text) for text in [*blocks, *spans] if text.strip()
  ]


def commands(page):
  """Yields (module, flags) of each `python -m` with a module of ours."""
  for text in code(page):
    for line in text.splitlines():
      for command in re.split(r"(?= -m )", line)[1:]:
        # A quote may be left of a command inside of another one.
        command = re.sub(r"( & *| *;.*|\")$", "", command)
        _, module, *words = shlex.split(command)
        if re.match(rf"({OUR_FOLDERS})\.", module):
          yield module, words


def anchors(page):
  """Returns what `page#...` may name: its headings as GitHub writes them."""
  headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
  return {
    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    for heading in headings
  }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
    if target.startswith("https://"):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"no {target}"
    assert not anchor or anchor in anchors(file), f"no heading #{anchor}"


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_files_that_pages_name_exist(page):
  for text in code(page):
    # Not a part of another path, such as corpora/text or a bucket's.
    for path in re.findall(rf"(?<![\w/.])(?:{OUR_FOLDERS})/[\w/.]*", text):
      assert (ROOT / path.rstrip(".")).exists(), f"no {path}"


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_commands_parse(page):
  for module, words in commands(page):
    if importlib.util.find_spec(module).submodule_search_locations:
      module += ".__main__"
    command = importlib.import_module(module).COMMAND
    if not words:
      continue
    command.parse(words)
    values = dict(word.partition("=")[::2] for word in words)
    overrides = dict(command.overrides)
    for flag in ("--grid", "--compare"):
      if flag in values:
        key, _, text = values[flag].partition("=")
        overrides[key] = re.split("[,;]", text)[0]
    # A variant may name a run of the reader, which is not here.
    experiment = values.get("--experiment", "...").partition(",runs/")[0]
    if experiment != "...":
      config_files.load(experiment, overrides)


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_settings_that_pages_name_exist(page):
  known = config.flatten(config.Experiment())
  parts = {key.partition(".")[0] for key in known if "." in key}
  for text in code(page):
    match = re.fullmatch(rf"((?:{'|'.join(parts)})\.[a-z_0-9]+)(=.*)?", text)
    # The folder `data` has a setting's name: data.prepare is a module. And
    # metrics.jsonl is a file.
    if not match or match[1] == METRICS_FILE:
      continue
    if not (ROOT / f"{match[1].replace('.', '/')}.py").exists():
      assert match[1] in known, f"no setting {match[1]}"


def examples():
  """Returns each example that says what it prints, once, by page."""
  found = {}
  for page in PAGES:
    for number, example in enumerate(_PRINTS.findall(page.read_text()), 1):
      found.setdefault(example, f"{name_of(page)}-{number}")
  return [pytest.param(*example, id=name) for example, name in found.items()]


@pytest.mark.parametrize("example, printed", examples())
def test_examples_print_what_pages_say(example, printed):
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(compile(example, "example", "exec"), {"__name__": "example"})
  assert output.getvalue() == printed


def test_readme_has_an_example_that_runs():
  assert _PRINTS.search((ROOT / "README.md").read_text())


def test_readme_quotes_the_table_that_the_demo_prints():
  (quoted,) = (
    text.rstrip("\n")
    for _, text in _BLOCK.findall((ROOT / "README.md").read_text())
    if "routing diversity" in text
  )
  _, names = quoted.split("mean over domains")
  domains = [line.split()[0] for line in names.splitlines()[1:]]
  demo = config.flatten(config_files.load("experiments/demo.py", {}))
  result = {
    "experiment": demo,
    "eval": {"lm_loss": 1.0},
    "routing": {"diversity": 1.0},
  }
  (keep,) = re.findall(r"--carve=(\d+)", (ROOT / "Makefile").read_text())
  points = [{"domain": d, "keep": int(keep), "loss": 1.0} for d in domains]
  labels = [f"divergence_weight={weight}" for weight in ("0", "0.01")]
  table = comparison.comparison_table(
    [(label, result) for label in labels], [{"points": points}] * 2
  )

  def words(text):
    lines = re.sub(r"[+-]?\d+\.\d{4}", "#", text).splitlines()
    return [line.split() for line in lines]

  assert words(quoted) == words(table)
  assert len(domains) == 6


def test_the_path_to_the_loss_is_eight_files():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  section = text.split("## From an experiment to the loss")[1].split("\n## ")[0]
  files = re.findall(r"`([\w/]+\.py)`", section)
  assert len(files) == len(set(files)) == 8
  assert files[0] == "experiments/demo.py"
  assert files[-1] == "edl_jax/losses/divergence.py"


def test_versions_agree():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["cff-version"] == "1.2.0"
  assert {"message", "title", "authors"} <= set(citation)
  assert citation["version"] == project["version"]
  assert citation["license"] == project["license"]
  changes = (ROOT / "CHANGELOG.md").read_text()
  assert f"\n## {project['version']}" in changes
