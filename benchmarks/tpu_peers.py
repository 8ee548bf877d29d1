"""Compares what the TPU compiler makes of our training step and of MaxText's.

  python -m benchmarks.tpu_peers --topology=v5p:4x4x4 --json=tpu_peers.json

compiles both for one slice, with the same shapes, rows and compiler, and reads
both programs with the report of `python -m edl_jax.aot`. It needs no TPU, and
nothing runs on one: every figure is by compile.

  ours     edl_jax, with expert divergence over 49 domains
  maxtext  MaxText, in the best configuration that was found for it, whose
           settings are in benchmarks/tpu_contestants.py

Seconds are of one step. `estimate` is what the compiler expects outside of
kernels, which tends to be too high, and `roofline` what peaks of products and
memory would allow, which is too low; `kernels` are at the peak, and `waits` are
collectives that nothing runs beside. `low` and `high` put these together. GiB
are of one chip: `sent` on the interconnect, and `in waits` the part of it that
nothing runs beside. Kernels whose work is unknown are named under the table.

The first run installs MaxText and the compiler, as benchmarks.peers does. A
small form takes minutes instead of half an hour on two idle cores:

  python -m benchmarks.tpu_peers --topology=v5p:2x2x1 --rows=2 \\
    --experiment.model.num_layers=2 --experiment.model.width=256 \\
    --experiment.model.num_heads=2 --experiment.model.num_kv_heads=2 \\
    --experiment.model.num_experts=8 --experiment.model.num_active_experts=2 \\
    --experiment.model.expert_width=256 --experiment.mesh.expert=2 \\
    --experiment.model.vocabulary_size=2048 \\
    --experiment.train.sequence_length=512
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks import measure, peers
from edl_jax import config, validation
from edl_jax.aot import topologies
from edl_jax.command import Command
from edl_jax.config import Experiment, UserError
from edl_jax.progress import elapsed

_ALL = ("ours", "maxtext")

COMMAND = Command(__doc__)
COMMAND.experiment("experiments/edl.py:15b")
_TOPOLOGY = COMMAND.flag(
  "topology", "v5p:4x4x4", "Chip and shape of the slice to compile for."
)
_ROWS = COMMAND.flag("rows", 16, "Rows of each chip.", minimum=1)
_CONTESTANTS = COMMAND.flag(
  "contestants",
  _ALL,
  "Programs to compile, in order.",
  choices=_ALL,
)
_ENVIRONMENTS = COMMAND.flag(
  "environments", peers.ENVIRONMENTS_FOLDER, "Folder that keeps environments."
)
_JSON = COMMAND.flag("json", "", "File to write the figures to, as JSON.")

# The compiler that goes with the JAX of MaxText's environment.
LIBTPU = "libtpu==0.0.46.3"
NUM_DOMAINS = 49
PROGRAM = pathlib.Path(__file__).with_name("tpu_contestants.py")

# Fields of the model that MaxText is not told, with what it does.
_ALIKE = {
  "num_dense_layers": 0,
  "num_shared_experts": 0,
  "router": "learned",
  "router_scores": "softmax",
  "gates": "renormalized",
  "balancing": "loss",
  "qk_norm": "head",
  "remat": "full",
}


def experiment_of_slice(
  experiment: Experiment, chips: int, rows: int
) -> Experiment:
  """Returns the experiment with as many rows as the slice takes.

  Raises:
    UserError: MaxText is not configured for a model of this kind here.
  """
  for name, value in _ALIKE.items():
    if (found := getattr(experiment.model, name)) != value:
      raise UserError(
        f"model.{name}={found}: only models with {name}={value} are compared"
      )
  train = dataclasses.replace(experiment.train, batch_size=rows * chips)
  return validation.validate(dataclasses.replace(experiment, train=train))


def compiler_folder(python: str, folder: str) -> str:
  """Installs the TPU compiler in a folder of its own and returns the folder.

  Inside of MaxText's environment, JAX would look for a TPU.

  Raises:
    peers.UnavailableError: it cannot be installed.
  """
  path = os.path.join(folder, LIBTPU.replace("==", "-"))
  if not os.path.isdir(path):
    print(f"{LIBTPU}: installing in {path}, once", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
      pip = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
      peers.run([*pip, f"--target={new}/libtpu", LIBTPU])
      os.rename(f"{new}/libtpu", path)
  return path


def compile_contestant(
  name: str, experiment: Experiment, python: str, compiler: str
) -> dict[str, Any]:
  """Compiles a contestant in a process of its own; returns its figures.

  Args:
    name: "ours" or "maxtext".
    experiment: the shapes.
    python: interpreter of MaxText's environment.
    compiler: the folder that has libtpu.

  Raises:
    peers.UnavailableError: the process failed.
  """
  request = {
    "contestant": name,
    "experiment": config.flatten(experiment),
    "topology": _TOPOLOGY.value,
    "num_domains": NUM_DOMAINS,
  }
  variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  variables |= {"PYTHONPATH": compiler, "DECOUPLE_GCLOUD": "TRUE"}
  with tempfile.TemporaryDirectory() as scratch:
    printed = peers.run(
      [python, "-P", str(PROGRAM), json.dumps(request)],
      cwd=scratch,
      env=variables,
    )
  return json.loads(printed.splitlines()[-1])


def row(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a contestant's line of the table."""
  found, memory = figures["estimate"], figures["memory"]
  outside = found["outside_kernels"]
  return {
    "contestant": name,
    "estimate": outside["estimate"],
    "roofline": outside["roofline"],
    "kernels": found["kernels"],
    "waits": found["synchronous_collectives"],
    "low": found["step"]["low"],
    "high": found["step"]["high"],
    "arguments": memory["arguments"] / 2**30,
    "temporaries": memory["temporaries"] / 2**30,
    "peak": memory["peak"] / 2**30,
    "sent": figures["sent_bytes"] / 2**30,
    "in waits": figures["synchronous_bytes"] / 2**30,
  }


