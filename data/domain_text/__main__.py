"""Builds the data set as `tfds build` does, but without TensorFlow.

python -m data.domain_text --manual_dir=corpora/text --data_dir=tfds
"""

import os
import sys

from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text.streams import need_package

COMMAND = Command(__doc__)
_MANUAL_DIR = COMMAND.flag(
  "manual_dir", "", "Folder of text files.", required=True
)
_DATA_DIR = COMMAND.flag(
  "data_dir", "", "Folder of data sets to write.", required=True
)


@COMMAND.main
def main() -> None:
  """Builds the data set, unless it is there already."""
  if not os.path.isdir(_MANUAL_DIR.value):
    raise UserError(f"--manual_dir={_MANUAL_DIR.value}: no such folder")
  tfds = need_package("tensorflow_datasets", "building a TFDS data set")
  from data.domain_text.domain_text_dataset_builder import Builder

  try:
    builder = Builder(data_dir=_DATA_DIR.value, file_format="array_record")
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=_MANUAL_DIR.value)
    )
  except OSError as error:
    where = error.filename or _DATA_DIR.value
    raise UserError(f"{where}: {error.strerror}") from error
  count = builder.info.splits["train"].num_examples
  print(f"{count} documents in {builder.data_dir}")


if __name__ == "__main__":
  sys.exit(main())
