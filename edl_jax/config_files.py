"""Reads experiment files, with overrides from the command line.

Every mistake in a file or in an override becomes a `UserError` of one line.
"""

import os
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from edl_jax.config import FIELDS, GROUPS, Experiment, UserError, check_key
from edl_jax.fields import nearest
from edl_jax.validation import validate


def split_overrides(
  arguments: Iterable[str],
) -> tuple[list[str], dict[str, str]]:
  """Splits `--experiment.KEY=VALUE` off; returns the rest and the overrides.

  Raises:
    UserError: a key does not exist, or has no value.
  """
  rest, overrides = [], {}
  for argument in arguments:
    name, equals, text = argument.partition("=")
    if not re.match("--?experiment[.]", name):
      rest.append(argument)
      continue
    key = name.partition(".")[-1]
    check_key(key)
    if not equals:
      raise UserError(f"{argument} needs a value: write {argument}=VALUE")
    overrides[key] = text
  return rest, overrides


def check_experiment_file(path: str) -> None:
  """Raises UserError unless `path` names an experiment file.

  A variant may follow after a colon, as in `experiments/demo.py:coarse`.
  """
  if not path:
    raise UserError(
      "--experiment is missing: name a file, such as"
      " --experiment=experiments/demo.py"
    )
  file = path.partition(":")[0]
  if os.path.isfile(file):
    return
  folder = os.path.dirname(file)
  names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
  there = [
    os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")
  ]
  hint = f"; there are: {', '.join(there)}" if there else ""
  if folder == "experiments" and not there:
    hint = (
      "; experiments/ is in a checkout of edl_jax, not in the package: run from"
      " the checkout's root, or name a file of your own whose get_config()"
      " returns an edl_jax.config.Experiment"
    )
  raise UserError(f"--experiment={path}: no such file{hint}")


def load(path: str, overrides: Mapping[str, Any] | None = None) -> Experiment:
  """Loads an experiment file, applies overrides, validates.

  Args:
    path: file, optionally with a variant after a colon.
    overrides: values by dotted key, as text or as they are.

  Raises:
    UserError: unknown file, variant or key, wrong type or impossible value.
  """
  check_experiment_file(path)
  command = ["load", f"--experiment={path}"]
  for key, value in (overrides or {}).items():
    check_key(key)
    if FIELDS[key].type == tuple[str, ...] and isinstance(value, str):
      value = _names(value)
    command.append(f"--experiment.{key}={value}")
  values = flags.FlagValues()
  # Without sys_argv, config_flags looks for overrides in this process' own.
  config_flags.DEFINE_config_file(
    "experiment", flag_values=values, sys_argv=command
  )
  try:
    values(command)
  except Exception as error:
    if message := _message(error, path):
      raise UserError(message) from error
    raise
  experiment = values["experiment"].value
  if not isinstance(experiment, Experiment):
    raise UserError(
      f"--experiment={path}: get_config must return edl_jax.config.Experiment,"
      f" not {type(experiment).__name__}"
    )
  return validate(experiment)


def _names(text: str) -> str:
  """Writes names separated by commas, as news,code, as Python writes a tuple.

  Text with quotation marks is Python already.
  """
  if re.search("['\"]", text):
    return text
  inner = text.strip()
  if inner[:1] + inner[-1:] in ("()", "[]"):
    inner = inner[1:-1]
  return repr(tuple(name.strip() for name in inner.split(",") if name.strip()))


def _message(error: Exception, path: str) -> str | None:
  """Returns the user's mistake in one line, None if the error is no such."""
  file = path.partition(":")[0]
  line, cause = _error_in_file(error, file)
  text = " ".join(str(cause).split())
  if isinstance(cause, UserError):
    return f"--experiment={path}: {text}"
  if line is not None:
    if found := re.search(r"unexpected keyword argument '(\w+)'", text):
      text += f"; {nearest(found[1], [*FIELDS, *GROUPS])}"
    return f"{file}:{line}: {type(cause).__name__}: {text}"
  if "no attribute 'get_config'" in text:
    return f"{file} defines no get_config()"
  return text if isinstance(error, flags.Error) else None


def _error_in_file(
  error: BaseException, file: str
) -> tuple[int | None, BaseException]:
  """Returns the line of `file` that an error or its cause came from, and it."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, SyntaxError) and cause.filename == file:
      return cause.lineno, cause
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if frame.filename == file:
        return frame.lineno, cause
    cause = cause.__cause__ or cause.__context__
  return None, error
