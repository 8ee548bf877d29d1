"""Times the training step of one contestant of `benchmarks.peers`.

This program runs in the contestant's own process and environment, so it imports
only the standard library until it knows the contestant. It takes the request as
JSON on the command line, and prints the answer as JSON on its last line.

A step ends when its parameters are ready, for which every contestant waits.
Each repeats one batch of random tokens of its own.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Request(NamedTuple):
  """What to run."""

  # A key of CONTESTANTS.
  contestant: str
  # The experiment by dotted key, as `edl_jax.config.flatten` gives it.
  experiment: dict[str, Any]
  # Number of domains in our objective.
  num_domains: int
  # Steps before the timed ones, and timed steps.
  warmup_steps: int
  steps: int
  threads: int
  # Folder that keeps compiled programs for later processes.
  cache: str
  # time.monotonic() when this process was started; processes share this clock.
  started: float

  @property
  def all_steps(self) -> int:
    return self.warmup_steps + self.steps


class Clock:
  """Records the end and the loss of each step."""

  def __init__(self, request: Request):
    self._request = request
    self._ends: list[float] = []
    self._losses: list[float] = []

  def tick(self, loss: float) -> None:
    """Records the end of a step and its LM loss in nats per token."""
    self._ends.append(time.monotonic())
    self._losses.append(loss)

  def figures(self) -> dict[str, Any]:
    """Returns tokens per second, seconds, and first and last loss."""
    request, ends = self._request, self._ends
    tokens = (
      request.experiment["train.batch_size"]
      * request.experiment["train.sequence_length"]
    )
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    timed = seconds[-request.steps :]
    return {
      "tokens_per_second": tokens / statistics.median(timed),
      "step_seconds": timed,
      "first_step_seconds": ends[0] - request.started,
      "lm_loss": [self._losses[0], self._losses[-1]],
    }


def ours(request: Request, clock: Clock) -> tuple[int, list[str]]:
  """Runs our step, made, compiled and called as by `edl_jax.train`."""
  import jax

  from benchmarks.steps import TrainingStep
  from edl_jax import config, runtime, sharding
  from edl_jax.model.transformer import parameter_counts

  runtime.configure()
  experiment = config.unflatten(request.experiment)
  mesh = sharding.make_mesh(experiment.mesh)
  with jax.set_mesh(mesh):
    step = TrainingStep(experiment, request.num_domains, mesh)
    for _ in range(request.all_steps):
      step()
      clock.tick(float(step.output.scalars["lm_loss"]))
  return parameter_counts(experiment.model)[0], ["jax", "flax", "optax"]


def transformers(
  request: Request, clock: Clock, compiled: bool = False
) -> tuple[int, list[str]]:
  """Runs `Qwen3MoeForCausalLM` on PyTorch.

  It uses the library's fastest dropless experts, "grouped_mm". On a CPU,
  "eager" was a tenth slower, and "batched_mm", which copies the weights for
  every token, far slower.

  Args:
    compiled: whether to use `torch.compile`.
  """
  import torch
  from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

  torch.set_num_threads(request.threads)
  torch.manual_seed(0)
  flat = request.experiment
  model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
      vocab_size=flat["model.vocabulary_size"],
      num_hidden_layers=flat["model.num_layers"],
      hidden_size=flat["model.width"],
      num_attention_heads=flat["model.num_heads"],
      num_key_value_heads=flat["model.num_kv_heads"],
      head_dim=flat["model.head_width"],
      num_experts=flat["model.num_experts"],
      num_experts_per_tok=flat["model.num_active_experts"],
      moe_intermediate_size=flat["model.expert_width"],
      max_position_embeddings=flat["train.sequence_length"],
      norm_topk_prob=True,
      tie_word_embeddings=False,
      use_cache=False,
      output_router_logits=True,
      router_aux_loss_coef=flat["losses.balance_weight"],
      attn_implementation="sdpa",
      experts_implementation="grouped_mm",
    )
  )
  model.train()
  parameters = list(model.parameters())
  optimizer = torch.optim.AdamW(
    parameters,
    lr=flat["optimizer.learning_rate"],
    betas=(flat["optimizer.beta1"], flat["optimizer.beta2"]),
    weight_decay=flat["optimizer.weight_decay"],
    fused=True,
  )
  tokens_BT = torch.randint(
    flat["model.vocabulary_size"],
    (flat["train.batch_size"], flat["train.sequence_length"]),
  )
  targets_BT = tokens_BT.roll(-1, 1)
  forward = torch.compile(model) if compiled else model
  for _ in range(request.all_steps):
    output = forward(
      input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT
    )
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, flat["optimizer.clip_norm"])
    optimizer.step()
    optimizer.zero_grad()
    balance_loss = flat["losses.balance_weight"] * output.aux_loss
    clock.tick((output.loss - balance_loss).item())
  size = sum(parameter.numel() for parameter in parameters)
  return size, ["transformers", "torch"]


def maxtext_model(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings that give MaxText the shapes of an experiment.

  Args:
    flat: the experiment by dotted key.

  Returns:
    Values by the names of MaxText's configuration, for any device.
  """
  return {
    "run_name": "peers",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "enable_tensorboard": False,
    "dataset_type": "synthetic",
    "vocab_size": flat["model.vocabulary_size"],
    "base_num_decoder_layers": flat["model.num_layers"],
    "base_emb_dim": flat["model.width"],
    "base_num_query_heads": flat["model.num_heads"],
    "base_num_kv_heads": flat["model.num_kv_heads"],
    "head_dim": flat["model.head_width"],
    "num_experts": flat["model.num_experts"],
    "num_experts_per_tok": flat["model.num_active_experts"],
    "base_mlp_dim": flat["model.expert_width"],
    "base_moe_mlp_dim": flat["model.expert_width"],
    "mlp_activations": '["silu","linear"]',
    "enable_dropout": False,
    "dtype": flat["model.dtype"],
    "weight_dtype": "float32",
    "max_target_length": flat["train.sequence_length"],
    "load_balance_loss_weight": flat["losses.balance_weight"],
    "learning_rate": flat["optimizer.learning_rate"],
    "adam_b1": flat["optimizer.beta1"],
    "adam_b2": flat["optimizer.beta2"],
    "adam_weight_decay": flat["optimizer.weight_decay"],
    "gradient_clipping_threshold": flat["optimizer.clip_norm"],
  }


