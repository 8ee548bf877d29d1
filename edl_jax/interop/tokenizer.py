"""Tokenizers as Transformers' AutoTokenizer writes and reads them."""

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from edl_jax.config import UserError
from edl_jax.text.tokenizer import Tokenizer, byte_tokenizer, open_tokenizer

# In the order in which they are looked for.
_FILES = ("tokenizer.json", "tokenizer.model")
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
  paths = [os.path.join(source, name) for name in _FILES]
  found = next(filter(os.path.exists, paths), None)
  if found is None:
    raise UserError(
      f"{source} has no {' or '.join(_FILES)}; name a tokenizer by --tokenizer"
    )
  tokenizer = open_tokenizer(found)
  settings = _read_json(os.path.join(source, "tokenizer_config.json"))
  config = {
    name: _token_text(settings[name])
    for name in _CONFIG
    if settings.get(name) is not None
  }
  template = os.path.join(source, "chat_template.jinja")
  if os.path.exists(template):
    with open(template, encoding="utf-8") as file:
      config["chat_template"] = file.read()
  steps = {}
  if found.endswith(".json"):
    steps = {name: _read_json(found).get(name) for name in _STEPS}
  return tokenizer, {"tokenizer_config": config, "tokenizer_steps": steps}


def _token_text(token: Any) -> Any:
  """Returns the text of a special token, which older files keep in a dict."""
  is_token = isinstance(token, dict) and "content" in token
  return token["content"] if is_token else token


def _read_json(path: str) -> dict[str, Any]:
  """Returns a JSON object; an empty one if there is no such file."""
  if not os.path.exists(path):
    return {}
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    if not isinstance(content, dict):
      raise ValueError("not an object")
    return content
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error})") from error


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
    content = json.loads(tokenizer.to_json()) | source["tokenizer_steps"]
    return json.dumps(content, ensure_ascii=False, indent=2), {
      **source["tokenizer_config"],
      "clean_up_tokenization_spaces": False,
      "model_max_length": max_length,
      "tokenizer_class": "PreTrainedTokenizerFast",
    }
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
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
