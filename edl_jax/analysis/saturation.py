"""Measures how early the routers of a run settled.

  python -m edl_jax.analysis.saturation --workdir=runs/demo/divergence_weight=0

routes the held-out text of the run's own evaluation through all of its
checkpoints. For each layer it prints router saturation: the share of a token's
active experts at an earlier checkpoint that are active at the last one too.
Tables, a plot and JSON are written to --out. The run must have kept more than
one checkpoint; see train.keep_checkpoints.
"""

import functools
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from edl_jax import runtime, storage, tables
from edl_jax.analysis import report
from edl_jax.analysis.carve.keep import check_router
from edl_jax.analysis.run_text import read_corpus
from edl_jax.checkpoint import checkpoint_provenance, checkpoint_steps, load
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.losses import routing
from edl_jax.model.choice import make_choice
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch
from edl_jax.text.input_pipeline import eval_batches

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir", "", "Folder of a run with checkpoints.", required=True
)
_OUT = COMMAND.flag(
  "out",
  "",
  "Folder of the table, plot and JSON; by default report in --workdir.",
)


@functools.partial(jax.jit, static_argnames="num_domains")
def active_experts(model: Model, batch: Batch, num_domains: int) -> jax.Array:
  """Routes a batch on one device; returns expert_LBTA, int32."""

  def keep(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT):
    del logits_BTE, probs_BTE, gate_BTA, weights_BT
    return expert_BTA

  _, expert_LBTA, _ = model.hidden(
    batch.tokens_BT,
    batch.segments_BT,
    batch.positions_BT,
    batch.weights_BT,
    routing.Summaries(routing=keep),
    choice=make_choice(model.config, batch.domain_B, num_domains),
  )
  return expert_LBTA


@jax.jit
def shared_experts(
  expert_LBTA: jax.Array, last_LBTA: jax.Array, weights_BT: jax.Array
) -> jax.Array:
  """Counts the experts of every token that are in both arrays.

  Args:
    expert_LBTA, last_LBTA: active experts of each token, in any order.
    weights_BT: 1 where a token counts.

  Returns:
    The sum over counted tokens by layer, float32 (L,).
  """
  same_LBTA = (expert_LBTA[..., None] == last_LBTA[..., None, :]).any(-1)
  return (same_LBTA.sum(-1) * weights_BT).sum((1, 2), dtype=jnp.float32)


def measure(workdir: str) -> dict[str, Any]:
  """Measures the router saturation of a run's checkpoints.

  Saturation is that of OLMoE (Muennighoff et al., arXiv:2409.02060, section
  5.1): the mean over tokens of |E_t and E_T| / A, with E_t the A active experts
  of a token at checkpoint t and E_T those at the last one. Two independent
  uniform choices share A / E.

  Args:
    workdir: the run's folder. One model at a time must fit on one device.

  Returns:
    A JSON object: "workdir"; "last", the step of the last checkpoint; "tokens"
    held out; "chance", A / E; "layers", their numbers in the model; and
    "checkpoints", [{"step", "saturation" by layer}] by rising step.

  Raises:
    UserError: there are fewer than two checkpoints, a checkpoint is damaged,
      the experts are fixed, or the text is not that of the training.
  """
  *earlier, last = _steps(workdir)
  provenance = checkpoint_provenance(workdir, last)
  model = provenance.experiment.model
  check_router(model, f"--workdir={workdir}")
  corpus = read_corpus(provenance, workdir)
  batches = eval_batches(corpus, provenance.tokenizer, provenance.experiment)
  route = functools.partial(
    active_experts, num_domains=len(provenance.taxonomy.fine)
  )
  # On the host, so that the device holds one model.
  final = load(workdir, last).model
  experts = [np.asarray(route(final, batch)) for batch in batches]
  del final
  tokens = sum(float(batch.weights_BT.sum()) for batch in batches)
  checkpoints = []
  for step in earlier:
    loaded = load(workdir, step).model
    shared_L = sum(
      np.asarray(
        shared_experts(route(loaded, batch), last_LBTA, batch.weights_BT),
        np.float64,
      )
      for batch, last_LBTA in zip(batches, experts)
    )
    share_L = np.asarray(shared_L) / (tokens * model.num_active_experts)
    checkpoints.append({"step": step, "saturation": share_L.tolist()})
  return {
    "workdir": workdir,
    "last": last,
    "tokens": int(tokens),
    "chance": model.num_active_experts / model.num_experts,
    "layers": list(range(model.num_dense_layers, model.num_layers)),
    "checkpoints": checkpoints,
  }


