"""A contestant of `benchmarks.scoring` and `benchmarks.generation`.

This program runs in the contestant's own process and environment, so it imports
only the standard library until it knows the contestant:

  python inference.py CONTESTANT MODEL THREADS

MODEL is a run, or the folder of its exported weights. The program reads tasks
as JSON from the standard input, one a line, and answers each on a line of its
own, behind "RESULT ": the seconds that it took, and what came out.
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any


class Ours:
  """edl_jax, as its users call it."""

  packages = ("jax", "flax")

  def __init__(self, folder: str, threads: int):
    del threads
    import jax

    from edl_jax import checkpoint, runtime, sharding
    from edl_jax.config import MeshConfig

    runtime.configure()
    self._mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    self._run = checkpoint.load(folder, mesh=self._mesh)

  def modes(self, kind: str) -> list[Any]:
    return (
      [{"batch_tokens": size} for size in (2048, 8192)]
      if kind == "score"
      else [{}]
    )

  def score(
    self, pairs: list[list[str]], max_length: int, mode: dict[str, int]
  ) -> list[float]:
    from edl_jax.tasks.scoring import score

    found = score(
      self._run.model,
      self._run.tokenizer,
      # JSON has no tuples.
      [(context, continuation) for context, continuation in pairs],
      *(max_length, self._mesh),
      **mode,
    )
    return [each.log_likelihood for each in found]

  def generate(
    self, prompts: list[str], num_tokens: int, mode: dict[str, Any]
  ) -> list[int]:
    del mode
    results = self._run.generate(prompts, num_tokens=num_tokens)
    lengths = self._run.tokenizer.encode_batch(prompts)
    return [
      len(each.tokens) - 1 - len(prompt)
      for each, prompt in zip(results, lengths, strict=True)
    ]


class Transformers:
  """Transformers on PyTorch; lm-evaluation-harness's class asks it to score."""

  packages = ("torch", "transformers", "lm_eval")
  experts = ("eager", "grouped_mm", "batched_mm")

  def __init__(self, folder: str, threads: int):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(threads)
    self._torch, self._folder = torch, folder
    self._models = {
      name: transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=name
      ).eval()
      for name in self.experts
    }
    self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def modes(self, kind: str) -> list[Any]:
    if kind == "generate":
      return [{"experts": name} for name in self.experts]
    # "batched_mm" copies the weights for every token of every request.
    return [
      {"experts": name, "batch_size": size}
      for name in ("eager", "grouped_mm")
      for size in (8, 32)
    ]

  def score(
    self, pairs: list[list[str]], max_length: int, mode: dict[str, Any]
  ) -> list[float]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
      pretrained=self._models[mode["experts"]],
      tokenizer=self._tokenizer,
      batch_size=mode["batch_size"],
      max_length=max_length,
    )
    requests = [
      Instance("loglikelihood", {}, (context, continuation), 0)
      for context, continuation in pairs
    ]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    return [nats for nats, _ in found]

  def generate(
    self, prompts: list[str], num_tokens: int, mode: dict[str, Any]
  ) -> list[int]:
    inputs = self._tokenizer(
      prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    with self._torch.no_grad():
      found = self._models[mode["experts"]].generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
      )
    self._tokenizer.batch_decode(found)
    return [found.shape[1] - inputs.input_ids.shape[1]] * len(prompts)


CONTESTANTS = {"ours": Ours, "transformers": Transformers}


def main(name: str, folder: str, threads: str) -> None:
  if hasattr(os, "sched_setaffinity"):
    # XLA starts a thread for each core that it may use.
    cores = sorted(os.sched_getaffinity(0))[: int(threads)]
    os.sched_setaffinity(0, cores)
  contestant = CONTESTANTS[name](folder, int(threads))
  for line in sys.stdin:
    task = json.loads(line)
    kind = task.pop("kind")
    start = time.perf_counter()
    if kind == "describe":
      result: Any = {
        "modes": {
          each: contestant.modes(each) for each in ("score", "generate")
        },
        "versions": {
          each: importlib.metadata.version(each) for each in contestant.packages
        },
      }
    else:
      result = getattr(contestant, kind)(**task)
    seconds = time.perf_counter() - start
    print(f"RESULT {json.dumps([seconds, result])}", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
