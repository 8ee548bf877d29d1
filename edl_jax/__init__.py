"""Pre-train mixture-of-experts language models with expert divergence.

Axis letters, used as suffixes of array names and in einsum strings:

  B batch row           T query position        S key position
  M model width         N query heads           K key-value heads
  H head width          F expert hidden width   V vocabulary
  L layers              E experts               A active experts per token
  D domains             R rows of routed tokens (tokens x active experts)
  C rows of a block, or places of an expert
  G blocks of rows        X devices along the mesh axis `expert`
  S slots: places of all experts
  P tokens of a shard, rows and positions flattened
"""

from typing import Any


def __getattr__(name: str) -> Any:
  # Imported on first use: `python -m edl_jax.main --help` and bad flags should
  # answer before JAX is loaded.
  if name == "load":
    from edl_jax.checkpoint import load

    return load
  raise AttributeError(f"module 'edl_jax' has no attribute {name!r}")
