"""The report on a compiled training step: its figures, and their text."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from edl_jax import tables
from edl_jax.aot import bounds, estimates, hlo, hlo_costs
from edl_jax.aot.compile import Overflow, Step
from edl_jax.aot.hlo_costs import Collective
from edl_jax.aot.topologies import Topology
from edl_jax.config import Experiment
from edl_jax.model.transformer import parameter_counts, training_flops
from edl_jax.sharding import path_name
from edl_jax.step import learned_names

# Places, and kinds of instructions without an estimate, that the text names;
# JSON has all.
_NUM_PLACES = 20
_NUM_KINDS = 8


def analyze(
  experiment: Experiment, topology: Topology, step: Step
) -> dict[str, Any]:
  """Returns the figures of one device and one step, in types of JSON.

  Units are bytes, seconds and floating-point operations.
  """
  train, chip = experiment.train, topology.chip
  devices = len(topology.devices)
  tokens = train.batch_size * train.sequence_length / devices
  module = hlo.parse(step.text)
  costs = hlo_costs.costs(module, experiment.model.num_experts)
  learned = learned_names(experiment)
  by_part = {
    part: flops / devices
    for part, flops in training_flops(
      experiment.model, train.batch_size, train.sequence_length, learned
    ).items()
  }
  model_flops = sum(by_part.values())
  memory = step.memory
  within, between = bounds.by_network(costs.collectives, step.mesh)
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
    *_transfer_seconds(within, between, topology, step.mesh),
  )
  exposed = _transfer_seconds(
    _synchronous(within), _synchronous(between), topology, step.mesh
  )
  total, active = parameter_counts(experiment.model)
  return {
    "devices": devices,
    "mesh": dict(step.mesh.shape),
    "parameters": {"total": total, "active": active},
    "memory": {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "peak": memory.peak_memory_in_bytes,
      "capacity": chip.hbm_bytes,
    },
    "model_flops": {"total": model_flops, **by_part},
    "hlo_flops": _compiled_flops(costs),
    "collectives": {
      **_sent(within),
      "between_slices": {**_sent(between), "seconds": bound.network},
      # Within slices and between them.
      "sent_bytes": sum(one.wire_bytes for one in within + between),
      "least_sent_bytes": least_sent,
    },
    "compile_seconds": step.seconds,
    "step_bound": {
      "seconds": bound.seconds,
      "binding": bound.binding,
      **bound._asdict(),
      "memory_bytes": moved,
      "best_mfu": model_flops / (bound.seconds * chip.flops),
      "tokens_per_second_per_device": tokens / bound.seconds,
    },
    "estimate": estimates.figures(
      *(estimates.estimate(module, chip), costs, sum(exposed), bound.seconds),
      *(chip, model_flops),
    ),
  }


def _synchronous(collectives: Sequence[Collective]) -> list[Collective]:
  """Returns the collectives that no other work runs beside."""
  return [collective for collective in collectives if not collective.is_async]


def _compiled_flops(costs: hlo_costs.Costs) -> dict[str, Any]:
  return {
    "total": costs.flops,
    "products": costs.product_flops,
    "kernels": {
      kernel.name: {"count": kernel.runs, "flops": kernel.flops}
      for kernel in costs.kernels
    },
    "unknown_loops": costs.unknown_loops,
  }


def _transfer_seconds(
  within: Sequence[Collective],
  between: Sequence[Collective],
  topology: Topology,
  mesh: Mesh,
) -> tuple[float, float]:
  """Returns the least seconds of transfers within and between slices."""
  return (
    bounds.interconnect_seconds(within, topology, mesh),
    bounds.network_seconds(between, topology),
  )


def _sent(collectives: Sequence[Collective]) -> dict[str, Any]:
  """Adds collectives up, and by kind; the kind that sends most comes first."""
  kinds: dict[str, dict[str, float]] = {}
  for collective in collectives:
    figures = kinds.setdefault(
      collective.kind,
      dict.fromkeys(("count", "bytes", "sent_bytes", "enclosing"), 0),
    )
    figures["count"] += collective.runs
    figures["bytes"] += collective.runs * collective.payload
    figures["sent_bytes"] += collective.wire_bytes
    if collective.enclosed_flops:
      figures["enclosing"] += collective.runs
  return {
    "by_kind": dict(
      sorted(kinds.items(), key=lambda item: -item[1]["sent_bytes"])
    ),
    "sent_bytes": sum(collective.wire_bytes for collective in collectives),
  }


# --- Text --------------------------------------------------------------------


def _gib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB"


def _table(
  rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> list[str]:
  """Returns an indented table; see `tables.aligned`."""
  return [f"  {line}" for line in tables.aligned(rows, left)]


def describe(
  experiment: Experiment, topology: Topology, figures: dict[str, Any]
) -> list[str]:
  """Returns the lines that tell the figures of `analyze`."""
  memory, bound = figures["memory"], figures["step_bound"]
  model, compiled = figures["model_flops"], figures["hlo_flops"]
  parameters, unit = figures["parameters"], topology.unit
  axes = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
  unknown = [
    name
    for name, kernel in compiled["kernels"].items()
    if kernel["flops"] is None
  ]
  lines = [
    f"{experiment.name} on {topology.title}: {figures['devices']:,} {unit}s,"
    f" {axes}",
    f"parameters: {parameters['total']:,}, {parameters['active']:,} active per"
    " token",
    f"memory of a {unit}: {_gib(memory['arguments'])} arguments,"
    f" {_gib(memory['temporaries'])} temporaries, {_gib(memory['peak'])} peak"
    f" of {_gib(memory['capacity'])}"
    f" ({memory['peak'] / memory['capacity']:.1%})",
    f"FLOPs of a {unit}: {model['total']:.4g} of the model,"
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
    *(f"  {name}: a kernel of unknown FLOPs, not counted" for name in unknown),
    *(
      [f"  {compiled['unknown_loops']} loops of unknown length counted once"]
      if compiled["unknown_loops"]
      else []
    ),
    *_describe_collectives(experiment, topology, figures["collectives"]),
    f"compiled in {figures['compile_seconds']:.1f} s",
    f"a step takes at least {bound['seconds']:.4g} s, bound by"
    f" {bound['binding']} (products {bound['products']:.4g} s, memory"
    f" {bound['memory']:.4g} s, interconnect {bound['interconnect']:.4g} s,"
    f" network between slices {bound['network']:.4g} s)",
    f"at best {bound['best_mfu']:.1%} of peak FLOP/s in the model's products,"
    f" {bound['tokens_per_second_per_device']:,.0f} tokens/s a {unit}",
    *_describe_estimate(figures["estimate"]),
  ]
  return lines


def _kinds(sent: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields names and figures of collectives within, then between slices."""
  yield from sent["by_kind"].items()
  for kind, of_kind in sent["between_slices"]["by_kind"].items():
    yield f"{kind} between slices", of_kind


