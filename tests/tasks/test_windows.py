"""Texts become windows that score each of their tokens once."""

import numpy as np
import pytest
import tokenizers

from edl_jax.config import UserError
from edl_jax.tasks.windows import encode_pair, encode_pairs, windows_of
from edl_jax.text.tokenizer import (
  Tokenizer,
  byte_tokenizer,
  train_tokenizer,
)


def test_windows_score_each_token_once():
  tokens = np.arange(40, dtype=np.int32)
  for first in (1, 5, 30, 39):
    for max_length in (1, 2, 7, 16, 39, 64):
      windows = windows_of(tokens, first, max_length)
      scored = [t for w in windows for t in w.tokens[w.first :]]
      assert scored == list(range(first, 40))
      for window in windows:
        assert len(window.tokens) <= max_length + 1
        assert window.first >= 1
        assert window.truncated == (window.tokens[0] > 0)


def test_white_space_moves_to_the_continuation():
  tokenizer = train_tokenizer(["one two three " * 50], 300)
  tokens, first = encode_pair(tokenizer, "one ", "two")
  assert tokens[0] == tokenizer.document_start_id
  assert tokenizer.decode(tokens[first:]) == " two"


def test_texts_that_cannot_be_encoded_are_named():
  with pytest.raises(UserError, match="continuation 2 is empty"):
    encode_pairs(byte_tokenizer(), [("a", "b"), ("a", "")])
  # A tokenizer that lowers letters, as some of other projects do.
  library = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
  library.normalizer = tokenizers.normalizers.Lowercase()
  with pytest.raises(UserError, match=r"of q: .* cannot encode 'Good'"):
    encode_pairs(Tokenizer(library), [("so ", "Good")], "of q".format)
