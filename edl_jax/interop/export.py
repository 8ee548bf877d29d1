"""Writes a run's model as a folder that Hugging Face Transformers loads.

  python -m edl_jax.interop.export --workdir=runs/demo --out=hub/demo

The folder is a checkpoint of Qwen3-MoE, or of the family that has the model's
settings: config.json, generation_config.json, tensors in safetensors files with
their index, the tokenizer, and a README with the run's figures. Transformers
needs no code of ours for it:

  AutoModelForCausalLM.from_pretrained("hub/demo")

The command runs on the host's CPU, and needs memory for the parameters in
float32, once.
"""

import contextlib
import json
import os
import re
import shlex
import sys
from typing import Any

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.interop import folders

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir",
  "",
  "Folder of the run, whose newest checkpoint is exported, or folder of one"
  " checkpoint.",
  required=True,
)
_OUT = COMMAND.flag(
  "out", "", "Folder to write; it must not exist.", required=True
)
_DTYPE = COMMAND.flag(
  "dtype",
  "float32",
  "Type of the tensors. Training keeps float32.",
  choices=("float32", "bfloat16"),
)
_MAX_SHARD_SIZE = COMMAND.flag(
  "max_shard_size", "5GB", "Largest safetensors file, such as 500MB or 5GB."
)

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes_of(size: str) -> int:
  """Returns the bytes of a size such as 5GB.

  Raises:
    UserError: it is no such size, or nothing.
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size, re.IGNORECASE)
  count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
  if not count:
    raise UserError(
      f"--max_shard_size={size}: must be a number and a unit, such as 5GB"
      f" (units: {', '.join(_UNITS)})"
    )
  return count


def _result(workdir: str, step: int) -> dict[str, Any] | None:
  """Returns result.json of the run if it is of this step, else None."""
  with contextlib.suppress(OSError, ValueError):
    with open(os.path.join(workdir, "result.json"), encoding="utf-8") as file:
      result = json.load(file)
    return result if result["step"] == step else None
  return None


def _command(workdir: str, out: str, dtype: str) -> str:
  """Returns this command, without the folders of this machine."""
  flags = {
    "workdir": os.path.basename(os.path.normpath(workdir)),
    "out": os.path.basename(os.path.normpath(out)),
    "dtype": dtype,
  }
  words = [f"--{name}={value}" for name, value in flags.items()]
  return shlex.join(["python", "-m", "edl_jax.interop.export", *words])


def export(
  workdir: str, out: str, dtype: str, max_shard_bytes: int
) -> list[str]:
  """Exports a checkpoint as a folder that is complete or not there.

  Args:
    workdir: of the run, or the folder of one of its checkpoints.
    out: folder to write.
    dtype: "float32" or "bfloat16".
    max_shard_bytes: largest size of a safetensors file.

  Returns:
    The names of the files.

  Raises:
    UserError: there is no checkpoint, no architecture of the hub can express
      its model, or `out` exists or cannot be written.
  """
  # Imports JAX, which --help and errors in flags do without.
  from edl_jax import checkpoint
  from edl_jax.interop import safetensors
  from edl_jax.interop.architectures import expressing, hub_config
  from edl_jax.interop.model_card import model_card
  from edl_jax.interop.tensors import tensors
  from edl_jax.interop.tokenizer import hub_tokenizer

  provenance = checkpoint.checkpoint_provenance(workdir)
  architecture = expressing(provenance.experiment.model)
  source = provenance.source or {}
  run = checkpoint.load(workdir)
  found = tensors(architecture, run.model)
  shapes = [tensor.shape for tensor in found.values()]
  needed = sum(safetensors.num_bytes(shape, dtype) for shape in shapes)
  folders.check_room(out, needed)
  start_id = run.tokenizer.document_start_id
  tokenizer_json, tokenizer_config = hub_tokenizer(
    run.tokenizer, run.experiment.train.sequence_length, source
  )
  contents = {
    "config.json": hub_config(architecture, run.experiment, start_id, dtype)
    | source.get("config", {}),
    "generation_config.json": source.get("config")
    or {f"{name}_token_id": start_id for name in ("bos", "eos", "pad")},
    "tokenizer_config.json": tokenizer_config,
  }
  card = model_card(
    run,
    _result(workdir, run.step),
    _command(workdir, out, dtype),
    architecture,
    source,
  )
  try:
    with storage.whole_folder(out) as folder:
      for name, content in contents.items():
        storage.write_json(f"{folder}/{name}", content, indent=2)
      storage.write_bytes(f"{folder}/tokenizer.json", tokenizer_json.encode())
      storage.write_bytes(f"{folder}/README.md", card.encode())
      safetensors.write_sharded(folder, found, dtype, max_shard_bytes)
  except OSError as error:
    raise UserError(
      f"--out={out} cannot be written ({error.strerror}: {error.filename})"
    ) from error
  return sorted(os.listdir(out))


@COMMAND.main
def main() -> None:
  """Exports the run; refuses one that it cannot before it reads tensors."""
  workdir, out = _WORKDIR.value, _OUT.value
  max_shard_bytes = _bytes_of(_MAX_SHARD_SIZE.value)
  folders.check_new(out)
  # Imports JAX: see above. The parameters stay on the host, whatever else is
  # there or in use.
  import jax

  jax.config.update("jax_platforms", "cpu")
  files = export(workdir, out, _DTYPE.value, max_shard_bytes)
  print(f"{out}: {', '.join(files)}")


if __name__ == "__main__":
  sys.exit(main())