def maxtext_settings(request: Request) -> dict[str, Any]:
  """Returns the settings of MaxText, by the names of its configuration.

  "minimal_with_context" rematerialises least, and unscanned layers ran and
  compiled faster on a CPU. Its Mixtral block has no QK-norm: in each layer, two
  vectors of head width less than the others have.
  """
  return maxtext_model(request.experiment) | {
    "base_output_directory": os.path.join(os.getcwd(), "output"),
    "hardware": "cpu",
    "jax_cache_dir": request.cache,
    "steps": request.all_steps,
    "decoder_block": "mixtral",
    "attention": "dot_product",
    "remat_policy": "minimal_with_context",
    "scan_layers": False,
    "per_device_batch_size": request.experiment["train.batch_size"],
  }


def maxtext_arguments(settings: Mapping[str, Any]) -> list[str]:
  """Returns the command line of MaxText's programs, with its base settings."""
  found = importlib.util.find_spec("maxtext")
  assert found is not None and found.submodule_search_locations
  base = os.path.join(
    found.submodule_search_locations[0], "configs", "base.yml"
  )
  return ["train", base, *(f"{k}={v}" for k, v in settings.items())]


def maxtext(
  request: Request, clock: Clock, experts: dict[str, Any]
) -> tuple[int, list[str]]:
  """Runs MaxText's own program, with a clock around its loop's iterations."""
  os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
  import jax
  from flax import nnx
  from maxtext.trainers.pre_train import train

  iteration = train.training_loop_iteration
  size = 0

  def timed_iteration(on_device: dict[str, Any], *others: Any) -> Any:
    nonlocal size
    metrics = iteration(on_device, *others)
    jax.block_until_ready(on_device["state"])
    clock.tick(float(metrics["scalar"]["learning/lm_loss"]))
    parameters = nnx.state(on_device["state"].model, nnx.Param)
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return metrics

  train.training_loop_iteration = timed_iteration
  train.main(maxtext_arguments(maxtext_settings(request) | experts))
  return size, ["maxtext", "jax", "flax"]


def maxtext_dense(request: Request, clock: Clock) -> tuple[int, list[str]]:
  """Runs MaxText dropless: every expert computes every token."""
  return maxtext(
    request, clock, {"sparse_matmul": False, "capacity_factor": -1}
  )


def maxtext_sparse(request: Request, clock: Clock) -> tuple[int, list[str]]:
  """Runs MaxText dropless: `jax.lax.ragged_dot` over sorted tokens."""
  return maxtext(request, clock, {"sparse_matmul": True, "megablox": False})


def transformers_compiled(
  request: Request, clock: Clock
) -> tuple[int, list[str]]:
  return transformers(request, clock, compiled=True)


# Each function takes all steps, and returns the number of parameters and the
# packages whose versions to report.
CONTESTANTS: dict[str, Callable[[Request, Clock], tuple[int, list[str]]]] = {
  "ours": ours,
  "transformers": transformers,
  "transformers_compiled": transformers_compiled,
  "maxtext": maxtext_dense,
  "maxtext_sparse": maxtext_sparse,
}


def main(text: str) -> None:
  request = Request(**json.loads(text))
  if hasattr(os, "sched_setaffinity"):
    # XLA starts a thread for each core that it may use. macOS has no affinity:
    # there all contestants but PyTorch's use every core.
    cores = sorted(os.sched_getaffinity(0))[: request.threads]
    os.sched_setaffinity(0, cores)
  clock = Clock(request)
  parameters, packages = CONTESTANTS[request.contestant](request, clock)
  versions = {name: importlib.metadata.version(name) for name in packages}
  answer = {"parameters": parameters, **clock.figures(), "versions": versions}
  print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
