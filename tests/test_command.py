"""Flags, --help and the one-line errors that all commands share."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edl_jax.command import Command
from edl_jax.config import UserError

ROOT = Path(__file__).parent.parent

# Programs, each of which defines a COMMAND.
PROGRAMS = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for folder in ("benchmarks", "data", "edl_jax")
  for path in (ROOT / folder).rglob("*.py")
  if "\nCOMMAND = Command(__doc__)\n" in path.read_text()
)


def command_with_flags():
  """Returns a command with a flag of each kind, and its flags' holders."""
  command = Command("What it does.\n\n  python -m it")
  flag = command.flag
  flags = {
    "out_file": flag("out_file", "", "File to write.", required=True),
    "rounds": flag("rounds", 9, "Turns to take.", minimum=1),
    "share": flag("share", 0.5, "Share to keep.", between=(0, 1)),
    "mode": flag("mode", "a", "Mode.", choices=["a", "b"]),
    "names": flag("names", ("x", "y"), "Names.", choices=["x", "y"]),
    "grid": flag("grid", [], "Grids."),
    "dry": flag("dry", False, "Do nothing."),
    "limit": flag("limit", None, "Limit.", kind=int, minimum=1),
    "show": flag("show", "", "Part to show.", bare="all"),
  }
  return command, flags


def parsed(*arguments):
  command, flags = command_with_flags()
  command.parse(["--out_file=o", *arguments])
  return {name: holder.value for name, holder in flags.items()}


DEFAULTS = {
  "out_file": "o",
  "rounds": 9,
  "share": 0.5,
  "mode": "a",
  "names": ("x", "y"),
  "grid": [],
  "dry": False,
  "limit": None,
  "show": "",
}


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ([], {}),
    (["--rounds=3", "--share=0.25"], {"rounds": 3, "share": 0.25}),
    (["--rounds", "3", "--dry"], {"rounds": 3, "dry": True}),
    (["--mode=b", "--names=y"], {"mode": "b", "names": ("y",)}),
    (["--grid=a=1,2", "--grid=b"], {"grid": ["a=1,2", "b"]}),
    (["--limit=7", "--nodry"], {"limit": 7}),
    (["--show", "--dry=true"], {"show": "all", "dry": True}),
    (["--show=losses"], {"show": "losses"}),
    (["--rounds=3", "--rounds=4"], {"rounds": 4}),
  ],
)
def test_values(arguments, expected):
  assert parsed(*arguments) == DEFAULTS | expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out-file=x"], "--out-file: unknown flag; write --out_file"),
    (["--round=3"], "--round: unknown flag; did you mean --rounds?"),
    (["--frobnicate"], "--frobnicate: unknown flag; --help lists the flags"),
    (["-rounds=3"], "-rounds=3: flags start with --, see --help"),
    (["rounds"], "unexpected argument 'rounds'; flags start with --"),
    (["--", "x"], "unexpected argument 'x'; flags start with --"),
    (["--rounds"], "Missing value for flag --rounds"),
    (["--rounds=0"], "--rounds=0: must be at least 1"),
    (["--rounds=1.5"], "--rounds=1.5: must be an integer"),
    (["--share=much"], "--share=much: must be a number"),
    (["--share=1"], "--share=1: must lie between 0 and 1"),
    (["--share=nan"], "--share=nan: must lie between 0 and 1"),
    (["--mode=c"], "--mode=c: 'c' is none of a, b"),
    (["--names=x,z"], "--names=x,z: 'z' is none of x, y"),
    (["--out_file="], "--out_file is missing: File to write."),
  ],
)
def test_wrong_flags_are_refused(arguments, message):
  with pytest.raises(UserError) as caught:
    parsed(*arguments)
  assert str(caught.value) == message


def test_a_second_call_starts_from_the_defaults():
  command, flags = command_with_flags()
  seen = []
  main = command.main(
    lambda: seen.append((flags["rounds"].value, [*flags["grid"].value]))
  )
  assert main(["--out_file=o", "--rounds=3", "--grid=a"]) == 0
  assert main(["--out_file=o", "--grid=b"]) == 0
  assert seen == [(3, ["a"]), (9, ["b"])]


