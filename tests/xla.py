"""XLA's options that make small programs compile in a third of the time.

The programs and their numerics stay the same. This module imports no JAX.
"""

import importlib.metadata

_VERSION = importlib.metadata.version("jax").split(".")
# XLA has removed its switch of fusion emitters, and ends the process on a flag
# that it does not know.
_HAS_SWITCH = tuple(map(int, _VERSION[:2])) < (0, 11)

# For `compiler_options`.
FAST_OPTIONS: dict[str, bool] = (
  {"xla_cpu_use_fusion_emitters": False} if _HAS_SWITCH else {}
)
# For the variable XLA_FLAGS.
FAST_FLAGS = " ".join(
  [
    "--xla_backend_optimization_level=0",
    *(["--xla_cpu_use_fusion_emitters=false"] if _HAS_SWITCH else []),
  ]
)
