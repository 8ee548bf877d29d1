"""Feeds a reader with content that atheris makes, guided by its branches.

  python -m pip install --target=.venv/atheris atheris
  PYTHONPATH=.venv/atheris python -m tests.fuzz --only=hlo --seconds=60

A reader may refuse content in one line, with the error that it documents, and
raise nothing else. Atheris writes what it finds to the working directory as
crash-*, prints the traceback and ends with an exit code other than 0.
"""

import atexit
import importlib
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from edl_jax.command import Command
from edl_jax.config import UserError


class Reader(NamedTuple):
  """What is fed."""

  module: str
  function: str
  # The ending of the file that it takes; "" if it takes text.
  suffix: str
  # Content to begin with.
  seeds: Sequence[str]


_RULES = "column: meta.name\nrules:\n- {match: a, domain: b}\n"
READERS = {
  "hlo": Reader(
    "edl_jax.aot.hlo",
    "parse",
    "",
    [
      'HloModule m, num_partitions=2\n\nFileNames\n1 "a/b.py"\n\n'
      "ENTRY %e (p: s32[2]) -> s32[2] {\n"
      "  %p = s32[2]{0} parameter(0)\n"
      "  ROOT %r = (s32[2], f32[]) while(%p), condition=%c, body=%b\n}\n"
    ],
  ),
  "records": Reader(
    "edl_jax.text.readers",
    "read_records",
    ".jsonl",
    ['{"text": "a", "domain": "b", "meta": {"c": 1}}\n'],
  ),
  "rules": Reader("data.labels", "load_rules", ".yaml", [_RULES]),
  "task": Reader(
    "edl_jax.text.task_files",
    "read_task",
    ".jsonl",
    ['{"context": "a", "continuations": [" b", " c"], "gold": 0}\n'],
  ),
  "taxonomy": Reader(
    "edl_jax.text.taxonomy",
    "load_taxonomy",
    ".yaml",
    ["domains:\n  code: [python, c]\n  prose: [wiki]\n"],
  ),
  "tokenizer": Reader(
    "edl_jax.text.tokenizer",
    "open_tokenizer",
    ".json",
    ['{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'],
  ),
}

COMMAND = Command(__doc__)
_ONLY = COMMAND.flag("only", "hlo", "The reader.", choices=list(READERS))
_SECONDS = COMMAND.flag("seconds", 60, "How long.", minimum=1)


def feeder(
  reader: Reader, read: Callable[[str], Any], folder: pathlib.Path
) -> Callable[[bytes], None]:
  """Returns a function that feeds one content.

  It raises what is not a refusal in one line.
  """
  refusals = (UserError,)
  if not reader.suffix:
    refusals = (importlib.import_module(reader.module).HLOError,)
  path = folder / f"content{reader.suffix}"

  def feed(content: bytes) -> None:
    given = content.decode("utf-8", "replace")
    if reader.suffix:
      path.write_bytes(content)
      given = str(path)
    try:
      found = read(given)
      if reader.function == "read_records":
        list(found)
    except refusals as error:
      if "\n" in str(error):
        raise AssertionError(f"a refusal of several lines: {error}") from error

  return feed


@COMMAND.main
def main() -> int:
  """Feeds a reader; atheris ends the process."""
  try:
    # Any: it is no requirement, and checkers do not find it.
    atheris: Any = importlib.import_module("atheris")
  except ImportError as error:
    raise UserError(
      "atheris is missing: python -m pip install --target=.venv/atheris atheris"
    ) from error
  reader = READERS[_ONLY.value]
  with atheris.instrument_imports(include=[reader.module]):
    module = importlib.import_module(reader.module)
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
  atexit.register(shutil.rmtree, folder, True)
  corpus = folder / "corpus"
  corpus.mkdir()
  for number, seed in enumerate(reader.seeds):
    (corpus / str(number)).write_text(seed)
  arguments = [sys.argv[0], str(corpus), f"-max_total_time={_SECONDS.value}"]
  atheris.Setup(
    [*arguments, "-max_len=2000", "-verbosity=0", "-print_final_stats=1"],
    feeder(reader, getattr(module, reader.function), folder),
  )
  atheris.Fuzz()
  return 0


if __name__ == "__main__":
  sys.exit(main())