@pytest.mark.parametrize(
  ("raised", "code", "line"),
  [
    (UserError("no such thing"), 2, "error: no such thing\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
  ],
)
def test_exit_codes(capsys, raised, code, line):
  def program():
    raise raised

  assert Command("").main(program)([]) == code
  assert capsys.readouterr() == ("", line)
  assert Command("").main(lambda: None)([]) == 0
  assert Command("").main(lambda: 3)([]) == 3


def test_a_reader_that_stops_early_is_no_error():
  ended = subprocess.run(
    [f"{sys.executable} -m data.topics --help | true; echo ${{PIPESTATUS[0]}}"],
    cwd=ROOT,
    shell=True,
    executable="bash",
    capture_output=True,
    text=True,
  )
  assert (ended.stdout, ended.stderr) == (f"{128 + signal.SIGPIPE}\n", "")


def test_help_is_documentation_and_aligned_flags(capsys):
  command, _ = command_with_flags()
  assert command.main(lambda: pytest.fail("ran"))(["--mode=c", "--help"]) == 0
  assert capsys.readouterr().out == (
    "What it does.\n\n  python -m it\n\nFlags:\n"
    "  --out_file      File to write. Required.\n"
    "  --rounds        Turns to take. Default: 9.\n"
    "  --share         Share to keep. Default: 0.5.\n"
    "  --mode=a|b      Mode. Default: a.\n"
    "  --names         Names. Default: x, y.\n"
    "  --grid          Grids.\n"
    "  --dry           Do nothing.\n"
    "  --limit         Limit.\n"
    "  --show[=VALUE]  Part to show.\n"
    "  --help          Show this text.\n"
  )


def test_experiment_and_its_fields():
  command = Command("")
  command.experiment(str(ROOT / "experiments" / "tiny.py"))
  command.parse(["--experiment.seed=4"])
  assert command.overrides == {"seed": "4"}
  assert command.load().seed == 4
  command.parse([])
  assert command.overrides == {} and command.load().seed == 0
  with pytest.raises(UserError, match="did you mean seed"):
    command.parse(["--experiment.sede=4"])
  with pytest.raises(UserError, match=r"experiment\.seed needs a value"):
    command.parse(["--experiment.seed"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program(program):
  """In one style: 80 columns, sentences, words joined by underscores."""
  text = importlib.import_module(program).COMMAND.help()
  text, _, flags = text.partition("\nFlags:\n")
  assert f"python -m {program.removesuffix('.__main__')}" in text
  lines = flags.splitlines()
  assert all(len(line) <= 80 for line in lines)
  names = re.findall(r"^  --([^ =[]+)", flags, re.MULTILINE)
  assert names[-1] == "help"
  assert all(re.fullmatch("[a-z0-9_]+", name) for name in names)


@pytest.mark.parametrize("module", ["main", "sweep", "aot.__main__"])
def test_help_comes_before_jax_is_loaded(module):
  program = (
    "import sys; sys.modules['jax'] = None\n"
    f"from edl_jax.{module} import main\n"
    "sys.exit(main())\n"
  )
  ended = subprocess.run(
    [sys.executable, "-c", program, "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (ended.returncode, ended.stderr) == (0, "")
  assert "\nFlags:\n  --experiment" in ended.stdout


def test_home_is_expanded_in_paths_alone(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  command = Command("What it does.")
  path = command.flag("out", "", "File.")
  paths = command.flag("dirs", [], "Folders.")
  text = command.flag("prompt", [], "Text.", literal=True)
  command.parse(["--out=~/x", "--dirs=~", "--dirs=a~/b", "--prompt=~/x"])
  assert path.value == "/home/me/x"
  assert paths.value == ["/home/me", "a~/b"]
  assert text.value == ["~/x"]


def test_other_errors_of_a_program_pass():
  command = Command("What it does.")
  for kind in (RuntimeError, AssertionError):

    def main(kind=kind):
      raise kind("other")

    with pytest.raises(kind, match="other"):
      command.main(main)([])


@pytest.mark.parametrize("platform", ["cuda", "rocm", "nonsense"])
def test_platforms_that_jax_does_not_find(platform):
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.main", "--workdir=nowhere"),
      "--experiment=experiments/tiny.py",
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 2
  assert re.fullmatch(
    f"error: JAX cannot use.*JAX_PLATFORMS={platform} asks for it\n",
    ended.stderr.splitlines(keepends=True)[-1],
  )


def test_a_platform_that_is_not_there_is_one_line(capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  command = Command("What it does.")

  @command.main
  def main():
    raise RuntimeError("Unable to initialize backend 'cuda':\nno such thing")

  assert main([]) == 2
  assert capsys.readouterr().err == (
    "error: JAX cannot use its devices: Unable to initialize backend 'cuda': no"
    " such thing; JAX_PLATFORMS=cuda asks for it\n"
  )
