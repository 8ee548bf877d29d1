"""Tokenizers as Transformers' AutoTokenizer writes and reads them."""

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from edl_jax.config import UserError
from edl_jax.text.tokenizer import Tokenizer, byte_tokenizer, open_tokenizer
from edl_jax.text.tokenizer_files import (
  read_settings,
  token_text,
  tokenizer_file,
)

# Steps of a tokenizer.json that edl_jax changes, so that no text is lost.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_CONFIG = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")


def read_hub_tokenizer(
  source: str, path: str = ""
) -> tuple[Tokenizer, dict[str, Any]]:
  """Reads the tokenizer of a checkpoint on the hub.

  Training encodes every text without loss and without a space before it, see
  `text.tokenizer_files`. What that changes is kept aside for `hub_tokenizer`.

  Args:
    source: folder of the checkpoint.
    path: another tokenizer's file, or "byte"; "" for that of the folder.

  Returns:
    The tokenizer; and for `hub_tokenizer` "tokenizer_config", special tokens
    and chat template, and "tokenizer_steps", the steps as they were. Both are
    empty for another tokenizer than the folder's.

  Raises:
    UserError: there is none, or it loses text.
  """
  if path:
    return byte_tokenizer() if path == "byte" else open_tokenizer(path), {}
  try:
    found = tokenizer_file(source)
  except UserError as error:
    raise UserError(f"{error}; name a tokenizer by --tokenizer") from error
  tokenizer = open_tokenizer(source)
  settings = read_settings(os.path.join(source, "tokenizer_config.json"))
  config = {
    name: token_text(settings[name])
    for name in _CONFIG
    if settings.get(name) is not None
  }
  template = os.path.join(source, "chat_template.jinja")
  if os.path.exists(template):
    with open(template, encoding="utf-8") as file:
      config["chat_template"] = file.read()
  steps = {}
  if found.endswith(".json"):
    steps = {name: read_settings(found).get(name) for name in _STEPS}
  return tokenizer, {"tokenizer_config": config, "tokenizer_steps": steps}


def hub_tokenizer(
  tokenizer: Tokenizer, max_length: int, source: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
  """Returns the contents of tokenizer.json and of tokenizer_config.json.

  A text becomes the document start and then its tokens, as in training;
  `add_special_tokens=False` leaves the document start out. Text that spells a
  special token is encoded as any other text. The tokenizer of imported weights
  instead does what it did before the import.

  Args:
    tokenizer: of the run.
    max_length: tokens of the longest row that the model has seen.
    source: of the provenance; empty for weights that were trained here.
  """
  if source.get("tokenizer_steps"):
    content = (
      json.loads(tokenizer.tokenizers_json()) | source["tokenizer_steps"]
    )
    return json.dumps(content, ensure_ascii=False, indent=2), {
      **source["tokenizer_config"],
      "clean_up_tokenization_spaces": False,
      "model_max_length": max_length,
      "tokenizer_class": "PreTrainedTokenizerFast",
    }
  library = tokenizers.Tokenizer.from_str(tokenizer.tokenizers_json())
  start_id = tokenizer.document_start_id
  start = library.id_to_token(start_id)
  library.post_processor = processors.TemplateProcessing(
    single=f"{start}:0 $A:0",
    pair=f"{start}:0 $A:0 {start}:1 $B:1",
    special_tokens=[(start, start_id)],
  )
  if library.decoder is None:
    # A SentencePiece model writes a space as "▁".
    library.decoder = decoders.Sequence(
      [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
      ]
    )
  return library.to_str(pretty=True), {
    "bos_token": start,
    "clean_up_tokenization_spaces": False,
    # A document ends where the next one begins.
    "eos_token": start,
    "model_max_length": max_length,
    "pad_token": start,
    "split_special_tokens": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
