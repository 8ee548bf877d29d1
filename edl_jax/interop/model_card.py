"""The README of an exported model, made from the run that trained it."""

from collections.abc import Mapping
from typing import Any

from edl_jax import config, tables
from edl_jax.checkpoint import Loaded
from edl_jax.config import FIELDS, Experiment

_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3_moe
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
  run: Loaded, result: Mapping[str, Any] | None, command: str
) -> str:
  """Returns the README in Markdown, with the hub's front matter.

  Args:
    run: the exported checkpoint.
    result: result.json of the run; None leaves held-out figures out.
    command: that exported the model.
  """
  parts = [
    _FRONT_MATTER,
    f"# {run.experiment.name}",
    _summary(run),
    "## Use",
    _USE,
    _tokens(run),
    "## Training",
    _data(run),
    *_held_out(run, result),
    "## Settings",
    "These settings of edl_jax differ from their defaults:",
    f"```\n{_settings(run.experiment)}\n```",
    "## Export",
    f"```\n{command}\n```",
  ]
  return "\n\n".join(parts) + "\n"


def _summary(run: Loaded) -> str:
  losses, model = run.experiment.losses, run.experiment.model
  if losses.divergence_weight:
    trained = (
      "with expert divergence learning (arXiv:2603.00054), whose loss makes"
      " domains of text use different experts"
    )
  else:
    trained = "without expert divergence learning"
  return (
    f"A mixture-of-experts language model of the Qwen3-MoE architecture:"
    f" {model.num_layers} layers, {model.num_experts} experts of which"
    f" {model.num_active_experts} are active for each token. edl_jax trained it"
    f" {trained}."
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
