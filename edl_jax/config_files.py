"""Experiment files and flags, and the errors that users make in them."""

import contextlib
import dataclasses
import difflib
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from edl_jax.config import Experiment, UserError, check_key, flatten
from edl_jax.validation import validate


def check_override_keys(arguments: Iterable[str]) -> None:
  """Checks the keys of `--experiment.KEY=VALUE` arguments.

  Raises:
    UserError: a key does not exist; names the nearest that does.
  """
  for argument in arguments:
    name = argument.lstrip("-").split("=", 1)[0]
    if argument.startswith("-") and name.startswith("experiment."):
      key = name.removeprefix("experiment.")
      if key in {field.name for field in dataclasses.fields(Experiment)} - {
        "name",
        "seed",
      }:
        raise UserError(
          f"experiment.{key} is a group; set one of its fields, not the whole"
        )
      check_key(key)


def split_overrides(
  arguments: Iterable[str],
) -> tuple[list[str], dict[str, str]]:
  """Splits `--experiment.KEY=VALUE` off; returns the rest and the overrides.

  Raises:
    UserError: a key does not exist, or has no value.
  """
  rest, overrides = [], {}
  for argument in arguments:
    if not re.match("--?experiment[.]", argument):
      rest.append(argument)
      continue
    check_override_keys([argument])
    name, equals, text = argument.lstrip("-").partition("=")
    if not equals:
      raise UserError(f"{argument} needs a value: write {argument}=VALUE")
    overrides[name.removeprefix("experiment.")] = text
  return rest, overrides


@contextlib.contextmanager
def one_line_flag_errors(path: str | None = None) -> Iterator[None]:
  """Turns what goes wrong while flags are parsed into a UserError of one line.

  Args:
    path: the experiment file, whose own errors are reported with their line.
  """
  try:
    yield
  except Exception as error:
    file = (path or "").split(":", 1)[0]
    place, cause = _error_in_file(error, file)
    text = " ".join(str(cause).split())
    if place is not None:
      if found := re.search(r"unexpected keyword argument '(\w+)'", text):
        text += _nearest_hint(found[1])
      raise UserError(
        f"{file}:{place}: {type(cause).__name__}: {text}"
      ) from error
    if file and "no attribute 'get_config'" in text:
      raise UserError(f"{file} defines no get_config()") from error
    if not isinstance(error, flags.Error):
      raise
    raise UserError(" ".join(str(error).split())) from error


def _error_in_file(
  error: BaseException, file: str
) -> tuple[int | None, BaseException]:
  """Returns the line of `file` that an error or its cause came from, and it."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, SyntaxError) and cause.filename == file:
      return cause.lineno, cause
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if file and frame.filename == file:
        return frame.lineno, cause
    cause = cause.__cause__ or cause.__context__
  return None, error


def _nearest_hint(name: str) -> str:
  """Returns "; did you mean ...?" for a field's last name, or nothing."""
  groups = {field.name for field in dataclasses.fields(Experiment)}
  known = groups | {key.rsplit(".")[-1] for key in flatten(Experiment())}
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]}?" if near else ""


def check_experiment_file(path: str | None) -> None:
  """Raises UserError unless `path` names an experiment file.

  A variant may follow after a colon, as in `experiments/demo.py:coarse`.
  """
  if not path:
    raise UserError(
      "--experiment is missing: name a file, such as"
      " --experiment=experiments/demo.py"
    )
  file = path.split(":", 1)[0]
  if not os.path.isfile(file):
    folder = os.path.dirname(file) or "."
    there = (
      sorted(
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.endswith(".py")
      )
      if os.path.isdir(folder)
      else []
    )
    hint = f"; there are: {', '.join(there)}" if there else ""
    raise UserError(f"--experiment={path}: no such file{hint}")


def check_experiment(value: Any, path: str) -> Experiment:
  """Checks the type that `get_config` returned, then validates it."""
  if not isinstance(value, Experiment):
    raise UserError(
      f"--experiment={path}: get_config must return edl_jax.config.Experiment,"
      f" not {type(value).__name__}"
    )
  return validate(value)


def load(path: str, overrides: Mapping[str, Any] | None = None) -> Experiment:
  """Loads an experiment file, applies overrides, validates.

  Args:
    path: file, optionally with a variant after a colon.
    overrides: values by dotted key, as text or as they are.

  Raises:
    UserError: unknown file, unknown key, wrong type or impossible value.
  """
  arguments = [
    f"--experiment.{key}={value}" for key, value in (overrides or {}).items()
  ]
  check_experiment_file(path)
  check_override_keys(arguments)
  command = ["load", f"--experiment={path}", *arguments]
  values = flags.FlagValues()
  # Left to itself, config_flags looks for overrides in sys.argv.
  config_flags.DEFINE_config_file(
    "experiment", flag_values=values, sys_argv=command
  )
  with one_line_flag_errors(path):
    values(command)
  return check_experiment(values["experiment"].value, path)
