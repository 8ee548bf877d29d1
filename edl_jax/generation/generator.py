"""Continues prompts with a model: prefill, then a token a step."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from edl_jax import sharding
from edl_jax.config import ModelConfig, UserError
from edl_jax.generation.sampling import draw, sample_keys
from edl_jax.generation.settings import Sampling, Settings
from edl_jax.generation.stopping import cut, settled
from edl_jax.model.cached import (
  CACHE_SPEC,
  Cache,
  advance,
  empty_cache,
  in_compute_dtype,
)
from edl_jax.model.choice import Choice, make_choice
from edl_jax.model.documents import mesh_of
from edl_jax.model.transformer import Model
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import Tokenizer

# Prompts and caches have a multiple of this many positions, so that prompts of
# like lengths run the same compiled programs.
_ROUND = 64
# Tokens that each row draws between two looks of the host. More would be wasted
# behind a stop string, and come to the terminal in larger pieces.
_AT_ONCE = 8


class Generated(NamedTuple):
  """One continuation of a prompt."""

  prompt: str
  # What follows the prompt, without a stop string.
  text: str
  # What the model read of the document start and the prompt, and the new ones,
  # with those of a stop string and without that of a document's end.
  tokens: list[int]
  # Why it ends: at its "length", a "stop" string, or the document's "end".
  finish: str
  # The active experts of every token but the last, by falling probability:
  # int32 (L, T, A) with the mixture-of-experts layers. None if not asked for.
  experts_LTA: np.ndarray | None


class _Sample:
  """A continuation that is being made."""

  def __init__(self, prompt: str, tokens: list[int]):
    self.prompt, self.tokens = prompt, tokens
    self.num_prompt_tokens = len(tokens)
    self.text, self.shown, self.finish = "", "", ""

  def add(
    self, token: int, tokenizer: Tokenizer, stop: Sequence[str], most: int
  ) -> str:
    """Takes the next token, and returns what of the text became final."""
    if token == tokenizer.document_start_id:
      self.finish = "end"
    else:
      self.tokens.append(token)
      new = self.tokens[self.num_prompt_tokens :]
      self.text = tokenizer.decode(new)
      before = cut(self.text, stop)
      if before is not None:
        self.text, self.finish = before, "stop"
      elif len(new) == most:
        self.finish = "length"
    final = self.text if self.finish else settled(self.text, stop)
    piece = final[len(self.shown) :]
    self.shown += piece
    return piece


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnums=4)
def _first(
  model: Model,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  last_B: jax.Array,
  cache: Cache,
  choice: Choice,
  keys_B: jax.Array,
  allowed_V: jax.Array,
  sampling: Sampling,
) -> tuple[jax.Array, Cache, jax.Array]:
  """Runs the prompts, and draws the first token of each row, (B, 1)."""
  logits_BV, cache, expert_LBTA = advance(
    model, tokens_BT, positions_BT, last_B, cache, choice
  )
  logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
  token_B = draw(logits_BV, keys_B, jnp.int32(0), sampling)
  return token_B[:, None], cache, expert_LBTA


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnums=3)
def _further(
  model: Model,
  tokens_BI: jax.Array,
  position_B: jax.Array,
  cache: Cache,
  choice: Choice,
  keys_B: jax.Array,
  drawn: jax.Array,
  count: jax.Array,
  allowed_V: jax.Array,
  sampling: Sampling,
) -> tuple[jax.Array, Cache, jax.Array]:
  """Draws up to `_AT_ONCE` tokens of each row, without a look of the host.

  Args:
    model, cache, choice, keys_B, allowed_V, sampling: as for the first token.
    tokens_BI: the last tokens drawn, of which the last one was not run yet.
    position_B: its position.
    drawn: tokens drawn before these.
    count: tokens to draw.

  Returns:
    The tokens, (B, I), and the active experts of those run, (L, B, I, A), both
    with I = `_AT_ONCE`, of which `count` mean something; and the cache.
  """
  rows = len(position_B)
  num_moe = model.config.num_layers - model.config.num_dense_layers
  active = model.config.num_active_experts

  def one(i, carried):
    token_B, tokens_BI, expert_LBIA, cache = carried
    logits_BV, cache, expert_LB1A = advance(
      *(model, token_B[:, None], (position_B + i)[:, None]),
      *(jnp.zeros_like(position_B), cache, choice),
    )
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    token_B = draw(logits_BV, keys_B, drawn + i, sampling)
    return (
      token_B,
      tokens_BI.at[:, i].set(token_B),
      jax.lax.dynamic_update_slice_in_dim(expert_LBIA, expert_LB1A, i, 2),
      cache,
    )

  _, tokens_BI, expert_LBIA, cache = jax.lax.fori_loop(
    *(0, count, one),
    (
      tokens_BI[:, -1],
      jnp.zeros((rows, _AT_ONCE), jnp.int32),
      jnp.zeros((num_moe, rows, _AT_ONCE, active), jnp.int32),
      cache,
    ),
  )
  return tokens_BI, cache, expert_LBIA


def _rounded(length: int) -> int:
  return -(-length // _ROUND) * _ROUND


def _domain_index(taxonomy: Taxonomy, domain: str | None) -> int:
  if domain is None:
    return -1
  if domain not in taxonomy.fine:
    raise UserError(
      f"domain={domain!r} is none of the run's: {', '.join(taxonomy.fine)}"
    )
  return taxonomy.fine.index(domain)


def _encode(
  model: Model, tokenizer: Tokenizer, prompts: Sequence[str]
) -> list[list[int]]:
  """Returns the tokens of each prompt, behind a document start.

  Raises:
    UserError: there is no prompt, or the model has no tokens for one.
  """
  if isinstance(prompts, str) or not prompts:
    raise UserError("there is no list of prompts to continue")
  start, size = tokenizer.document_start_id, model.config.vocabulary_size
  encoded = []
  for number, prompt in enumerate(prompts):
    try:
      tokens = [start, *tokenizer.encode(prompt).tolist()]
    except (TypeError, UnicodeError) as error:
      raise UserError(f"prompt {number + 1} is no Unicode text") from error
    if tokenizer.decode(tokens) != prompt:
      raise UserError(
        f"the run's tokenizer cannot encode prompt {number + 1}: it would read"
        f" {tokenizer.decode(tokens)[:40]!r}"
      )
    if max(tokens) >= size:
      raise UserError(
        f"token {max(tokens)} of prompt {number + 1} is not among the model's"
        f" {size}: this is another model's tokenizer"
      )
    encoded.append(tokens)
  return encoded


def generate(
  model: Model,
  tokenizer: Tokenizer,
  taxonomy: Taxonomy,
  prompts: Sequence[str],
  settings: Settings,
  trained_length: int | None = None,
  on_text: Callable[[int, str], None] | None = None,
) -> list[Generated]:
  """Continues prompts, each as the beginning of a document.

  A sample depends on its prompt, the settings and its number among the samples
  of its prompt, and not on the other prompts.

  Args:
    model: on one device, or laid out on a mesh; its parameters may be those of
      `in_compute_dtype`, which then need no cast.
    tokenizer, taxonomy: those that it was trained with.
    prompts: texts; an empty one starts a document.
    settings: how to continue them.
    trained_length: tokens of a training row; a longer text makes a warning.
    on_text: takes the number of a result and the next piece of its text, as
      soon as no later token can change it.

  Returns:
    The continuations: all samples of the first prompt, then of the second, ...

  Raises:
    UserError: there is no prompt, the model has no tokens for one, the run has
      no such domain, or there are several processes.
  """
  if jax.process_count() > 1:
    raise UserError(
      f"generation runs in one process, and here are {jax.process_count()};"
      " load the checkpoint on the devices of one"
    )
  domain = _domain_index(taxonomy, settings.domain)
  encoded = [
    tokens[-settings.prompt_tokens :]
    for tokens in _encode(model, tokenizer, prompts)
  ]
  samples = [
    _Sample(prompt, list(tokens))
    for prompt, tokens in zip(prompts, encoded, strict=True)
    for _ in range(settings.num_samples)
  ]
  longest = max(map(len, encoded)) + settings.num_tokens - 1
  if trained_length is not None and longest > trained_length:
    warnings.warn(
      f"texts may reach {longest} tokens; the model was trained on rows of"
      f" {trained_length}",
      stacklevel=2,
    )
  mesh = mesh_of(model)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    inputs = _first_inputs(
      model.config, samples, settings, domain, len(taxonomy.fine), mesh
    )
    experts = _continue(model, tokenizer, samples, settings, inputs, on_text)
  return [
    Generated(
      sample.prompt,
      sample.text,
      sample.tokens,
      sample.finish,
      # The step that drew the end read every token of the text.
      np.concatenate(parts, 1)[:, : len(sample.tokens) - 1] if parts else None,
    )
    for sample, parts in zip(samples, experts, strict=True)
  ]


class _Inputs(NamedTuple):
  """Arguments of the first step, with rows enough for the mesh."""

  tokens_BT: np.ndarray
  positions_BT: np.ndarray
  last_B: np.ndarray
  cache: Cache
  choice: Choice
  keys_B: jax.Array


def _first_inputs(
  config: ModelConfig,
  samples: Sequence[_Sample],
  settings: Settings,
  domain: int,
  num_domains: int,
  mesh: Mesh | None,
) -> _Inputs:
  """Returns the prompts as rows; rows that only fill up repeat the last one."""
  shards = 1
  if mesh:
    shards = math.prod(mesh.shape[axis] for axis in sharding.ROW_AXES)
  num_rows = -(-len(samples) // shards) * shards
  index_B = np.minimum(np.arange(num_rows), len(samples) - 1)
  prompts = [samples[i].tokens for i in index_B]
  longest = max(map(len, prompts))
  tokens_BT = np.zeros((num_rows, _rounded(longest)), np.int32)
  for tokens_T, prompt in zip(tokens_BT, prompts, strict=True):
    tokens_T[: len(prompt)] = prompt
  positions_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
  slots = _rounded(longest + settings.num_tokens)
  return _Inputs(
    tokens_BT,
    np.tile(positions_T, (num_rows, 1)),
    np.array([len(prompt) - 1 for prompt in prompts], np.int32),
    jax.jit(
      functools.partial(empty_cache, config, num_rows, slots),
      out_shardings=NamedSharding(mesh, CACHE_SPEC) if mesh else None,
    )(),
    make_choice(config, jnp.full(num_rows, domain, jnp.int32), num_domains),
    sample_keys(settings.seed, jnp.asarray(index_B % settings.num_samples)),
  )


def _continue(
  model: Model,
  tokenizer: Tokenizer,
  samples: Sequence[_Sample],
  settings: Settings,
  inputs: _Inputs,
  on_text: Callable[[int, str], None] | None,
) -> list[list[np.ndarray]]:
  """Adds tokens to the samples until each ends.

  Returns:
    The active experts of each sample, (L, T, A) for each of its steps; empty if
    not asked for.
  """
  tokens_BT, positions_BT, last_B, cache, choice, keys_B = inputs
  # The embedding may have more rows than the tokenizer has ids.
  allowed_V = np.arange(model.config.vocabulary_size)
  allowed_V = allowed_V < tokenizer.vocabulary_size
  model = in_compute_dtype(model)
  experts: list[list[np.ndarray]] = [[] for _ in samples]
  tokens_BI, cache, expert_LBTA = _first(
    *(model, tokens_BT, positions_BT, last_B, cache, choice, keys_B),
    *(allowed_V, settings.sampling),
  )
  # Tokens that each row ran, and those that it drew.
  run_B, drawn, count = last_B + 1, 0, 1
  position_B = last_B + 1
  while True:
    tokens_BI = np.asarray(tokens_BI)[:, :count]
    if settings.experts:
      expert_LBTA = np.asarray(expert_LBTA)
    for i, sample in enumerate(samples):
      if sample.finish:
        continue
      if settings.experts:
        experts[i].append(expert_LBTA[:, i, : run_B[i]])
      for token in tokens_BI[i].tolist():
        piece = sample.add(token, tokenizer, settings.stop, settings.num_tokens)
        if piece and on_text:
          on_text(i, piece)
        if sample.finish:
          break
    drawn += count
    if all(sample.finish for sample in samples):
      return experts
    count = min(_AT_ONCE, settings.num_tokens - drawn)
    tokens_BI, cache, expert_LBTA = _further(
      *(model, tokens_BI[:, -1:], position_B, cache, choice, keys_B),
      *(np.int32(drawn), np.int32(count), allowed_V, settings.sampling),
    )
    run_B, position_B = np.full_like(run_B, count), position_B + count
