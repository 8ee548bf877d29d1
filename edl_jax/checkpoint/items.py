"""Reads the arrays of a checkpoint, and checks them against their digests."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp

from edl_jax.checkpoint.digest import array_digests, differing, sample
from edl_jax.checkpoint.event_loops import in_patient_loop
from edl_jax.checkpoint.folders import DamagedError
from edl_jax.sharding import path_name

T = TypeVar("T")

# How much of a checkpoint is compared with its digests.
Verify = Literal["full", "sampled", "off"]
VERIFY: tuple[Verify, ...] = ("full", "sampled", "off")


def by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree in nested dicts, keyed by their path.

  Checkpoints of such dicts can be read without this library's classes.
  """
  nested: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    *parents, name = path_name(path).split("/")
    holder = nested
    for parent in parents:
      holder = holder.setdefault(parent, {})
    holder[name] = leaf
  return nested


def like(tree: Any, nested: Mapping[str, Any]) -> Any:
  """Inverse of `by_name`; the result has the structure of `tree`."""

  def pick(path, _):
    holder = nested
    for name in path_name(path).split("/"):
      holder = holder[name]
    return holder

  return jax.tree_util.tree_map_with_path(pick, tree)


def reading(checkpoint: str, read: Callable[[], T]) -> T:
  """Calls `read`; reports what it raises in one line.

  Raises:
    DamagedError: a file is missing, cut off, or not what Orbax writes.
  """
  try:
    return in_patient_loop(read)
  # Orbax and TensorStore raise many kinds, among them KeyError and TypeError.
  except Exception as error:
    text = " ".join(str(error).split()) or type(error).__name__
  named = re.search(rf"{re.escape(checkpoint)}[^\s\"'`,;:)\]]*", text)
  where = named[0] if named else checkpoint
  reason = text if len(text) <= 200 else f"{text[:200]} ..."
  raise DamagedError(
    f"step {os.path.basename(checkpoint)}: {where} cannot be read ({reason})"
  )


def read_item(checkpoint: str, item: str, target: Any = None) -> dict[str, Any]:
  """Reads the arrays of one item, such as "parameters".

  Args:
    checkpoint: folder of the checkpoint.
    item: name of the folder in it.
    target: the shapes, dtypes and shardings wanted, in nested dicts. By default
      those that were saved, on one device of this process.

  Raises:
    DamagedError: a file is missing or damaged.
  """
  path = os.path.join(checkpoint, item)

  def read() -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
      wanted = _saved_shapes(checkpointer, path) if target is None else target
      return checkpointer.restore(path, wanted)

  return reading(checkpoint, read)


def _saved_shapes(checkpointer: ocp.StandardCheckpointer, path: str) -> Any:
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  # Any: Orbax does not declare what it returns.
  metadata: Any = checkpointer.metadata(path)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    getattr(metadata, "item_metadata", metadata).tree,
  )


def check_items(
  checkpoint: str,
  items: Mapping[str, Any],
  saved: Mapping[str, str],
  verify: Verify,
) -> int:
  """Compares arrays with the digests that were saved with them.

  Args:
    checkpoint: folder of the checkpoint, for messages.
    items: arrays in nested dicts, by item.
    saved: digest by item and path, such as "parameters/head"; of any item.
    verify: "full", "sampled" for a quarter of the arrays, chosen by the step,
      or "off".

  Returns:
    The number of arrays compared.

  Raises:
    DamagedError: an array is not what was saved; names the first.
  """
  wanted = {
    name: text
    for name, text in saved.items()
    if name.partition("/")[0] in items
  }
  if verify == "off" or not wanted:
    return 0
  step = os.path.basename(checkpoint)
  if verify == "sampled":
    chosen = sample(sorted(wanted), int(step))
    wanted = {name: wanted[name] for name in chosen}
  arrays = {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(items))[0]
  }
  # Keep the order of the tree, in which all processes then compute the same.
  found = array_digests(
    {name: leaf for name, leaf in arrays.items() if name in wanted}
  )
  bad = differing(wanted, found)
  if bad:
    item, _, array = bad[0].partition("/")
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise DamagedError(
      f"step {step}: array {array}{more} in {os.path.join(checkpoint, item)}"
      " is not what was saved (digest differs)"
    )
  return len(wanted)
