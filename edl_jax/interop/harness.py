"""A run as a model of lm-evaluation-harness; importing this registers it.

  import lm_eval
  import edl_jax.interop.harness

  lm_eval.simple_evaluate(
    "edl_jax", {"checkpoint": "runs/demo"}, tasks=["arc_easy"]
  )

The harness is EleutherAI's, https://github.com/EleutherAI/lm-evaluation-harness
(PyPI `lm_eval`); `edl_jax.interop.lm_eval` is its command line with this model.
"""

import dataclasses
import importlib
import importlib.util
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from edl_jax import sharding
from edl_jax.checkpoint import load
from edl_jax.config import MeshConfig, UserError
from edl_jax.generation.settings import Settings
from edl_jax.tasks.scoring import Score, check_scoring, score_texts
from edl_jax.tasks.windows import Window, encode_pairs, windows_of

# Tokens of a continuation without a limit of its own, as the harness has it.
_NEW_TOKENS = 256


def _harness(name: str) -> Any:
  """Imports a module of the harness, which has no types.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module(f"lm_eval.{name}")
  except ModuleNotFoundError as error:
    raise UserError(
      f"lm-evaluation-harness needs the package {error.name}: pip install -r"
      " requirements-lm-eval.txt"
    ) from error


class HarnessModel:
  """A checkpoint that answers the harness's requests, in one process.

  `register` makes it a class of the harness, whose package is optional.

  Attributes:
    run: the loaded checkpoint.
    max_length: most tokens that the model reads of a request.
  """

  # Of the harness's class: keeps answers for its next run.
  cache_hook: Any

  def __init__(
    self,
    checkpoint: str = "",
    *,
    step: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    batch_prompts: int = 16,
    domain: str | None = None,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    device: str | None = None,
    **axes: int,
  ):
    """Loads the checkpoint; the arguments are those of `--model_args`.

    Args:
      checkpoint: a run's workdir, or the folder of one of its steps.
      step: which checkpoint; by default the newest.
      max_length: most tokens that the model reads of a request; by default
        those of a training row.
      batch_tokens: tokens of a batch of log-likelihoods, padding included.
      batch_prompts: prompts that are continued at a time.
      domain: fine domain of all texts, for `model.router=domain` alone.
      batch_size, max_batch_size, device: passed by the harness in any case, and
        not read: batches follow from the above, and JAX finds the devices.
      **axes: sizes of mesh axes, such as expert=4; without any, one device
        holds the model.

    Raises:
      UserError: there is no such checkpoint, or an argument is unknown or out
        of bounds.
    """
    super().__init__()
    del batch_size, max_batch_size, device
    if jax.process_count() > 1:
      raise UserError("lm-evaluation-harness runs in one process")
    if not checkpoint:
      raise UserError("--model_args lacks checkpoint=FOLDER")
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    bounded = {"batch_tokens": batch_tokens, "batch_prompts": batch_prompts}
    if max_length is not None:
      bounded["max_length"] = max_length
    for name, value in (bounded | axes).items():
      if name not in bounded | sizes:
        raise UserError(
          f"--model_args: {name} is unknown; there are checkpoint, step,"
          " max_length, batch_tokens, batch_prompts, domain, and axes:"
          f" {', '.join(sizes)}"
        )
      if not isinstance(value, int) or value < 1:
        raise UserError(f"--model_args: {name}={value} must be 1 or more")
    sizes |= axes
    self._mesh = sharding.make_mesh(
      MeshConfig(**sizes), jax.devices()[: int(np.prod([*sizes.values()]))]
    )
    self.run = load(str(checkpoint), step, self._mesh)
    self.max_length = max_length or self.run.experiment.train.sequence_length
    self._batch_tokens, self._batch_prompts = batch_tokens, batch_prompts
    self._domain = domain

  def loglikelihood(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Returns log-likelihoods in nats, and whether greedy text is the same."""
    del disable_tqdm
    pairs = [request.args for request in requests]
    scores = self._score(
      [
        windows_of(tokens, first, self.max_length)
        for tokens, first in encode_pairs(self.run.tokenizer, pairs)
      ]
    )
    if cut := sum(each.truncated for each in scores):
      warnings.warn(
        f"the model reads {self.max_length} tokens: {cut} of {len(scores)}"
        " requests are longer and lose tokens at their left",
        stacklevel=2,
      )
    answers = [(each.log_likelihood, each.greedy) for each in scores]
    self._keep("loglikelihood", pairs, answers)
    return answers

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihood of each text behind a document start.

    A text that is too long is cut as the harness does it: every token is scored
    once, and the last part has a whole row of context.
    """
    del disable_tqdm
    texts = [request.args for request in requests]
    encoded = self.run.tokenizer.encode_batch([text for (text,) in texts])
    windows_of_text = _harness("utils").get_rolling_token_windows
    windows: list[list[Window]] = [[] for _ in texts]
    for some, tokens in zip(windows, encoded, strict=True):
      for context, continuation in windows_of_text(
        tokens.tolist(),
        self.run.tokenizer.document_start_id,
        self.max_length,
        context_len=1,
      ):
        # The window's inputs and targets overlap in all but one token.
        sequence = np.array([*context, continuation[-1]], np.int32)
        first = len(sequence) - len(continuation)
        some.append(Window(sequence, first, truncated=len(some) > 0))
    totals = [each.log_likelihood for each in self._score(windows)]
    self._keep("loglikelihood_rolling", texts, totals)
    return totals

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Returns the continuation of each prompt, without its stop string.

    Raises:
      UserError: a request sets something that generation does not know.
    """
    del disable_tqdm
    prompts = [request.args for request in requests]
    groups: dict[str, list[int]] = {}
    for index, (_, wishes) in enumerate(prompts):
      groups.setdefault(json.dumps(wishes, sort_keys=True), []).append(index)
    texts = [""] * len(prompts)
    for indices in groups.values():
      settings = self._settings(prompts[indices[0]][1])
      # Prompts of like lengths need the least padding.
      indices.sort(key=lambda index: len(prompts[index][0]))
      for start in range(0, len(indices), self._batch_prompts):
        part = indices[start : start + self._batch_prompts]
        results = self.run.generate(
          [prompts[index][0] for index in part], **vars(settings)
        )
        for index, result in zip(part, results, strict=True):
          texts[index] = result.text
    self._keep("generate_until", prompts, texts)
    return texts

  def get_model_info(self) -> dict[str, Any]:
    """Returns what the harness writes into its results."""
    leaves = jax.tree.leaves(self.run.model)
    return {
      "model_num_parameters": sum(leaf.size for leaf in leaves),
      "model_step": self.run.step,
      "model_content_hash": self.run.content_hash,
    }

  def _score(self, texts: Sequence[Sequence[Window]]) -> list[Score]:
    check_scoring(self.run.model.config, self.run.tokenizer)
    scores, _ = score_texts(
      *(self.run.model, texts, self.max_length),
      *(self._mesh, self._batch_tokens),
    )
    return scores

  def _keep(
    self, kind: str, asked: Iterable[Any], answers: Iterable[Any]
  ) -> None:
    """Lets the harness keep the answers for its next run (--use_cache)."""
    for args, answer in zip(asked, answers, strict=True):
      self.cache_hook.add_partial(kind, args, answer)

  def _settings(self, wishes: Mapping[str, Any]) -> Settings:
    """Returns what a request of the harness asks for.

    Raises:
      UserError: it asks for something unknown, or leaves no room for a prompt.
    """
    left = dict(wishes)
    left.pop("max_length", None)
    stop = left.pop("until", None) or []
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens")
    given = [left.pop(name) for name in limits if name in left]
    num_tokens = int(given[0]) if given else _NEW_TOKENS
    temperature = float(left.pop("temperature", 0))
    if not left.pop("do_sample", temperature > 0):
      temperature = 0.0
    settings = Settings(
      temperature=temperature,
      top_k=int(left.pop("top_k", 0)),
      top_p=float(left.pop("top_p", 1)),
      num_tokens=num_tokens,
      stop=tuple(each for each in stop if each),
      domain=self._domain,
    )
    if left:
      raise UserError(f"generation_kwargs: {', '.join(left)}: unknown")
    if num_tokens >= self.max_length:
      raise UserError(
        f"generation_kwargs: {num_tokens} new tokens leave no room for a prompt"
        f" among max_length={self.max_length}; set max_gen_toks or max_length"
      )
    return dataclasses.replace(
      settings, prompt_tokens=self.max_length - num_tokens
    )


def register() -> None:
  """Makes the harness know the model `edl_jax`.

  Raises:
    UserError: the harness is not installed.
  """
  registry = _harness("api.registry")
  # The harness's own models: it adds them itself to an empty registry alone.
  _harness("models")
  if "edl_jax" not in registry.model_registry:
    bases = (HarnessModel, _harness("api.model").LM)
    registry.register_model("edl_jax")(type("EdlJax", bases, {}))


if importlib.util.find_spec("lm_eval") is not None:
  register()
