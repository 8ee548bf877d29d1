"""Evaluation: held-out loss by domain, and the routing report."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from edl_jax import storage, tables
from edl_jax.checkpoint import Provenance, Verify, load
from edl_jax.config import Experiment
from edl_jax.losses import routing, routing_metrics
from edl_jax.model.transformer import Model
from edl_jax.sharding import put_batch
from edl_jax.text.batch import Batch
from edl_jax.text.input_pipeline import eval_batches, held_out_rows
from edl_jax.text.mixture import Corpus, Taxonomy
from edl_jax.text.prepared import PreparedCorpus
from edl_jax.text.tokenizer import Tokenizer


class NonFiniteError(Exception):
  """A loss, a gradient or a parameter became infinite or NaN."""


class EvalSums(NamedTuple):
  """Sums over one batch, on the device; over more, on the host in float64.

  Float32 counts tokens exactly up to 2**24 alone, which a batch does not reach.
  """

  # Cross-entropy of the counted tokens by domain, in nats, (D,).
  nats_D: Any
  # Counted tokens by domain, (D,).
  tokens_D: Any
  # UTF-8 bytes that the target tokens stand for, by domain, (D,).
  bytes_D: Any
  routing: routing.RoutingStats


class Evaluation(NamedTuple):
  """The figures of one evaluation, on the host."""

  # "lm_loss" (nats per token), "bits_per_byte", and "domains": a dict by fine
  # name of the same two with "tokens" and "bytes".
  losses: dict[str, Any]
  # Routing metrics, each its mean over layers; and "layers": a list of the same
  # metrics of each layer.
  routing: dict[str, Any]
  # The content of `routing.json`: arrays by layer, domain and expert.
  report: dict[str, Any]

  def metrics(self) -> dict[str, float]:
    """Returns the scalars by their names in `metrics.jsonl`."""
    values = {}
    for name in ("lm_loss", "bits_per_byte"):
      values[f"eval/{name}"] = self.losses[name]
      for domain, figures in self.losses["domains"].items():
        values[f"eval/{name}/{domain}"] = figures[name]
    for name, value in self.routing.items():
      if name != "layers":
        values[f"eval/routing/{name}"] = value
    return values

  def check_finite(self) -> None:
    """Raises NonFiniteError if a loss is infinite or NaN."""
    parts = {"overall": self.losses, **self.losses["domains"]}
    for name, figures in parts.items():
      if not np.isfinite(figures["lm_loss"]):
        where = "" if figures is self.losses else f" of {name!r}"
        raise NonFiniteError(f"held-out lm_loss{where} is {figures['lm_loss']}")


def token_classes(
  corpus: Corpus | PreparedCorpus, tokenizer: Tokenizer, experiment: Experiment
) -> np.ndarray:
  """Returns the class of every token id, int32 (V,), for `make_eval_step`.

  The most frequent tokens of the held-out text have a class of their own, and
  all others share one; in small vocabularies every token has its own.
  Every process sees all held-out text, so that all agree on the classes.
  """
  size = experiment.model.vocabulary_size
  counted = routing.COUNTED_TOKENS
  if size <= counted:
    return np.arange(size, dtype=np.int32)
  count_V = np.zeros(size, np.int64)
  for rows in held_out_rows(corpus, tokenizer, experiment):
    for row in rows:
      count_V += np.bincount(row.tokens_BT[row.weights_BT > 0], minlength=size)
  class_V = np.full(size, counted, np.int32)
  # Among equals, those of the lowest ids.
  frequent_I = np.argsort(-count_V, kind="stable")[:counted]
  class_V[frequent_I] = np.arange(counted)
  return class_V


def eval_step_for(
  corpus: Corpus | PreparedCorpus, provenance: Provenance
) -> Callable[[Model, Batch], EvalSums]:
  """Returns `make_eval_step` of a run, with the classes of its text."""
  return make_eval_step(
    len(corpus.taxonomy.fine),
    provenance.tokenizer,
    token_classes(corpus, provenance.tokenizer, provenance.experiment),
  )


def make_eval_step(
  num_domains: int,
  tokenizer: Tokenizer,
  token_class_V: np.ndarray | None = None,
) -> Callable[[Model, Batch], EvalSums]:
  """Returns the jitted function that sums up one batch; see `evaluate`.

  Args:
    num_domains: D.
    tokenizer: says how many bytes a token stands for.
    token_class_V: see `routing.token_assignments`; None does not count them.
  """
  byte_lengths_V = np.asarray(tokenizer.byte_lengths_V, np.float32)

  @jax.jit
  def eval_step(model: Model, batch: Batch) -> EvalSums:
    sums, nats_BT = model.batch_sums(
      batch,
      num_domains,
      routing.Summaries(
        outputs=routing.output_stats, token_class_V=token_class_V
      ),
    )
    weights_BT = batch.target_weights_BT
    bytes_BT = jnp.asarray(byte_lengths_V)[batch.targets_BT] * weights_BT
    by_domain = functools.partial(
      jnp.einsum,
      "BT,BD->D",
      precision=jax.lax.Precision.HIGHEST,
    )
    member_BD = jax.nn.one_hot(batch.domain_B, num_domains)
    return EvalSums(
      nats_D=by_domain(nats_BT, member_BD),
      tokens_D=by_domain(weights_BT, member_BD),
      bytes_D=by_domain(bytes_BT, member_BD),
      routing=sums.routing,
    )

  return eval_step


def evaluate(
  eval_step: Callable[[Model, Batch], EvalSums],
  model: Model,
  batches: Iterable[Batch],
  mesh: Mesh,
  taxonomy: Taxonomy,
  experiment: Experiment,
) -> Evaluation:
  """Runs the model over held-out batches.

  Args:
    eval_step: from `make_eval_step`.
    model: laid out on `mesh`.
    batches: this process's rows of every batch. Every process must have the
      same number of batches.
    mesh: the mesh in use.
    taxonomy: the names of the domains.
    experiment: the experiment, for its number of dense layers.
  """
  total = sum_on_host(
    eval_step(model, put_batch(batch, mesh)) for batch in batches
  )
  found = summarize(total, taxonomy, experiment.model.num_dense_layers)
  found.check_finite()
  return found


def sum_on_host(parts: Iterable[EvalSums]) -> EvalSums:
  """Adds up sums of batches in float64, a batch behind the devices."""
  total, last = None, None

  def add(total: EvalSums | None, part: EvalSums) -> EvalSums:
    part = jax.tree.map(
      lambda x: np.asarray(x, np.float64), jax.device_get(part)
    )
    return part if total is None else jax.tree.map(np.add, total, part)

  for part in parts:
    if last is not None:
      total = add(total, last)
    last = part
  assert last is not None, "a domain has held-out rows"
  return add(total, last)


@jax.jit
def _routing_figures(stats: routing.RoutingStats) -> dict[str, Any]:
  p_LDE, _ = routing.domain_probabilities(stats)
  return {
    "metrics": routing_metrics.metrics_by_layer(stats),
    "probabilities": p_LDE,
    "pairwise_divergence": routing_metrics.pairwise_divergence(stats),
  }


def summarize(
  sums: EvalSums, taxonomy: Taxonomy, num_dense_layers: int
) -> Evaluation:
  """Turns sums into figures. `losses` omits domains without a token."""
  figures, sums = jax.device_get((_routing_figures(sums.routing), sums))
  nats_D, tokens_D, bytes_D = (
    np.asarray(x, np.float64)
    for x in (sums.nats_D, sums.tokens_D, sums.bytes_D)
  )

  def both(nats: float, tokens: float, size: float) -> dict[str, float]:
    return {
      "lm_loss": float(nats / tokens),
      "bits_per_byte": float(nats / np.log(2) / max(size, 1)),
    }

  domains = {
    name: {
      **both(nats_D[d], tokens_D[d], bytes_D[d]),
      "tokens": int(tokens_D[d]),
      "bytes": int(bytes_D[d]),
    }
    for d, name in enumerate(taxonomy.fine)
    if tokens_D[d]
  }
  by_layer = figures["metrics"]
  num_layers = len(by_layer["diversity"])
  assignments_LDE = np.asarray(sums.routing.assignments_LDE, np.float64)
  share_LDE = assignments_LDE / np.maximum(
    assignments_LDE.sum(-1, keepdims=True), 1
  )
  return Evaluation(
    losses={
      **both(nats_D.sum(), tokens_D.sum(), bytes_D.sum()),
      "domains": domains,
    },
    routing={
      **{name: float(np.mean(x_L)) for name, x_L in by_layer.items()},
      "layers": [
        {name: float(x_L[layer]) for name, x_L in by_layer.items()}
        for layer in range(num_layers)
      ],
    },
    report={
      "domains": list(taxonomy.fine),
      "layers": [num_dense_layers + layer for layer in range(num_layers)],
      "probabilities": figures["probabilities"].tolist(),
      "assignments": share_LDE.tolist(),
      "pairwise_divergence": figures["pairwise_divergence"].tolist(),
    },
  )


def evaluate_checkpoint(
  corpus: Corpus | PreparedCorpus,
  provenance: Provenance,
  mesh: Mesh,
  workdir: str,
  verify: Verify = "full",
) -> None:
  """Evaluates the newest checkpoint of `workdir`.

  Prints the figures, and writes them to `workdir`/eval.json with the step and
  the arrays of the routing report. Changes no other file of the run.

  Raises:
    DamagedError: the checkpoint is not what was saved; `verify` says how much
      of it is compared with its digests.
  """
  process = (jax.process_index(), jax.process_count())
  with jax.set_mesh(mesh):
    loaded = load(workdir, mesh=mesh, verify=verify)
    evaluation = evaluate(
      eval_step_for(corpus, provenance),
      loaded.model,
      eval_batches(
        corpus, provenance.tokenizer, provenance.experiment, *process
      ),
      mesh,
      corpus.taxonomy,
      provenance.experiment,
    )
  if jax.process_index():
    return
  path = os.path.join(workdir, "eval.json")
  storage.write_json(
    path,
    {
      "step": loaded.step,
      "eval": evaluation.losses,
      "routing": evaluation.routing,
      "report": evaluation.report,
    },
  )
  print(f"checkpoint of step {loaded.step}")
  rows = [(name, f"{x:.4f}") for name, x in evaluation.metrics().items()]
  for line in tables.aligned(rows):
    print(f"  {line}")
  print(f"written to {path}")
