"""Self-contained Orbax checkpoints that know their content.

A checkpoint holds the parameters, the optimizer state, the position in the
data, and the run's `Provenance`: experiment, taxonomy, tokenizer and content
hash of the corpus, with a digest of every array. `load` needs nothing else.
"""

from edl_jax.checkpoint.checkpointer import Checkpointer
from edl_jax.checkpoint.event_loops import patient_loops
from edl_jax.checkpoint.folders import (
  DamagedError,
  checkpoint_steps,
  run_folder,
  saved_provenance,
)
from edl_jax.checkpoint.items import VERIFY, Verify
from edl_jax.checkpoint.load import Loaded, checkpoint_provenance, load
from edl_jax.checkpoint.lock import check_unlocked, locked
from edl_jax.checkpoint.provenance import Provenance
from edl_jax.checkpoint.stream import rows_of_blocks, save_streamed
from edl_jax.checkpoint.workdir import (
  check_workdir,
  describe_workdir,
  initial_provenance,
)

__all__ = [
  "VERIFY",
  "Checkpointer",
  "DamagedError",
  "Loaded",
  "Provenance",
  "Verify",
  "check_unlocked",
  "check_workdir",
  "checkpoint_provenance",
  "checkpoint_steps",
  "describe_workdir",
  "initial_provenance",
  "load",
  "locked",
  "patient_loops",
  "rows_of_blocks",
  "run_folder",
  "save_streamed",
  "saved_provenance",
]
