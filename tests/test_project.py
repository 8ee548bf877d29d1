"""The project's own files: the wheel, and what hosted machines run."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps_of_jobs() -> dict[str, list[dict]]:
  workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
  return {
    name: job["steps"] for name, job in yaml.safe_load(workflow)["jobs"].items()
  }


def test_workflow_runs_the_commands_of_the_readme():
  commands = {
    name: [step["run"] for step in steps if "run" in step]
    for name, steps in steps_of_jobs().items()
  }
  assert commands == {"test": ["make demo", "make test"], "docs": ["make docs"]}
  readme = (ROOT / "README.md").read_text()
  for command in commands["test"]:
    assert re.search(f"^{command}", readme, re.MULTILINE), command


def test_workflow_runs_every_python_that_the_project_is_for():
  workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
  matrix = yaml.safe_load(workflow)["jobs"]["test"]["strategy"]["matrix"]
  prefix = "Programming Language :: Python :: "
  assert matrix["python"] == [
    each.removeprefix(prefix)
    for each in PROJECT["project"]["classifiers"]
    if each.startswith(prefix)
  ]
  first, last = matrix["python"][0], matrix["python"][-1]
  major, minor = last.split(".")
  assert PROJECT["project"]["requires-python"] == (
    f">={first},<{major}.{int(minor) + 1}"
  )


def test_workflow_can_only_read_and_pins_its_actions():
  text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
  workflow = yaml.safe_load(text)
  assert workflow["permissions"] == {"contents": "read"}
  uses = [
    step["uses"]
    for steps in steps_of_jobs().values()
    for step in steps
    if "uses" in step
  ]
  assert len(uses) == 4
  for action in uses:
    assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action


def commands_of(*arguments: str) -> str:
  """Returns what make would run, from scratch."""
  return subprocess.run(
    ["make", "--dry-run", "--always-make", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_demo_of_a_tpu_vm_brings_its_own_python():
  commands = commands_of("demo", "TPU=1")
  assert "uv venv --clear --python 3.12 .venv" in commands
  assert '-r requirements.txt "jax[tpu]"' in commands
  assert "edl_jax.sweep" in commands and "-m venv" not in commands
  assert "uv " not in commands_of("demo")
  page = (ROOT / "docs" / "tpu.md").read_text()
  assert "uv venv --python 3.12 .venv" in page


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_each_python_has_one_exact_version_of_every_package(version):
  found: dict[str, str] = {}
  for line in (ROOT / "requirements.txt").read_text().splitlines():
    if not line.strip() or line.startswith("#"):
      continue
    requirement = Requirement(line)
    marker = requirement.marker
    if marker is None or marker.evaluate({"python_version": version}):
      assert requirement.name not in found, requirement.name
      found[requirement.name] = str(requirement.specifier)
  assert all(pin.startswith("==") for pin in found.values())
  jax = found["jax"]
  assert jax == found["jaxlib"]
  assert jax == ("==0.10.2" if version == "3.11" else "==0.12.0.1")


# --- The wheel ---------------------------------------------------------------


def package_files() -> list[pathlib.Path]:
  """Returns the package's modules, and the parts of its page."""
  kinds = ("py", "html", "css", "js")
  return [path for k in kinds for path in ROOT.glob(f"edl_jax/**/*.{k}")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder of an installed wheel, and the wheel's files."""
  folder = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
  # From a copy: setuptools writes build/ and *.egg-info beside the sources.
  source = folder / "source"
  source.mkdir()
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    (source / name).write_bytes((ROOT / name).read_bytes())
  for path in [*ROOT.glob("requirements*.txt"), *package_files()]:
    copy = source / path.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(path.read_bytes())
  build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
  subprocess.run([*build, source], check=True)
  (wheel,) = folder.glob("*.whl")
  target = folder / "site"
  install = [*pip, "install", "--no-deps", "--no-index", "--target", target]
  subprocess.run([*install, wheel], check=True)
  with zipfile.ZipFile(wheel) as archive:
    return target, set(archive.namelist())


def run(installed, *arguments: str, folder: pathlib.Path):
  """Runs Python in `folder` with the installed wheel, not the checkout."""
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(installed[0])},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_wheel_has_every_file_of_the_package_and_nothing_else(installed):
  _, files = installed
  own = {str(path.relative_to(ROOT)) for path in package_files()}
  metadata = {name for name in files if ".dist-info/" in name}
  assert files - metadata == own
  assert any(name.endswith("licenses/LICENSE") for name in metadata)


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported(installed, tmp_path):
  target, files = installed
  names = sorted(
    name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name in files
    if name.endswith(".py")
  )
  ended = run(
    installed,
    "-c",
    f"import importlib\nfor name in {names!r}:\n"
    "  print(importlib.import_module(name).__file__)",
    folder=tmp_path,
  )
  assert ended.returncode == 0, ended.stderr
  places = ended.stdout.splitlines()
  assert len(places) == len(names)
  assert all(place.startswith(str(target)) for place in places)


@pytest.mark.slow
def test_wheel_runs_without_a_checkout(installed, tmp_path):
  main = ("-m", "edl_jax.main")
  shown = run(installed, *main, "--help", folder=tmp_path)
  assert shown.returncode == 0
  assert "--workdir" in shown.stdout
  demo = "--experiment=experiments/demo.py"
  refused = run(installed, *main, demo, "--workdir=run", folder=tmp_path)
  assert refused.returncode == 2
  (line,) = refused.stderr.splitlines()
  assert line.startswith(f"error: {demo}: no such file; ")
  assert "get_config()" in line
  (tmp_path / "mine.py").write_text(
    "from edl_jax.config import Experiment\n"
    "def get_config(variant=''):\n  return Experiment(name='mine')\n"
  )
  mine = ("--experiment=mine.py", "--describe=name")
  listed = run(installed, *main, *mine, folder=tmp_path)
  assert listed.returncode == 0, listed.stderr
  assert "mine" in listed.stdout
