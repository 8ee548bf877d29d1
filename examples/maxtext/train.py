"""Trains a small MaxText model on four made-up domains, with expert divergence.

  python -m examples.maxtext.train 0.01

takes the weight of the divergence loss, and prints losses every ten steps.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# MaxText reads these when it is imported.
os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}

import numpy as np
from maxtext.input_pipeline import input_pipeline_interface
from maxtext.trainers.pre_train import train

from examples.maxtext import patch

B, T, V, D, STEPS = 32, 32, 64, 4, 101
SETTINGS = {
  "run_name": "divergence",
  "hardware": "cpu",
  "skip_jax_distributed_system": True,
  "enable_checkpointing": False,
  "enable_tensorboard": False,
  # Without it the divergence counts, but is not among the metrics.
  "record_internal_nn_metrics": True,
  "decoder_block": "qwen3_moe",
  "vocab_size": V,
  "base_num_decoder_layers": 2,
  "base_emb_dim": 32,
  "base_num_query_heads": 2,
  "base_num_kv_heads": 2,
  "head_dim": 16,
  "base_mlp_dim": 32,
  "base_moe_mlp_dim": 32,
  "num_experts": 8,
  "num_experts_per_tok": 2,
  "norm_topk_prob": True,
  "load_balance_loss_weight": 0.01,
  "mlp_activations": '["silu","linear"]',
  "enable_dropout": False,
  "sparse_matmul": False,
  "capacity_factor": -1,
  "attention": "dot_product",
  "dtype": "float32",
  "max_target_length": T,
  "per_device_batch_size": B,
  "learning_rate": 0.01,
  "steps": STEPS,
}


def batches() -> Iterator[dict[str, np.ndarray]]:
  """Draws rows; each domain is a random chain with three ways on per token."""
  random = np.random.default_rng(0)
  next_DV3 = random.integers(V, size=(D, V, 3))
  domain_B = np.arange(B) % D
  while True:
    token_B, tokens = np.zeros(B, int), []
    for _ in range(T + 1):
      tokens.append(token_B)
      token_B = next_DV3[domain_B, token_B, random.integers(3, size=B)]
    tokens_BT = np.stack(tokens, 1).astype(np.int32)
    ones_BT = np.ones((B, T), np.int32)
    position_BT = ones_BT * np.arange(T, dtype=np.int32)
    batch = {patch.DOMAIN: ones_BT * domain_B[:, None].astype(np.int32)}
    for name, first in (("inputs", 0), ("targets", 1)):
      batch[name] = tokens_BT[:, first : first + T]
      batch[f"{name}_position"] = position_BT
      batch[f"{name}_segmentation"] = ones_BT
    yield batch


def arguments(folder: str, **more: Any) -> list[str]:
  """Returns the command line of MaxText's trainer, which writes to `folder`."""
  found = importlib.util.find_spec("maxtext")
  assert found is not None and found.submodule_search_locations
  base = f"{found.submodule_search_locations[0]}/configs/base.yml"
  settings = SETTINGS | {"base_output_directory": folder} | more
  return ["train", base, *(f"{k}={v}" for k, v in settings.items())]


def main(weight: float) -> None:
  patch.apply(num_domains=D, weight=weight)
  input_pipeline_interface.create_data_iterator = lambda *_: (batches(), None)
  iteration = train.training_loop_iteration

  def printing_iteration(state: Any, variables: Any, *rest: Any) -> Any:
    metrics = iteration(state, variables, *rest)
    if variables["step"] % 10 == 0:
      lm_loss, divergence = (
        float(metrics["scalar"][f"learning/{name}"])
        for name in ("lm_loss", "divergence_loss")
      )
      print(
        f"step {variables['step']}: LM loss {lm_loss:.3f},"
        f" divergence loss {divergence:.3f}",
        flush=True,
      )
    return metrics

  train.training_loop_iteration = printing_iteration
  try:
    with tempfile.TemporaryDirectory() as folder:
      train.main(arguments(folder))
  finally:
    train.training_loop_iteration = iteration


if __name__ == "__main__":
  main(float(sys.argv[1]))