def _describe_collectives(
  experiment: Experiment, topology: Topology, sent: dict[str, Any]
) -> list[str]:
  """Returns the lines that tell what a device sends."""
  rows = [["", "runs", "bytes", "sent", "beside products"]]
  for kind, of_kind in _kinds(sent):
    rows.append(
      [
        kind,
        f"{of_kind['count']:,}",
        f"{of_kind['bytes']:.4g}",
        f"{of_kind['sent_bytes']:.4g}",
        f"{of_kind['enclosing']:,}",
      ]
    )
  least = sent["least_sent_bytes"]
  times = f" ({sent['sent_bytes'] / least:.2f} times that)" if least else ""
  lines = [
    f"collectives of a {topology.unit}:",
    *_table(rows),
    f"  in all {sent['sent_bytes']:.4g} bytes sent, the least for"
    f" moe.dispatch={experiment.moe.dispatch} is {least:.4g}{times}",
  ]
  if bandwidth := topology.num_slices > 1 and topology.chip.network_bandwidth:
    chip, between = topology.chip, sent["between_slices"]
    lines.append(
      f"  between slices {between['sent_bytes']:.4g} bytes, at least"
      f" {between['seconds']:.4g} s at the {bandwidth / 1e9:.4g}"
      f" GB/s of a {topology.unit} on the data-centre network ({chip.source})"
    )
  return lines


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.1f}"


def _describe_estimate(found: dict[str, Any]) -> list[str]:
  """Returns the lines that tell the figures of `estimates.figures`."""
  outside = found["outside_kernels"]
  priced = outside["roofline"] - outside["unpriced_roofline"]
  rows = [["seconds", "roofline (low)", "estimate (high)"]]
  for name, low, high in (
    ("outside kernels, priced", priced, outside["estimate"]),
    (
      "outside kernels, without an estimate",
      *2 * [outside["unpriced_roofline"]],
    ),
    ("kernels at the peak", *2 * [found["kernels"]]),
    ("synchronous collectives", *2 * [found["synchronous_collectives"]]),
    ("the step", found["step"]["low"], found["step"]["high"]),
  ):
    rows.append([name, f"{low:.4g}", f"{high:.4g}"])
  places = [["ms", "GB", "by roofline", "line", "operation"]]
  for place in found["places"][:_NUM_PLACES]:
    share = place["roofline"] / max(place["estimate"], place["roofline"])
    places.append(
      [
        _ms(place["estimate"]) if place["estimate"] else "-",
        f"{place['bytes'] / 1e9:,.1f}",
        _ms(place["roofline"]) + f" ({share:.0%})",
        place["line"],
        place["operation"],
      ]
    )
  mfu = found["mfu"]
  return [
    "what the compiler expects of the schedule (an estimate, not a"
    " measurement):",
    *_table(rows),
    f"a step takes between {found['step']['low']:.3g} and"
    f" {found['step']['high']:.3g} s by this, which is between"
    f" {mfu['low']:.1%} and {mfu['high']:.1%} of peak FLOP/s",
    *_describe_unpriced(found["unpriced"]),
    "the dearest places outside kernels:",
    *_table(places, left=(3, 4)),
  ]


