"""The README of an exported model."""

import re

import yaml

from edl_jax.checkpoint import Loaded
from edl_jax.config import Experiment, ModelConfig
from edl_jax.interop.architectures import OLMOE
from edl_jax.interop.model_card import model_card
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import byte_tokenizer

ROUTING = {
  "diversity": 0.25,
  "inter_fraction": 0.5,
  "max_violation": 1.5,
  "purity": 0.75,
  "normalized_mutual_information": 0.125,
}
RESULT = {
  "eval": {
    "lm_loss": 2.5,
    "bits_per_byte": 1.25,
    "domains": {
      "c": {"lm_loss": 2.0, "bits_per_byte": 1.0},
      "law": {"lm_loss": 3.0, "bits_per_byte": 1.5},
    },
  },
  "routing": {**ROUTING, "layers": [ROUTING, {**ROUTING, "purity": 0.625}]},
}


def small_run(**losses):
  experiment = Experiment(
    name="a name",
    model=ModelConfig(vocabulary_size=260, num_layers=3, num_dense_layers=1),
  )
  experiment.losses.divergence_weight = losses.get("divergence_weight", 0.0)
  return Loaded(
    model=None,
    tokenizer=byte_tokenizer(),
    taxonomy=Taxonomy.from_names(["code/c", "law"]),
    experiment=experiment,
    step=10,
    content_hash="0123",
  )


def card(result=RESULT, **losses):
  return model_card(small_run(**losses), result, "the command")


def table(text, heading):
  """Returns the cells of the table that follows a heading."""
  lines = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_front_matter_is_yaml():
  _, front, _ = card().split("---\n", 2)
  assert yaml.safe_load(front)["library_name"] == "transformers"


def test_figures():
  text = card()
  assert table(text, "Held-out text")[2:] == [
    ["overall", "2.5000", "1.2500"],
    ["c", "2.0000", "1.0000"],
    ["law", "3.0000", "1.5000"],
  ]
  routing = table(text, "Routing on held-out text")
  assert routing[0] == ["figure", "mean", "layer 1", "layer 2"]
  assert ["purity", "0.7500", "0.7500", "0.6250"] in routing


def test_without_figures_the_sections_are_left_out():
  assert re.findall("^## (.*)$", card(None), re.MULTILINE) == [
    "Use",
    "Training",
    "Settings",
    "Export",
  ]


def test_text_names_data_tokens_and_settings():
  text = card()
  # 10 steps of 16 rows of 256 tokens.
  assert "40,960 tokens" in text
  assert "Its domains are code/c, law." in text
  assert "260 rows and the tokenizer 257 tokens" in text
  settings = text.split("## Settings")[1].split("```")[1].split()
  assert settings == [
    *("name=a", "name", "model.vocabulary_size=260", "model.num_layers=3"),
    "model.num_dense_layers=1",
  ]
  assert "```\nthe command\n```" in text


def test_text_says_whether_divergence_was_learned():
  assert "trained it without expert divergence" in card()
  assert "trained it with expert divergence" in card(divergence_weight=0.01)


def test_imported_weights_have_no_text_of_ours():
  source = {"name": "olmoe-small"}
  run = small_run()._replace(content_hash="")
  text = model_card(run, None, "the command", OLMOE, source)
  assert "- olmoe\n" in text
  assert "Its weights are those of olmoe-small." in text
  assert "## Training" not in text
  text = model_card(small_run(), None, "the command", OLMOE, source)
  assert "starting from olmoe-small, without expert" in text
