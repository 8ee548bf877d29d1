"""Compiles an experiment's training step for a TPU slice, without a TPU.

  python -m edl_jax.aot --experiment=experiments/small.py:tpu --topology=v5e:2x4

prints the memory and the work of each chip, the traffic on the interconnect, a
lower bound of the step's time, and a range for the compiled schedule with its
dearest places. Fields are set as for edl_jax.main:

  --experiment.mesh.fsdp=8

--num_slices=2 compiles for several slices, whose first mesh axis must hold
them, and prints what travels between them:

  ... --topology=v5p:4x4x4 --num_slices=2 --experiment.mesh.data=2

--compare prints what changing a field costs, in all and by place:

  ... --compare=losses.divergence_weight=0

--experiment.model.remat=auto compiles until a choice of what the backward pass
computes again fits into a chip's memory, and reports on that one.

The exit code is 0 if the step fits, 2 if the command is wrong, and 3 if the
step does not fit into the memory of a chip.
"""

import importlib.metadata
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edl_jax import config, config_files, storage
from edl_jax.aot import hlo, topologies
from edl_jax.aot.topologies import Topology
from edl_jax.command import Command
from edl_jax.config import Experiment, UserError
from edl_jax.progress import elapsed

if TYPE_CHECKING:
  from edl_jax.aot.compile import Step

COMMAND = Command(__doc__)
_EXPERIMENT = COMMAND.experiment()
_TOPOLOGY = COMMAND.flag(
  "topology", "", "Chip and shape of the slice, such as v5p:4x4x4."
)
_NUM_SLICES = COMMAND.flag(
  "num_slices",
  1,
  "Slices, which a data-centre network joins. They lie along mesh.data.",
  minimum=1,
)
_COMPARE = COMMAND.flag(
  "compare", "", "KEY=VALUE: compile this variant too; print the difference."
)
_NUM_DOMAINS = COMMAND.flag(
  "num_domains",
  None,
  "Number of domains. Without it, those of the experiment, or 49 if only its"
  " text names them.",
  kind=int,
  minimum=1,
)
_PARAMETERS = COMMAND.flag(
  "parameters", False, "List every parameter with its spec and bytes."
)
_JSON = COMMAND.flag("json", "", "File to write all figures to, as JSON.")


def _variants() -> dict[str, Experiment]:
  """Returns the experiment under "", then the variant that --compare asks for.

  Raises:
    UserError: the experiment, or the field to change, is wrong.
  """
  variants = {"": COMMAND.load()}
  if compare := _COMPARE.value:
    _, changed = config_files.split_overrides([f"--experiment.{compare}"])
    variants[compare] = config_files.load(
      _EXPERIMENT.value, COMMAND.overrides | changed
    )
  return variants


def _write_json(
  path: str,
  topology: Topology,
  variants: Mapping[str, Experiment],
  reports: Mapping[str, Any],
) -> None:
  content = {
    "command": shlex.join(["python", "-m", "edl_jax.aot", *sys.argv[1:]]),
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "libtpu")
    },
    "topology": topology.name,
    "num_slices": topology.num_slices,
    "chip": topology.chip._asdict(),
    # The field that the second run sets, if there is a second run.
    "compare": list(variants)[1:],
    "runs": [
      {"experiment": config.flatten(variants[name]), **report}
      for name, report in reports.items()
    ],
  }
  try:
    storage.write_json(path, content, indent=2)
  except OSError as error:
    raise UserError(f"--json={path}: {error.strerror}") from error


def _compile(
  name: str, experiment: Experiment, topology: Topology
) -> tuple[Experiment, "Step"]:
  """Compiles a variant's step, and returns it with the `model.remat` that fits.

  Raises:
    Overflow: a chip's memory does not hold the step.
  """
  # These import JAX, which reads the environment.
  from edl_jax import rematerialization
  from edl_jax.aot import compile as aot_compile

  choices = rematerialization.choices(experiment)
  count = f"{len(topology.devices):,} {topology.unit}s"
  text = f"compiling {experiment.name} {name}".strip()

  def compile_step(choice: Experiment) -> "Step":
    remat = f" with model.remat={choice.model.remat}" if choices[1:] else ""
    with elapsed(f"{text}{remat} for {topology.title} ({count})"):
      return aot_compile.compile_step(choice, topology, _NUM_DOMAINS.value)

  def say(line: str) -> None:
    if choices[1:]:
      print(line, flush=True)

  return rematerialization.first_that_fits(choices, compile_step, say)


@COMMAND.main
def main() -> int:
  """Compiles the step and prints what it needs; see the module's exit codes."""
  variants = _variants()
  if not _TOPOLOGY.value:
    raise UserError(
      "--topology is missing: name chip and shape, such as --topology=v5p:4x4x4"
    )
  topologies.prepare_environment()
  topology = topologies.load(_TOPOLOGY.value, _NUM_SLICES.value)
  # As in _compile.
  from edl_jax.aot import compile as aot_compile
  from edl_jax.aot import report as aot_report

  # Refuse a mesh that does not fit before compiling anything.
  for experiment in variants.values():
    aot_compile.make_mesh(experiment, topology)
  reports = {}
  for name, experiment in variants.items():
    try:
      experiment, step = _compile(name, experiment, topology)
    except aot_compile.Overflow as error:
      print(
        "\n".join(aot_report.describe_overflow(experiment, topology, error))
      )
      return 3
    variants[name] = experiment
    try:
      reports[name] = aot_report.analyze(experiment, topology, step)
    except hlo.HLOError as error:
      raise UserError(
        f"{error}; this release does not know the installed libtpu's programs:"
        " install that of requirements-tpu.txt"
      ) from error
    lines = aot_report.describe(experiment, topology, reports[name])
    if _PARAMETERS.value:
      lines += aot_report.describe_parameters(step.parameters)
    print("\n".join(lines), flush=True)
  if compare := _COMPARE.value:
    lines = aot_report.describe_difference(compare, *reports.values())
    print("\n".join(lines))
  if _JSON.value:
    _write_json(_JSON.value, topology, variants, reports)
  return 0


if __name__ == "__main__":
  sys.exit(main())