def _steps(workdir: str) -> Sequence[int]:
  steps = checkpoint_steps(os.path.join(workdir, "checkpoints"))
  if not steps:
    raise UserError(f"--workdir={workdir} has no checkpoint; train first")
  if len(steps) == 1:
    raise UserError(
      f"--workdir={workdir} has one checkpoint, and saturation compares"
      " several; train with a larger train.keep_checkpoints"
    )
  return steps


def table_of(result: dict[str, Any]) -> str:
  """Returns the saturation by checkpoint and layer as Markdown."""
  rows = [
    [
      f"{each['step']:,}",
      *(f"{share:.3f}" for share in each["saturation"]),
      f"{statistics.fmean(each['saturation']):.3f}",
    ]
    for each in result["checkpoints"]
  ]
  headings = ["step", *(f"layer {n}" for n in result["layers"]), "mean"]
  return "\n\n".join(
    [
      f"# Router saturation against step {result['last']:,}",
      "Share of a token's active experts that are active at the last"
      f" checkpoint too: mean over {result['tokens']:,} held-out tokens. Two"
      f" random choices share {result['chance']:.3f}.",
      tables.markdown(headings, rows, left=()),
    ]
  )


def draw(result: dict[str, Any]) -> Figure:
  """Plots saturation by step, a line for each layer and a dotted one of chance.

  All lines end at 1 in the last checkpoint, by definition.
  """
  figure = Figure(figsize=(7, 4.6), layout="constrained")
  axes = figure.subplots()
  steps = [each["step"] for each in result["checkpoints"]]
  for index, layer in enumerate(result["layers"]):
    values = [each["saturation"][index] for each in result["checkpoints"]]
    axes.plot(
      [*steps, result["last"]],
      [*values, 1.0],
      marker="o",
      markersize=3,
      label=f"layer {layer}",
      **report.line_style(index),
    )
  axes.axhline(
    result["chance"], color="#555555", linestyle=":", label="random choice"
  )
  axes.set_ylim(0, 1.02)
  report.style_axes(
    axes,
    "Experts of a token that are those of the last checkpoint",
    "step",
    "router saturation",
  )
  # A legend of many layers would cover the lines.
  columns = -(-len(axes.lines) // 12)
  figure.legend(
    loc="outside right upper", ncols=columns, fontsize=8, frameon=False
  )
  return figure


def _write(result: dict[str, Any], path: str) -> str:
  text = table_of(result)
  storage.write_json(f"{path}.json", result)
  storage.write_bytes(f"{path}.md", f"{text}\n".encode())
  report.save_figure(draw(result), f"{path}.png")
  return text


@COMMAND.main
def main() -> None:
  """Writes and prints the table."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _steps(_WORKDIR.value)
  folder = _OUT.value or os.path.join(_WORKDIR.value, "report")
  try:
    storage.make_folder(folder)
    runtime.configure()
    text = _write(measure(_WORKDIR.value), os.path.join(folder, "saturation"))
  except OSError as error:
    raise UserError(
      f"cannot write to {folder}: {error.strerror or error}; choose another"
      " --out"
    ) from error
  print(
    f"written: {folder}, saturation.md with .json and .png beside it\n\n{text}"
  )


if __name__ == "__main__":
  sys.exit(main())
