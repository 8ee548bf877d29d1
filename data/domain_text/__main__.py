"""Builds the data set as `tfds build` does, which itself needs TensorFlow.

python -m data.domain_text --manual_dir=corpora/text --data_dir=tfds
"""

from collections.abc import Sequence
from pathlib import Path

from data.command import Parser, run
from edl_jax.config import UserError
from edl_jax.text.readers import need_package


def main(arguments: Sequence[str]) -> None:
  """Builds what the arguments say; a data set that is there is kept.

  Raises:
    UserError: a bad argument or record; a folder that cannot be written.
  """
  parser = Parser(__doc__)
  parser.add_argument(
    "--manual_dir", required=True, type=Path, help="folder of text files"
  )
  parser.add_argument(
    "--data_dir", required=True, type=Path, help="folder of data sets to write"
  )
  options = parser.parse_args(arguments)
  if not options.manual_dir.is_dir():
    raise UserError(f"--manual_dir={options.manual_dir}: no such folder")
  tfds = need_package("tensorflow_datasets", "building a TFDS data set")
  from data.domain_text.domain_text_dataset_builder import Builder

  try:
    builder = Builder(data_dir=options.data_dir, file_format="array_record")
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        manual_dir=options.manual_dir
      )
    )
  except OSError as error:
    where = error.filename or options.data_dir
    raise UserError(f"{where}: {error.strerror}") from error
  count = builder.info.splits["train"].num_examples
  print(f"{count} documents in {builder.data_dir}")


if __name__ == "__main__":
  run(main)
