"""Writes the embedded mixture as JSONL, to read, edit, or copy elsewhere.

  python -m data.export --out=corpus.jsonl

An experiment with `data.files="corpus.jsonl"` reads the same documents, domains
and split on any machine, whatever is installed there, provided that its
`data.max_characters_per_domain` is at least the export's.
"""

import json
import os
import sys

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import DataConfig, UserError
from edl_jax.text.sources import read_documents

COMMAND = Command(__doc__)
_OUT = COMMAND.flag(
  "out", "", "JSONL file to write; it must be new.", required=True
)
_MAX_CHARACTERS = COMMAND.flag(
  "max_characters_per_domain",
  DataConfig.max_characters_per_domain,
  "Most characters to write of each domain.",
  minimum=1,
)


def export(data: DataConfig, path: str) -> int:
  """Writes one JSON object per document; returns how many.

  Raises:
    UserError: the file exists or cannot be written.
  """
  taxonomy, documents, _ = read_documents(data)
  label = dict(zip(taxonomy.fine, taxonomy.names))
  if os.path.exists(path):
    raise UserError(f"--out={path}: the file exists; choose another")
  try:
    with storage.whole_file(path) as file:
      for document in documents:
        record = {
          "domain": label[document.domain],
          "origin": document.origin,
          "text": document.text,
        }
        line = json.dumps(record, ensure_ascii=False) + "\n"
        file.write(line.encode())
  except OSError as error:
    raise UserError(f"--out={path}: {error.strerror}") from error
  return len(documents)


@COMMAND.main
def main() -> None:
  """Exports the embedded mixture."""
  data = DataConfig(max_characters_per_domain=_MAX_CHARACTERS.value)
  print(f"{export(data, _OUT.value)} documents written to {_OUT.value}")


if __name__ == "__main__":
  sys.exit(main())
