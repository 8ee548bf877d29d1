"""The command line of every program: flags, `--help`, errors of one line.

  COMMAND = Command(__doc__)
  _OUT = COMMAND.flag("out", "", "File to write.", required=True)

  @COMMAND.main
  def main() -> None:
    write(_OUT.value)

  if __name__ == "__main__":
    sys.exit(main())

Flags are absl's, in one spelling: `--held_out_fraction=0.1`. Each command owns
its flags, so that one process can import many commands, and tests can call
`main(["--out=x"])`.
"""

import dataclasses
import difflib
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import flags

from edl_jax import config_files, output, tables
from edl_jax.config import Experiment, MeshConfig, UserError

T = TypeVar("T")

_WIDTH = 80


class Command:
  """The flags of one program, and how it starts and fails."""

  def __init__(self, documentation: str | None):
    """Takes the module's docstring, which opens the text of `--help`."""
    self._documentation = (documentation or "").strip()
    self._values = flags.FlagValues()
    self._help: dict[str, str] = {}
    self._parsers: dict[str, _Parser] = {}
    self._required: list[str] = []
    self._bare: dict[str, str] = {}
    # Text of each --experiment.KEY=VALUE by its key; None without experiment.
    self._overrides: dict[str, str] | None = None

  def flag(
    self,
    name: str,
    default: T,
    help: str,
    *,
    kind: type | None = None,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    between: tuple[float, float] | None = None,
    required: bool = False,
    bare: str | None = None,
    literal: bool = False,
  ) -> flags.FlagHolder[T]:
    """Defines a flag; its value is there once the command runs.

    Args:
      name: its name, in words joined by underscores.
      default: the value without the flag. A tuple makes a flag that takes
        values separated by commas, a list one that may be repeated.
      help: what the flag says, in a sentence.
      kind: int, float, str, tuple or bool; the default's own type if None.
      choices: the values allowed.
      minimum: the least value allowed.
      between: bounds that the value must lie strictly between.
      required: whether the command refuses to start without it.
      bare: the value of `--name` without one; None if it needs a value.
      literal: whether a text that begins with "~" is no path in the user's
        home. A shell only expands "~" at the start of a word.
    """
    self._help[name] = help
    repeated = isinstance(default, list)
    kind = kind or (str if repeated else type(default))
    if bare is not None:
      self._bare[f"--{name}"] = bare
    if required:
      self._required.append(name)
    # absl has an overload for each type, which a type variable fits none of.
    absl: Any = flags
    if kind is bool:
      return absl.DEFINE_bool(name, default, help, flag_values=self._values)
    parser = _Parser(kind, choices, minimum, between, literal)
    self._parsers[name] = parser
    define = absl.DEFINE_multi if repeated else absl.DEFINE
    return define(
      parser=parser,
      serializer=None,
      name=name,
      default=default,
      help=help,
      flag_values=self._values,
    )

  def experiment(self, default: str = "") -> flags.FlagHolder[str]:
    """Defines --experiment=FILE, and accepts --experiment.KEY=VALUE.

    Args:
      default: the file that `load` reads without the flag.
    """
    self._overrides = {}
    return self.flag(
      "experiment",
      default,
      "Experiment file; a variant may follow after a colon. Set its fields by"
      " --experiment.KEY=VALUE.",
    )

  def mesh(self, otherwise: str) -> None:
    """Defines --mesh=AXIS=SIZE,..., which `mesh_config` returns.

    Args:
      otherwise: the devices in use without the flag, as "one device".
    """
    self.flag(
      "mesh",
      (),
      "Mesh over the devices, such as expert=4,tensor=2; otherwise"
      f" {otherwise}.",
    )

  @property
  def mesh_config(self) -> MeshConfig | None:
    """The mesh that --mesh names, None without one.

    Raises:
      UserError: an axis is unknown, or its size is no positive number.
    """
    items = self._values["mesh"].value
    if not items:
      return None
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = dict.fromkeys(axes, 1)
    for item in items:
      axis, _, size = item.partition("=")
      if axis not in sizes or not size.isdecimal() or not int(size):
        raise UserError(
          f"--mesh: {item} is no AXIS=SIZE; axes are {', '.join(axes)}"
        )
      sizes[axis] = int(size)
    return MeshConfig(**sizes)

  @property
  def overrides(self) -> dict[str, str]:
    """The text of each --experiment.KEY=VALUE by its key."""
    return self._overrides or {}

  def load(self) -> Experiment:
    """Loads the experiment that the command line names.

    Raises:
      UserError: unknown file, unknown key, wrong type or impossible value.
    """
    return config_files.load(
      self._values["experiment"].value or "", self.overrides
    )

  def main(self, function: Callable[[], int | None]) -> Callable[..., int]:
    """Decorates a program that reads its flags and returns its exit code.

    The result takes the arguments after the program's name, `sys.argv[1:]` if
    there are none, and returns the exit code: 0 unless the program says
    otherwise, 2 after a UserError, and after a signal, as a shell reports it,
    128 + number: 130 after Ctrl-C, 141 when the output was closed.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
      arguments = sys.argv[1:] if arguments is None else arguments
      output.prepare_streams()
      with output.lasting_stderr():
        try:
          with output.named_stdout():
            if "--help" in arguments:
              print(self.help())
              code = 0
            else:
              self.parse(arguments)
              code = function() or 0
            sys.stdout.flush()
          return code
        except BrokenPipeError:
          # The reader, such as `head`, has seen enough.
          return 128 + signal.SIGPIPE
        except UserError as error:
          print_error(error)
          return 2
        except (RuntimeError, AssertionError) as error:
          if message := _missing_platform(error):
            print_error(message)
            return 2
          raise
        except KeyboardInterrupt:
          print_error("interrupted")
          return 128 + signal.SIGINT

    main.__doc__ = function.__doc__
    return main

  def parse(self, arguments: Sequence[str]) -> None:
    """Sets the flags from a command line without the program's name.

    Raises:
      UserError: unknown flag, wrong or missing value, stray argument.
    """
    for argument in arguments:
      if re.match("-[^-0-9.]", argument):
        raise UserError(f"{argument}: flags start with --, see --help")
    if self._overrides is not None:
      arguments, self._overrides = config_files.split_overrides(arguments)
    arguments = [
      f"{each}={self._bare[each]}" if each in self._bare else each
      for each in arguments
    ]
    self._values.unparse_flags()
    try:
      rest = self._values(["command", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
      raise UserError(
        f"--{error.flagname}: unknown flag; {self._hint(error.flagname)}"
      ) from error
    except (flags.Error, ValueError) as error:
      text = " ".join(str(error).split())
      raise UserError(text.removeprefix("flag ")) from error
    if rest:
      raise UserError(f"unexpected argument {rest[0]!r}; flags start with --")
    for name in self._required:
      if not self._values[name].value:
        raise UserError(f"--{name} is missing: {self._help[name]}")

  def _hint(self, name: str) -> str:
    known = list(self._values)
    if (spelled := name.replace("-", "_")) in known:
      return f"write --{spelled}"
    if near := difflib.get_close_matches(name, known, n=1):
      return f"did you mean --{near[0]}?"
    return "--help lists the flags"

  def help(self) -> str:
    """Returns the documentation and the list of flags, 80 columns wide."""
    texts = {
      f"--{name}{self._syntax(name)}": self._described(name)
      for name in self._values
    }
    texts["--help"] = "Show this text."
    width = _WIDTH - max(map(len, texts)) - len("    ")
    rows = []
    for name, text in texts.items():
      lines = textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False
      )
      rows += zip([name, *[""] * len(lines)], lines)
    table = [f"  {line}" for line in tables.aligned(rows, left=(0, 1))]
    return "\n".join([self._documentation, "", "Flags:", *table])

  def _syntax(self, name: str) -> str:
    if f"--{name}" in self._bare:
      return "[=VALUE]"
    parser = self._parsers.get(name)
    if parser is None or not parser.choices or parser.kind is tuple:
      return ""
    return f"={'|'.join(parser.choices)}"

  def _described(self, name: str) -> str:
    text, default = self._help[name], self._values[name].default
    if name in self._required:
      return f"{text} Required."
    if default in (None, "", False, (), []):
      return text
    if isinstance(default, tuple):
      default = ", ".join(default)
    return f"{text} Default: {default}."


class _Parser(flags.ArgumentParser):
  """Reads one value of a flag; refuses it in plain words."""

  def __init__(
    self,
    kind: type,
    choices: Sequence[str],
    minimum: float | None,
    between: tuple[float, float] | None,
    literal: bool,
  ):
    super().__init__()
    self.kind, self.choices, self._literal = kind, choices, literal
    self._minimum, self._between = minimum, between

  def parse(self, argument: Any) -> Any:
    if self.kind is tuple and isinstance(argument, str):
      argument = [each for each in argument.split(",") if each]
    try:
      value: Any = self.kind(argument)
    except ValueError as error:
      kind = "an integer" if self.kind is int else "a number"
      raise ValueError(f"must be {kind}") from error
    if self.kind is str and not self._literal:
      value = os.path.expanduser(value)
    for each in value if self.kind is tuple else [value]:
      if self.choices and each not in self.choices:
        raise ValueError(f"{each!r} is none of {', '.join(self.choices)}")
    if self._minimum is not None and value < self._minimum:
      raise ValueError(f"must be at least {self._minimum}")
    if self._between is not None:
      low, high = self._between
      if not low < value < high:
        raise ValueError(f"must lie between {low} and {high}")
    return value

  def flag_type(self) -> str:
    return self.kind.__name__


def _missing_platform(error: Exception) -> str | None:
  """Returns the line for JAX's error that a platform is not there."""
  text = " ".join(str(error).split())
  if isinstance(error, AssertionError):
    # JAX says nothing of a platform that it knows and has no library for.
    (*_, last) = traceback.extract_tb(error.__traceback__)
    if not last.filename.endswith("xla_bridge.py"):
      return None
    text = text or "none of its platforms is installed"
  elif "nable to initialize backend" not in text:
    return None
  asked = os.environ.get("JAX_PLATFORMS")
  way_out = f"; JAX_PLATFORMS={asked} asks for it" if asked else ""
  return f"JAX cannot use its devices: {text}{way_out}"


def print_error(error: object) -> None:
  """Prints an error as every command does: one line on stderr."""
  print(f"error: {error}", file=sys.stderr, flush=True)
