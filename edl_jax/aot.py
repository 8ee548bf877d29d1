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
import math
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

from absl import flags

from edl_jax import config, topologies
from edl_jax.config import Experiment, UserError
from edl_jax.topologies import Topology

# Of the paper's finer taxonomy; for experiments that leave domains to the data.
_NUM_DOMAINS = 49


class DoesNotFit(Exception):
  """The compiler found that a chip's memory does not hold the step.

  Attributes:
    report: the compiler's figures, ready to print.
  """

  def __init__(self, report: list[str]):
    super().__init__(report[0])
    self.report = report


class Step(NamedTuple):
  """What the compiler made of a training step; of one chip."""

  # The model's, as `ShapeDtypeStruct`s with shardings.
  parameters: Any
  # The mesh that it is compiled for.
  mesh: Any
  # jaxlib's CompiledMemoryStats.
  memory: Any
  # Optimised HLO text.
  text: str
  # Of lowering and compiling.
  seconds: float


def make_mesh(experiment: Experiment, topology: Topology) -> Any:
  """Lays the slice's chips out on the experiment's mesh.

  Raises:
    UserError: the mesh does not fit the slice, the model or the batch.
  """
  from edl_jax import sharding

  mesh = sharding.make_mesh(experiment.mesh, topology.devices)
  sharding.check_divisible(experiment, mesh)
  return mesh


def make_taxonomy(experiment: Experiment, num_domains: int | None) -> Any:
  """Returns the domains, which the data would tell: only their number counts.

  Args:
    experiment: its `data.domains` or `data.taxonomy` hold.
    num_domains: D where it has neither; None: 49.
  """
  from edl_jax.taxonomy import Taxonomy, load_taxonomy

  data = experiment.data
  if num_domains is None and data.taxonomy:
    return load_taxonomy(data.taxonomy)
  names = data.domains
  if num_domains is not None or not names:
    names = [f"domain{i}" for i in range(num_domains or _NUM_DOMAINS)]
  return Taxonomy.from_names(names)


def compile_step(
  experiment: Experiment, topology: Topology, num_domains: int | None = None
) -> Step:
  """Compiles the step that `edl_jax.main` would run on the slice.

  Args:
    experiment: must have passed `config.validate`.
    topology: from `topologies.load`.
    num_domains: see `make_taxonomy`.

  Raises:
    UserError: the mesh does not fit the slice, the model or the batch.
    DoesNotFit: a chip's memory does not hold the step.
  """
  import jax
  import jax.numpy as jnp

  from edl_jax import sharding
  from edl_jax.batch import Batch
  from edl_jax.optim import make_optimizer
  from edl_jax.runtime import compiler_options
  from edl_jax.train import abstract_state, make_train_step

  mesh = make_mesh(experiment, topology)
  train = experiment.train
  optimizer = make_optimizer(experiment.optimizer, train.num_steps)
  taxonomy = make_taxonomy(experiment, num_domains)
  # These make small arrays, which an abstract mesh could not hold.
  state = abstract_state(experiment, optimizer, mesh)
  step = make_train_step(experiment, optimizer, taxonomy, mesh)

  def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (train.batch_size, *shape), dtype, sharding=sharding.row_sharding(mesh)
    )

  by_token = train.sequence_length
  batch = Batch(
    tokens_BT=rows(jnp.int32, by_token),
    targets_BT=rows(jnp.int32, by_token),
    segments_BT=rows(jnp.int32, by_token),
    positions_BT=rows(jnp.int32, by_token),
    weights_BT=rows(jnp.float32, by_token),
    domain_B=rows(jnp.int32),
  )
  start = time.monotonic()
  with jax.set_mesh(mesh):
    lowered = step.lower(state, batch)
    try:
      compiled = lowered.compile(compiler_options(topology.devices[0]))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise DoesNotFit(str(error).splitlines()) from error
  return Step(
    state.model,
    mesh,
    compiled.memory_analysis(),
    compiled.as_text(),
    time.monotonic() - start,
  )


