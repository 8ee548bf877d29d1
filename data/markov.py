"""Writes text of Markov sources that are partly alike, as JSON lines.

  python -m data.markov --out=markov --shared=0.5

writes

  text/source_<n>.jsonl.gz   the documents; an experiment reads them by
                             data.files="markov/text/*.jsonl.gz"
  manifest.json              what `edl_jax.text.markov.MarkovMixture` takes, and
                             the sources' entropy in nats; written last

Every byte of the text is a symbol: train with data.tokenizer=byte. The best
possible loss of such text is known; docs/study compares models with it.
"""

import dataclasses
import json
import sys
from pathlib import Path

from edl_jax import storage
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text.markov import ALPHABET, MarkovMixture

COMMAND = Command(__doc__)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)
_SHARED = COMMAND.flag(
  "shared",
  0.5,
  "Share of the symbols after which all sources go on alike, from 0 to 1.",
  minimum=0,
)
_SOURCES = COMMAND.flag("sources", 8, "Number of sources.", minimum=1)
_SYMBOLS = COMMAND.flag(
  "symbols", 48, f"Number of symbols, at most {len(ALPHABET)}.", minimum=4
)
_MEAN_LENGTH = COMMAND.flag(
  "mean_length", 500.0, "Mean symbols of a document.", minimum=2
)
_CHARACTERS = COMMAND.flag(
  "characters", 1_000_000, "Length of each source's text.", minimum=1
)
_SEED = COMMAND.flag("seed", 0, "Seed of the mixture and text.", minimum=0)


def write(mixture: MarkovMixture, characters: int, out: Path) -> None:
  """Writes the documents of every source, then the manifest.

  Raises:
    UserError: `out` cannot be written.
  """
  try:
    (out / "text").mkdir(parents=True, exist_ok=True)
    for source in range(mixture.num_sources):
      path = out / "text" / f"source_{source}.jsonl.gz"
      with storage.whole_gzip_file(path) as file:
        for text in mixture.documents(source, characters):
          record = {"text": text, "domain": f"source_{source}"}
          file.write(json.dumps(record).encode() + b"\n")
    manifest = {
      "mixture": dataclasses.asdict(mixture),
      "characters": characters,
      "entropy": mixture.entropy,
    }
    storage.write_json(out / "manifest.json", manifest, indent=2)
  except OSError as error:
    where = error.filename or out
    raise UserError(f"{where}: {error.strerror}") from error


@COMMAND.main
def main() -> None:
  """Writes the mixture that the flags describe.

  Raises:
    UserError: a flag is too large, or the folder cannot be written.
  """
  for flag, most in ((_SHARED, 1), (_SYMBOLS, len(ALPHABET))):
    if flag.value > most:
      raise UserError(f"--{flag.name}={flag.value}: at most {most}")
  mixture = MarkovMixture(
    shared=_SHARED.value,
    num_sources=_SOURCES.value,
    num_symbols=_SYMBOLS.value,
    mean_length=_MEAN_LENGTH.value,
    seed=_SEED.value,
  )
  write(mixture, _CHARACTERS.value, Path(_OUT.value))
  print(f"written to {_OUT.value}: {mixture.entropy:.4f} nats per symbol")


if __name__ == "__main__":
  sys.exit(main())
