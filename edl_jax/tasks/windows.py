"""Texts to score as tokens, in windows that a model can read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edl_jax.config import UserError
from edl_jax.text.tokenizer import Tokenizer


class Window(NamedTuple):
  """Tokens that the model reads in one row, some of which are scored."""

  # int32, at most one more than the model reads.
  tokens: np.ndarray
  # Index of the first scored token, at least 1; all later ones are scored too.
  first: int
  # Whether tokens before these were cut off.
  truncated: bool


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, int]:
  """Tokenises a context and what follows it; see `encode_pairs`."""
  return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(
  tokenizer: Tokenizer,
  pairs: Sequence[tuple[str, str]],
  name: Callable[[int], str] = "continuation {}".format,
) -> list[tuple[np.ndarray, int]]:
  """Tokenises contexts, each with what follows it as a whole.

  As in lm-evaluation-harness, white space at the end of the context moves to
  the continuation, and the context has as many tokens as it has alone. Unlike
  there, at least one token is left to the continuation.

  Args:
    tokenizer: of the model.
    pairs: (context, continuation).
    name: returns what messages call the pair of a number, from 1.

  Returns:
    Of each pair its tokens, int32, after a document start; and the index of the
    first token of the continuation.

  Raises:
    UserError: a continuation is empty, or the tokenizer loses text.
  """
  wholes = [context + continuation for context, continuation in pairs]
  # The choices of a question share a context.
  contexts = list(dict.fromkeys(context.rstrip() for context, _ in pairs))
  encoded = tokenizer.encode_batch([*wholes, *contexts])
  alone = dict(zip(contexts, map(len, encoded[len(wholes) :])))
  start = np.array([tokenizer.document_start_id], np.int32)
  found = []
  for number, ((context, continuation), text, tokens) in enumerate(
    zip(pairs, wholes, encoded), 1
  ):
    if not continuation:
      raise UserError(f"{name(number)} is empty")
    if (decoded := tokenizer.decode(tokens.tolist())) != text:
      same = next(
        (i for i, (a, b) in enumerate(zip(text, decoded)) if a != b),
        min(len(text), len(decoded)),
      )
      raise UserError(
        f"{name(number)}: the tokenizer cannot encode"
        f" {text[same : same + 20]!r}"
      )
    first = 1 + min(alone[context.rstrip()], len(tokens) - 1)
    found.append((np.concatenate([start, tokens]), first))
  return found


def windows_of(tokens: np.ndarray, first: int, max_length: int) -> list[Window]:
  """Returns the rows that score a continuation; one, unless it is too long.

  A context that is too long loses tokens at its left. A continuation longer
  than `max_length` is scored in pieces of half that length, each after as many
  tokens as fit.

  Args:
    tokens, first: from `encode_pairs`.
    max_length: most tokens that the model reads.
  """
  fits = len(tokens) - first <= max_length
  step = len(tokens) - first if fits else max(1, max_length // 2)
  windows = []
  for start in range(first, len(tokens), step):
    end = min(start + step, len(tokens))
    lost = max(0, end - 1 - max_length)
    windows.append(Window(tokens[lost:end], start - lost, lost > 0))
  return windows
