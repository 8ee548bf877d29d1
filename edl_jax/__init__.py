"""Pre-train mixture-of-experts language models with expert divergence.

Axis letters, used as suffixes of array names and in einsum strings:

  B batch rows
  T query positions
  S key positions
  P tokens of a shard, its rows and positions flattened
  V vocabulary
  L layers
  D domains
  G coarse domains (groups of domains)
  M model width
  N query heads
  K key-value heads
  Q query heads that share a key-value head (N / K)
  H head width
  E experts
  A active experts of a token
  F hidden width of an expert
  O gate and up projection in einsum strings; suffixes write 2
  R rows of routed tokens, one for each token and active expert (P A)
  C capacity: places of an expert
  U places of all experts, used or unused (E C)
  W rows of one block in grouped products
  X devices along the mesh axis `expert`
  Z shards of the batch: devices with tokens of their own
  I items of a list: documents, logged steps, pairs
  J domains of a tile

A digit is an axis of that size: 1, or 2 for gate and up projection or for the
two tokens of a pair. In einsum strings a lower-case letter is a second axis of
the same kind, as in "PAM,PaM->PAa".
"""

from typing import Any


def __getattr__(name: str) -> Any:
  # Imported on first use: `python -m edl_jax.main --help` and bad flags should
  # answer before JAX is loaded.
  if name == "load":
    from edl_jax.checkpoint import load

    return load
  raise AttributeError(f"module 'edl_jax' has no attribute {name!r}")
