"""Writes the embedded mixture as JSONL: to read, to edit, or to carry along.

  python -m data.export --out=corpus.jsonl

An experiment with `data.files="corpus.jsonl"` then reads the same documents,
domains and split on any machine, whatever is installed there, if its
`data.max_characters_per_domain` is no smaller than the export's.
"""

import json
import sys
from collections.abc import Sequence

from absl import app, flags

from edl_jax.config import DataConfig, UserError
from edl_jax.text.sources import read_documents

_OUT = flags.DEFINE_string("out", None, "JSONL file to write; must be new.")
_MAX_CHARACTERS = flags.DEFINE_integer(
  "max_characters_per_domain",
  DataConfig.max_characters_per_domain,
  "Characters written per domain at most.",
  lower_bound=1,
)


def export(data: DataConfig, path: str) -> int:
  """Writes one JSON object per document; returns how many.

  Raises:
    UserError: the file exists or cannot be written.
  """
  names, documents = read_documents(data)
  label = {name.rsplit("/", 1)[-1]: name for name in names}
  try:
    with open(path, "x", encoding="utf-8") as file:
      for document in documents:
        record = {
          "domain": label[document.domain],
          "origin": document.origin,
          "text": document.text,
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
  except OSError as error:
    raise UserError(f"--out={path}: {error.strerror}") from error
  return len(documents)


def main(arguments: Sequence[str]) -> None:
  """Exports; a user error becomes one line and exit code 2."""
  try:
    if len(arguments) > 1:
      raise UserError(f"unexpected argument {arguments[1]!r}")
    if not _OUT.value:
      raise UserError("--out is missing: name the file to write")
    data = DataConfig(max_characters_per_domain=_MAX_CHARACTERS.value)
    print(f"{export(data, _OUT.value)} documents written to {_OUT.value}")
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)