def _describe_unpriced(kinds: Sequence[dict[str, Any]]) -> list[str]:
  """Returns a line on the instructions without an estimate, and one on those
  with the compiler's sentinel.
  """
  lines = []
  for is_sentinel, title in (
    (False, "no estimate for"),
    (True, "no estimate but a sentinel for"),
  ):
    chosen = [kind for kind in kinds if kind["is_sentinel"] == is_sentinel]
    if not chosen:
      continue
    runs = sum(kind["runs"] for kind in chosen)
    shown = chosen[:_NUM_KINDS]
    text = ", ".join(
      f"{kind['runs']:,} {kind['name']} ({_ms(kind['roofline'])} ms)"
      for kind in shown
    )
    rest = chosen[_NUM_KINDS:]
    if rest:
      left = sum(kind["roofline"] for kind in rest)
      text += f", {len(rest)} other kinds ({_ms(left)} ms)"
    lines.append(f"{title} {runs:,} instructions, by roofline: {text}")
  return lines


def describe_overflow(
  experiment: Experiment, topology: Topology, overflow: Overflow
) -> list[str]:
  """Returns the lines that tell how much memory is missing, and for what."""
  short = overflow.needed - overflow.available
  lines = [
    f"{experiment.name} does not fit {topology.title}: a {topology.unit} needs"
    f" {_gib(overflow.needed)} and has {_gib(overflow.available)},"
    f" {_gib(short)} too little"
  ]
  rows = [
    [array.source, array.type, _gib(array.bytes)] for array in overflow.largest
  ]
  return [
    *lines,
    "its largest arrays, if nothing is fused:",
    *_table(rows, (0, 1)),
  ]


def describe_parameters(parameters: Any) -> list[str]:
  """Returns a table of every parameter, its spec and the bytes of a chip."""
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
  return _table(rows, left=(0, 1, 2))


def describe_difference(
  key: str, base: dict[str, Any], other: dict[str, Any]
) -> list[str]:
  """Returns a table of two programs' figures and their difference.

  Args:
    key: the setting of the second program, KEY=VALUE.
    base, other: from `analyze`.
  """

  def flat(figures: dict[str, Any]) -> dict[str, float]:
    found = {
      "compiled FLOPs": figures["hlo_flops"]["total"],
      "memory: temporaries": figures["memory"]["temporaries"],
      "memory: peak": figures["memory"]["peak"],
      "bytes sent": figures["collectives"]["sent_bytes"],
      "step bound, s": figures["step_bound"]["seconds"],
      "step by roofline, s": figures["estimate"]["step"]["low"],
      "step by estimate, s": figures["estimate"]["step"]["high"],
    }
    for kind, of_kind in _kinds(figures["collectives"]):
      found[f"{kind} runs"] = of_kind["count"]
      found[f"{kind} sent"] = of_kind["sent_bytes"]
    return found

  first, second = flat(base), flat(other)
  rows = [["", "as given", f"with {key}", "difference", ""]]
  for name in {**first, **second}:
    a, b = first.get(name, 0), second.get(name, 0)
    share = f"{(a - b) / b:+.4%}" if b else ""
    rows.append([name, f"{a:.6g}", f"{b:.6g}", f"{a - b:+.6g}", share])
  return [*_table(rows), *_difference_by_place(base, other)]


def _difference_by_place(
  base: dict[str, Any], other: dict[str, Any]
) -> list[str]:
  """Returns a table of the places whose estimates differ most."""

  def by_operation(figures: dict[str, Any]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for place in figures["estimate"]["places"]:
      name = place["operation"]
      dearer = max(place["estimate"], place["roofline"])
      seconds[name] = seconds.get(name, 0.0) + dearer
    return seconds

  first, second = by_operation(base), by_operation(other)
  differences = {
    name: first.get(name, 0.0) - second.get(name, 0.0)
    for name in {**first, **second}
  }
  dearest = sorted(differences, key=lambda name: -abs(differences[name]))
  rows = [["ms as given", "with it", "difference", "operation"]]
  for name in dearest[:_NUM_PLACES]:
    if differences[name]:
      a, b = first.get(name, 0.0), second.get(name, 0.0)
      rows.append([_ms(a), _ms(b), f"{1e3 * (a - b):+,.1f}", name])
  if len(rows) == 1:
    return ["outside kernels every place has the same estimate"]
  return ["places outside kernels that differ most:", *_table(rows, left=(3,))]
