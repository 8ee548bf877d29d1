"""The tensors of a checkpoint on the hub as parts of the parameters.

PyTorch's linear layers keep the matrix of outputs by inputs, and checkpoints
keep every layer and every expert apart; the parameters keep inputs first and
stack layers and experts. Each tensor is therefore a view of a parameter, which
export reads and import writes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from edl_jax import sharding
from edl_jax.config import ModelConfig
from edl_jax.interop.architectures import Architecture
from edl_jax.model.transformer import Model

# How a part of a parameter becomes a tensor of the hub. None of them copies.
_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "same": lambda x: x,
  "flat": lambda x: x.reshape(-1),
  # Inputs on the first axis, outputs on all others.
  "linear": lambda x: x.reshape(len(x), -1).T,
  # Outputs on the last axis, inputs on all others.
  "merging": lambda x: x.reshape(-1, x.shape[-1]).T,
}


class Slot(NamedTuple):
  """One tensor, and where it lies in the parameters."""

  # On the hub.
  name: str
  # Path of the parameter, such as "blocks/moe/router_ME".
  parameter: str
  # Into the parameter; empty for all of it. Begins with the layer.
  place: tuple[Any, ...]
  layout: str

  @property
  def expert(self) -> int | None:
    """The tensor's expert; None unless it is of a routed one."""
    inner = self.place[1:2]
    return inner[0] if inner and isinstance(inner[0], int) else None

  def view(
    self, parameter: np.ndarray, start: tuple[int, ...] = ()
  ) -> np.ndarray:
    """Returns the tensor as a view of the parameter.

    Args:
      parameter: all of it, or a block that contains the tensor.
      start: where the block begins on the first axes of the parameter.
    """
    place = list(self.place)
    for axis, at in enumerate(start):
      place[axis] -= at
    return _LAYOUTS[self.layout](parameter[tuple(place)])


def slots(architecture: Architecture, model: ModelConfig) -> Iterator[Slot]:
  """Yields every tensor of a checkpoint, in layer order."""
  yield Slot("model.embed_tokens.weight", "embedding_VM", (), "same")
  for layer in range(model.num_layers):
    yield from _layer(architecture, model, layer)
  yield Slot("model.norm.weight", "final_norm/scale", (), "same")
  if not model.tied_embeddings:
    yield Slot("lm_head.weight", "head_MV", (), "linear")


def _layer(
  architecture: Architecture, model: ModelConfig, layer: int
) -> Iterator[Slot]:
  is_dense = layer < model.num_dense_layers
  blocks = "dense_blocks" if is_dense else "blocks"
  index = layer if is_dense else layer - model.num_dense_layers
  prefix = f"model.layers.{layer}"

  def slot(name: str, parameter: str, layout: str, *within: Any) -> Slot:
    path = f"{blocks}/{parameter}"
    return Slot(f"{prefix}.{name}", path, (index, *within), layout)

  def swiglu(
    name: str,
    parameters: tuple[str, str],
    *within: Any,
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
  ) -> Iterator[Slot]:
    gate_up, down = parameters
    gate = (*within, slice(None), 0)
    up = (*within, slice(None), 1)
    yield slot(f"{name}.{matrices[0]}.weight", gate_up, "linear", *gate)
    yield slot(f"{name}.{matrices[1]}.weight", gate_up, "linear", *up)
    yield slot(f"{name}.{matrices[2]}.weight", down, "linear", *within)

  yield slot("input_layernorm.weight", "attention_norm/scale", "flat")
  for name, parameter, layout in _attention(model):
    yield slot(f"self_attn.{name}", f"attention/{parameter}", layout)
  yield slot(
    "post_attention_layernorm.weight", "feed_forward_norm/scale", "flat"
  )
  if is_dense:
    yield from swiglu("mlp", ("mlp/gate_up_M2F", "mlp/down_FM"))
    return
  experts = architecture.experts
  yield slot(f"{experts}.gate.weight", "moe/router_ME", "linear")
  for expert in range(model.num_experts):
    yield from swiglu(
      f"{experts}.experts.{expert}",
      ("moe/gate_up_EM2F", "moe/down_EFM"),
      expert,
      matrices=architecture.matrices,
    )
  if model.num_shared_experts:
    name = f"{experts}.{architecture.shared_name}"
    yield from swiglu(name, ("moe/shared/gate_up_M2F", "moe/shared/down_FM"))
    if model.shared_expert_gate:
      yield slot(f"{name}_gate.weight", "moe/shared_gate_M", "linear")


def _attention(model: ModelConfig) -> Iterator[tuple[str, str, str]]:
  """Yields name, parameter and layout of the tensors of attention."""
  letters = {"q": "query", "k": "key", "v": "value"}
  shapes = {"q": "MNH", "k": "MKH", "v": "MKH"}
  for short, name in letters.items():
    yield f"{short}_proj.weight", f"{name}_{shapes[short]}", "linear"
    if model.attention_bias != "none":
      bias = f"{name}_bias_{shapes[short][1:]}"
      yield f"{short}_proj.bias", bias, "flat"
  yield "o_proj.weight", "out_NHM", "merging"
  if model.attention_bias == "all":
    yield "o_proj.bias", "out_bias_M", "flat"
  if model.qk_norm != "none":
    scale = "scale" if model.qk_norm == "head" else "scale_NH"
    yield "q_norm.weight", f"query_norm/{scale}", "flat"
    yield "k_norm.weight", f"key_norm/{scale}", "flat"


def parameters(model: Any) -> dict[str, Any]:
  """Returns the leaves of a model by path; `abstract_model` has shapes."""
  leaves = jax.tree_util.tree_flatten_with_path(model)[0]
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def tensors(architecture: Architecture, model: Model) -> dict[str, np.ndarray]:
  """Returns the tensors of a checkpoint by name, in layer order.

  They are views of the parameters, which must be on one CPU device.
  """
  # On a CPU, NumPy shares the memory of JAX's arrays.
  arrays: Mapping[str, np.ndarray] = {
    path: np.asarray(leaf) for path, leaf in parameters(model).items()
  }
  return {
    slot.name: slot.view(arrays[slot.parameter])
    for slot in slots(architecture, model.config)
  }