def conclusion(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns the lines under the table, from the figures of each contestant."""
  unknown = {
    name: figures["unknown_kernels"]
    for name, figures in found.items()
    if figures["unknown_kernels"]
  }
  if unknown:
    return [
      f"{name}: the table leaves out kernels of unknown work, so its seconds"
      f" cannot be compared: {', '.join(kernels)}"
      for name, kernels in unknown.items()
    ]
  if len(found) < 2:
    return []
  ours, theirs = (found[name]["estimate"]["step"] for name in _ALL)
  return [
    f"our step is {1 - ours['high'] / theirs['high']:.0%} below MaxText's by"
    f" estimate, {1 - ours['low'] / theirs['low']:.0%} by roofline"
  ]


@COMMAND.main
def main() -> None:
  """Compiles the contestants and prints the table."""
  _, shape = topologies.parse(_TOPOLOGY.value)
  experiment = experiment_of_slice(
    COMMAND.load(), math.prod(shape), _ROWS.value
  )
  topologies.prepare_environment()
  folder = os.path.abspath(os.path.expanduser(_ENVIRONMENTS.value))
  python = peers.python_of("maxtext", folder)
  compiler = compiler_folder(python, folder)
  found: dict[str, dict[str, Any]] = {}
  for name in _CONTESTANTS.value:
    try:
      with elapsed(f"compiling {name} for {_TOPOLOGY.value}"):
        found[name] = compile_contestant(name, experiment, python, compiler)
    except peers.UnavailableError as error:
      print(f"{name}: left out: {error}", flush=True)
  if not found:
    raise UserError("no contestant could be compiled")
  versions = next(iter(found.values()))["versions"]
  print(
    f"\n{experiment.name} on {_TOPOLOGY.value}, {_ROWS.value} rows a chip, by"
    " compile: " + ", ".join(f"{k} {v}" for k, v in versions.items())
  )
  measure.report(
    [row(name, figures) for name, figures in found.items()],
    _JSON.value,
    experiment=config.flatten(experiment),
    topology=_TOPOLOGY.value,
    compiled_with=versions,
    contestants=found,
  )
  for line in conclusion(found):
    print(line)


if __name__ == "__main__":
  sys.exit(main())
