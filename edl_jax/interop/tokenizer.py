"""The tokenizer as Transformers' AutoTokenizer reads it."""

from typing import Any

import tokenizers
from tokenizers import decoders, processors

from edl_jax.text.tokenizer import Tokenizer


def hub_tokenizer(
  tokenizer: Tokenizer, max_length: int
) -> tuple[str, dict[str, Any]]:
  """Returns the contents of tokenizer.json and of tokenizer_config.json.

  A text becomes the document start and then its tokens, as in training;
  `add_special_tokens=False` leaves the document start out. Text that spells a
  special token is encoded as any other text.

  Args:
    tokenizer: of the run.
    max_length: tokens of the longest row that the model has seen.
  """
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