def analyze(
  experiment: Experiment, topology: Topology, step: Step
) -> dict[str, Any]:
  """Returns the figures of a compiled step, of one chip, as JSON can hold them.

  Bytes, seconds and floating-point operations, all for one step.
  """
  from edl_jax import bounds, hlo
  from edl_jax.model import parameter_counts, training_flops

  train, chip = experiment.train, topology.chip
  chips = len(topology.devices)
  tokens = train.batch_size * train.sequence_length / chips
  costs = hlo.costs(
    hlo.parse(step.text),
    tokens / train.accumulation_steps * experiment.model.num_active_experts,
  )
  by_part = {
    part: flops / chips
    for part, flops in training_flops(
      experiment.model, train.batch_size, train.sequence_length
    ).items()
  }
  model_flops = sum(by_part.values())
  memory = step.memory
  sent = sum(collective.wire_bytes for collective in costs.collectives)
  least_sent = bounds.collective_bytes(experiment, step.parameters, step.mesh)
  moved = bounds.memory_bytes(
    experiment,
    step.parameters,
    step.mesh,
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
  )
  bound = bounds.StepBound(
    costs.flops / chip.flops,
    moved / chip.hbm_bandwidth,
    bounds.interconnect_seconds(costs.collectives, topology, step.mesh),
  )
  total, active = parameter_counts(experiment.model)
  return {
    "chips": chips,
    "mesh": dict(step.mesh.shape),
    "parameters": {"total": total, "active": active},
    "memory": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "peak": memory.peak_memory_in_bytes,
      "capacity": chip.hbm_bytes,
    },
    "model_flops": {"total": model_flops, **by_part},
    "hlo_flops": {
      "total": costs.flops,
      "products": costs.product_flops,
      "kernels": {
        kernel.name: {"count": kernel.count, "flops": kernel.flops}
        for kernel in costs.kernels
      },
      "unknown_loops": costs.unknown_loops,
    },
    "collectives": {
      "by_kind": _by_kind(costs.collectives),
      "sent_bytes": sent,
      "least_sent_bytes": least_sent,
    },
    "compile_seconds": step.seconds,
    "step_bound": {
      "seconds": bound.seconds,
      "binding": bound.binding,
      **bound._asdict(),
      "memory_bytes": moved,
      "best_mfu": model_flops / (bound.seconds * chip.flops),
      "tokens_per_second_per_chip": tokens / bound.seconds,
    },
  }


def _by_kind(collectives: Sequence[Any]) -> dict[str, dict[str, float]]:
  """Adds collectives up by kind, the one that sends most first."""
  kinds: dict[str, dict[str, float]] = {}
  for collective in collectives:
    figures = kinds.setdefault(
      collective.kind,
      dict.fromkeys(("count", "bytes", "sent_bytes", "enclosing"), 0),
    )
    figures["count"] += collective.count
    figures["bytes"] += collective.count * collective.payload
    figures["sent_bytes"] += collective.wire_bytes
    if collective.enclosed_flops:
      figures["enclosing"] += collective.count
  return dict(sorted(kinds.items(), key=lambda item: -item[1]["sent_bytes"]))


# --- Text --------------------------------------------------------------------


def _gib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Aligns columns, the first to the left and the others to the right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    "  "
    + "  ".join(
      cell.rjust(width) if place else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  ]


def describe(
  experiment: Experiment, topology: Topology, figures: dict[str, Any]
) -> list[str]:
  """Returns the lines that report the figures of `analyze`."""
  memory, bound = figures["memory"], figures["step_bound"]
  model, compiled = figures["model_flops"], figures["hlo_flops"]
  sent = figures["collectives"]
  parameters = figures["parameters"]
  axes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
  unknown = [
    name
    for name, kernel in compiled["kernels"].items()
    if kernel["flops"] is None
  ]
  rows = [["", "runs", "bytes", "sent", "beside products"]]
  for kind, of_kind in sent["by_kind"].items():
    rows.append(
      [
        kind,
        f"{of_kind['count']:,}",
        f"{of_kind['bytes']:.4g}",
        f"{of_kind['sent_bytes']:.4g}",
        f"{of_kind['enclosing']:,}",
      ]
    )
  lines = [
    f"{experiment.name} on {topology.name}: {figures['chips']:,} chips, {axes}",
    f"parameters: {parameters['total']:,}, {parameters['active']:,} active per"
    " token",
    f"memory of a chip: {_gib(memory['arguments'])} arguments,"
    f" {_gib(memory['temporaries'])} temporaries, {_gib(memory['peak'])} peak"
    f" of {_gib(memory['capacity'])}"
    f" ({memory['peak'] / memory['capacity']:.1%})",
    f"FLOPs of a chip: {model['total']:.4g} of the model,"
    f" {compiled['total']:.4g} compiled"
    f" ({compiled['total'] / model['total']:.2f} times as many)",
    *_table(
      [
        ["products", "", f"{compiled['products']:.4g}"],
        *(
          [name, f"{kernel['count']:,} runs", f"{kernel['flops']:.4g}"]
          for name, kernel in compiled["kernels"].items()
          if name not in unknown
        ),
      ]
    ),
    *(f"  {name}: a kernel of unknown FLOPs, left out" for name in unknown),
    *(
      [f"  {compiled['unknown_loops']} loops of unknown length counted once"]
      if compiled["unknown_loops"]
      else []
    ),
    "collectives of a chip:",
    *_table(rows),
    f"  in all {sent['sent_bytes']:.4g} bytes sent, the least for"
    f" moe.dispatch={experiment.moe.dispatch} is {sent['least_sent_bytes']:.4g}"
    + (
      f" ({sent['sent_bytes'] / sent['least_sent_bytes']:.2f} times that)"
      if sent["least_sent_bytes"]
      else ""
    ),
    f"compiled in {figures['compile_seconds']:.1f} s",
    f"a step takes at least {bound['seconds']:.4g} s, bound by"
    f" {bound['binding']} (products {bound['products']:.4g} s, memory"
    f" {bound['memory']:.4g} s, interconnect {bound['interconnect']:.4g} s)",
    f"at best {bound['best_mfu']:.1%} of peak FLOP/s in the model's products,"
    f" {bound['tokens_per_second_per_chip']:,.0f} tokens/s a chip",
  ]
  return lines


