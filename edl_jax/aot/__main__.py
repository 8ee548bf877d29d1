"""Compiles an experiment's training step for a TPU slice, without a TPU.

  python -m edl_jax.aot --experiment=experiments/small.py:tpu --topology=v5e:2x4

prints what the step will need and can reach: memory and work of each chip, what
crosses the interconnect, and a lower bound of its time. Fields are set as for
edl_jax.main, --experiment.mesh.fsdp=8. What a change costs:

  ... --compare=losses.divergence_weight=0

Exit codes: 0 it fits; 2 something in the command is wrong, in one line; 3 the
step does not fit into the memory of a chip.
"""

import contextlib
import importlib.metadata
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from absl import flags

from edl_jax import config, config_files
from edl_jax.aot import topologies
from edl_jax.aot.topologies import Topology
from edl_jax.config import Experiment, UserError


@contextlib.contextmanager
def _progress(text: str, stream: IO[str]) -> Iterator[None]:
  """Shows `text` and the seconds since, while the block runs.

  On a terminal one line that counts, elsewhere a line every 30 seconds.
  """
  ended = threading.Event()
  terminal = stream.isatty()
  start = time.monotonic()

  def show() -> None:
    while not ended.wait(1 if terminal else 30):
      seconds = f"{time.monotonic() - start:.0f} s"
      print(
        f"\r{text} ... {seconds}" if terminal else f"{text} ... {seconds}",
        end="" if terminal else "\n",
        file=stream,
        flush=True,
      )

  print(f"{text} ...", end="" if terminal else "\n", file=stream, flush=True)
  thread = threading.Thread(target=show, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    if terminal:
      # Clears the line.
      print("\r\033[K", end="", file=stream, flush=True)


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  for name, text in {
    "experiment": "Experiment file; a variant may follow after a colon.",
    "topology": "Chip and shape of the slice, such as v5p:4x4x4.",
    "compare": "KEY=VALUE: compile this variant too, print the difference.",
    "json": "File that takes all figures as JSON.",
  }.items():
    flags.DEFINE_string(name, None, text, flag_values=values)
  flags.DEFINE_integer(
    "num_domains",
    None,
    "Domains; by default those of the experiment, or 49 if its data name them.",
    lower_bound=1,
    flag_values=values,
  )
  for name, text in {
    "parameters": "List every parameter with its spec and bytes.",
    "help": "Show this help.",
  }.items():
    flags.DEFINE_bool(name, False, text, flag_values=values)
  return values


def _help(values: flags.FlagValues) -> str:
  lines = [f"  --{name}: {values[name].help}" for name in values]
  return "\n".join([__doc__.strip(), "", "Flags:", *lines])


def _run(arguments: Sequence[str]) -> int:
  rest, overrides = config_files.split_overrides(arguments)
  values = _define_flags()
  with config_files.one_line_flag_errors():
    positional = values(rest)[1:]
  if values.help:
    print(_help(values))
    return 0
  if positional:
    raise UserError(
      f"unexpected argument {positional[0]!r}; options start with --"
    )
  variants = {"": config_files.load(values.experiment, overrides)}
  if values.compare:
    _, changed = config_files.split_overrides(
      [f"--experiment.{values.compare}"]
    )
    variants[values.compare] = config_files.load(
      values.experiment, overrides | changed
    )
  if not values.topology:
    raise UserError(
      "--topology is missing: name chip and shape, such as --topology=v5p:4x4x4"
    )
  topologies.prepare_environment()
  topology = topologies.load(values.topology)
  # Imports JAX, which reads the environment.
  from edl_jax.aot import compile as aot_compile
  from edl_jax.aot import report as aot_report

  # Refused before anything is compiled.
  for experiment in variants.values():
    aot_compile.make_mesh(experiment, topology)
  reports = {}
  for name, experiment in variants.items():
    text = f"compiling {experiment.name} {name}".strip()
    try:
      with _progress(
        f"{text} for {topology.name} ({len(topology.devices):,} chips)",
        sys.stderr,
      ):
        step = aot_compile.compile_step(
          experiment, topology, values.num_domains
        )
    except aot_compile.DoesNotFit as error:
      print(
        "\n".join(aot_report.describe_overflow(experiment, topology, error))
      )
      return 3
    reports[name] = aot_report.analyze(experiment, topology, step)
    lines = aot_report.describe(experiment, topology, reports[name])
    if values.parameters:
      lines += aot_report.describe_parameters(step.parameters)
    print("\n".join(lines), flush=True)
  if values.compare:
    lines = aot_report.describe_difference(values.compare, *reports.values())
    print("\n".join(lines))
  if values.json:
    _write_json(values.json, arguments, topology, variants, reports)
  return 0


def _write_json(
  path: str,
  arguments: Sequence[str],
  topology: Topology,
  variants: Mapping[str, Experiment],
  reports: Mapping[str, Any],
) -> None:
  content = {
    "command": shlex.join(["python", "-m", "edl_jax.aot", *arguments[1:]]),
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "libtpu")
    },
    "topology": topology.name,
    "chip": topology.chip._asdict(),
    # The second run, if there is one, has this field set.
    "compare": list(variants)[1:],
    "runs": [
      {"experiment": config.flatten(variants[name]), **report}
      for name, report in reports.items()
    ],
  }
  try:
    with open(path, "w", encoding="utf-8") as file:
      json.dump(content, file, indent=2)
      file.write("\n")
  except OSError as error:
    raise UserError(f"--json={path}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> int:
  """Runs the command line `arguments`, program first; returns the exit code."""
  try:
    return _run(arguments)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv))
