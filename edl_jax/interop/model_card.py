"""The README of an exported model, made from the run that trained it."""

from collections.abc import Mapping
from typing import Any

from edl_jax import config, tables
from edl_jax.checkpoint import Loaded
from edl_jax.config import FIELDS, Experiment
from edl_jax.interop.architectures import QWEN3_MOE, Architecture

_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- mixture-of-experts
- expert-divergence-learning
---"""

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # This folder.
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```"""

# Heading, key in result.json, and format of the figures of routing.
_ROUTING = (
  ("routing diversity (0 to 1)", "diversity", ".4f"),
  ("D_inter / D_total", "inter_fraction", ".4f"),
  ("MaxVio (0 is balanced)", "max_violation", ".3f"),
  ("purity", "purity", ".4f"),
  ("NMI of domain and expert", "normalized_mutual_information", ".4f"),
)


def model_card(
  run: Loaded,
  result: Mapping[str, Any] | None,
  command: str,
  architecture: Architecture = QWEN3_MOE,
  source: Mapping[str, Any] | None = None,
) -> str:
  """Returns the README in Markdown, with the hub's front matter.

  Args:
    run: the exported checkpoint.
    result: result.json of the run; None leaves held-out figures out.
    command: that exported the model.
    architecture: of the exported checkpoint.
    source: of the provenance, for weights that were imported.
  """
  parts = [
    _FRONT_MATTER.format(model_type=architecture.model_type),
    f"# {run.experiment.name}",
    _summary(run, architecture, source),
    "## Use",
    _USE,
    _tokens(run),
    *(["## Training", _data(run)] if run.content_hash else []),
    *_held_out(run, result),
    "## Settings",
    "These settings of edl_jax differ from their defaults:",
    f"```\n{_settings(run.experiment)}\n```",
    "## Export",
    f"```\n{command}\n```",
  ]
  return "\n\n".join(parts) + "\n"


def _summary(
  run: Loaded, architecture: Architecture, source: Mapping[str, Any] | None
) -> str:
  losses, model = run.experiment.losses, run.experiment.model
  if losses.divergence_weight:
    trained = (
      "with expert divergence learning (arXiv:2603.00054), whose loss makes"
      " domains of text use different experts"
    )
  else:
    trained = "without expert divergence learning"
  began = f", starting from {source['name']}," if source else ""
  made = f"edl_jax trained it{began} {trained}."
  if not run.content_hash and source:
    made = f"Its weights are those of {source['name']}."
  return (
    f"A mixture-of-experts language model of the {architecture.title}"
    f" architecture: {model.num_layers} layers, {model.num_experts} experts of"
    f" which {model.num_active_experts} are active for each token. {made}"
  )


def _tokens(run: Loaded) -> str:
  rows, tokens = (
    run.experiment.model.vocabulary_size,
    run.tokenizer.vocabulary_size,
  )
  start = run.tokenizer.token_text(run.tokenizer.document_start_id)
  text = (
    f"`{start}` begins every document, and with it the document before ends, so"
    " it is the first token of a prompt and the last of a continuation. The"
    " model was trained on rows of"
    f" {run.experiment.train.sequence_length} tokens."
  )
  if rows > tokens:
    text += (
      f" The embedding has {rows:,} rows and the tokenizer {tokens:,} tokens:"
      f" no text has the ids from {tokens} on."
    )
  return text


def _data(run: Loaded) -> str:
  data, train = run.experiment.data, run.experiment.train
  source = data.prepared or data.files
  named = f"`{source}`" if source else "the Python packages of one machine"
  tokens = run.step * train.batch_size * train.sequence_length
  domains = ", ".join(run.taxonomy.source_names)
  return (
    f"{run.step:,} steps of {train.batch_size} rows of {train.sequence_length}"
    f" tokens ({tokens:,} tokens) from {named}. Its domains are {domains}. The"
    f" text's content hash is `{run.content_hash}`."
  )


def _held_out(run: Loaded, result: Mapping[str, Any] | None) -> list[str]:
  if result is None:
    return []
  held_out, routing = result["eval"], result["routing"]
  domains = {
    # Not the row of all domains.
    f"{name} (domain)" if name == "overall" else name: part
    for name, part in held_out["domains"].items()
  }
  rows = [
    [name, f"{part['lm_loss']:.4f}", f"{part['bits_per_byte']:.4f}"]
    for name, part in {"overall": held_out, **domains}.items()
  ]
  model = run.experiment.model
  layers = range(model.num_dense_layers, model.num_layers)
  figures = [
    [
      heading,
      format(routing[key], number),
      *(format(layer[key], number) for layer in routing["layers"]),
    ]
    for heading, key, number in _ROUTING
  ]
  return [
    "## Held-out text",
    tables.markdown(
      ["domain", "LM loss (nats per token)", "bits per byte"], rows
    ),
    "## Routing on held-out text",
    tables.markdown(
      ["figure", "mean", *(f"layer {layer}" for layer in layers)], figures
    ),
  ]


def _settings(experiment: Experiment) -> str:
  return "\n".join(
    f"{key}={value}"
    for key, value in config.flatten(experiment).items()
    if value != FIELDS[key].default
  )