def describe_parameters(parameters: Any) -> list[str]:
  """Returns a table of every parameter, its spec and what a chip holds."""
  import jax

  from edl_jax.sharding import path_name

  rows = [["parameter", "shape", "spec", "bytes a chip"]]
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
    held = math.prod(leaf.sharding.shard_shape(leaf.shape))
    held *= leaf.dtype.itemsize
    total += held
    shape = "x".join(map(str, leaf.shape))
    spec = ", ".join(str(axes) for axes in leaf.sharding.spec)
    rows.append([path_name(path), shape, f"({spec})", f"{held:,}"])
  rows.append(["all; AdamW keeps twice as much", "", "", f"{total:,}"])
  return _table(rows)


def describe_difference(
  key: str, base: dict[str, Any], other: dict[str, Any]
) -> list[str]:
  """Returns a table of two programs' figures and their difference.

  Args:
    key: what is set in the second one, KEY=VALUE.
    base, other: from `analyze`.
  """

  def flat(figures: dict[str, Any]) -> dict[str, float]:
    found = {
      "compiled FLOPs": figures["hlo_flops"]["total"],
      "memory: temporaries": figures["memory"]["temporaries"],
      "memory: peak": figures["memory"]["peak"],
      "bytes sent": figures["collectives"]["sent_bytes"],
      "step bound, s": figures["step_bound"]["seconds"],
    }
    for kind, of_kind in figures["collectives"]["by_kind"].items():
      found[f"{kind} runs"] = of_kind["count"]
      found[f"{kind} sent"] = of_kind["sent_bytes"]
    return found

  first, second = flat(base), flat(other)
  rows = [["", "as given", f"with {key}", "difference", ""]]
  for name in {**first, **second}:
    a, b = first.get(name, 0), second.get(name, 0)
    share = f"{(a - b) / b:+.4%}" if b else ""
    rows.append([name, f"{a:.6g}", f"{b:.6g}", f"{a - b:+.6g}", share])
  return _table(rows)


# --- Command line ------------------------------------------------------------


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
    f"Domains, where the data would tell; by default {_NUM_DOMAINS}.",
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
  rest, overrides = config.split_overrides(arguments)
  values = _define_flags()
  with config.one_line_flag_errors():
    positional = values(rest)[1:]
  if values.help:
    print(_help(values))
    return 0
  if positional:
    raise UserError(
      f"unexpected argument {positional[0]!r}; options start with --"
    )
  variants = {"": config.load(values.experiment, overrides)}
  if values.compare:
    key, equals, value = values.compare.partition("=")
    _, changed = config.split_overrides([f"--experiment.{values.compare}"])
    variants[values.compare] = config.load(
      values.experiment, overrides | changed
    )
    del key, equals, value
  if not values.topology:
    raise UserError(
      "--topology is missing: name chip and shape, such as --topology=v5p:4x4x4"
    )
  topologies.parse(values.topology)
  topologies.prepare_environment()
  topology = topologies.load(values.topology)
  # Refused before anything is compiled.
  for experiment in variants.values():
    make_mesh(experiment, topology)
  reports = {}
  for name, experiment in variants.items():
    with _progress(
      f"compiling {name or experiment.name} for {topology.name}"
      f" ({len(topology.devices):,} chips)",
      sys.stderr,
    ):
      step = compile_step(experiment, topology, values.num_domains)
      reports[name] = analyze(experiment, topology, step)
    print("\n".join(describe(experiment, topology, reports[name])))
    if values.parameters and not name:
      print("\n".join(describe_parameters(step.parameters)))
  if values.compare:
    print("\n".join(describe_difference(values.compare, *reports.values())))
  if values.json:
    _write_json(values.json, arguments, topology, variants, reports)
  return 0


def _write_json(path, arguments, topology, variants, reports) -> None:
  content = {
    "command": shlex.join(["python", "-m", "edl_jax.aot", *arguments[1:]]),
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "libtpu")
    },
    "topology": {
      "name": topology.name,
      "chip": topology.chip._asdict(),
    },
    "runs": [
      {
        "set": name,
        "experiment": config.flatten(variants[name]),
        **reports[name],
      }
      for name in reports
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
  except DoesNotFit as error:
    print("\n".join(error.report))
    return 3


if __name__ == "__main__":
  sys.exit(main(sys.argv))
