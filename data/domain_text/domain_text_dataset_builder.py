"""A TFDS data set of text with domain labels, for readers without TensorFlow.

  PYTHONPATH=. tfds build data/domain_text --manual_dir=corpora/text \
    --data_dir=tfds --file_format=array_record

reads every file in the folder that `edl_jax.text.readers` can read: JSON lines,
compressed or not, Parquet, and plain files in folders named after their domain.
An experiment reads the result by
`data.files="tfds/domain_text/**/*.array_record*"`, and another program by

  builder = tfds.builder_from_directory("tfds/domain_text/1.0.0")
  examples = builder.as_data_source(split="train")
"""

import os
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from edl_jax.config import UserError
from edl_jax.text.files import find_files
from edl_jax.text.readers import SeenIds, read_records
from edl_jax.text.taxonomy import split_label


class Builder(tfds.core.GeneratorBasedBuilder):
  """One split, "train", in the order of the files and of their records.

  It includes held-out documents, which readers choose by `origin`.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {
    "1.0.0": "Text, two labels, source, origin."
  }
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Name the folder of your text files by --manual_dir."
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          "text": tfds.features.Text(doc="One document."),
          "fine": tfds.features.Text(doc="Fine label; empty: unlabelled."),
          "coarse": tfds.features.Text(doc="Coarse label; empty: none."),
          "source": tfds.features.Text(doc="Where the text comes from."),
          "origin": tfds.features.Text(
            doc="Shared by documents that are held out together."
          ),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
    return {"train": self._generate_examples(str(dl_manager.manual_dir))}

  def _generate_examples(
    self, folder: str
  ) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (number, example); raises UserError at the first bad record."""
    root, paths = find_files(os.path.join(folder, "**"), "--manual_dir")
    seen, number = SeenIds(), 0
    for path in paths:
      for where, record in read_records(path, root, ["source"]):
        if isinstance(record, UserError):
          raise record
        if problem := seen.problem(record, where):
          raise problem
        coarse, fine = "", record.get("domain") or ""
        if fine:
          coarse, fine = split_label(fine, where)
        yield (
          number,
          {
            "text": record["text"],
            "fine": fine,
            "coarse": coarse,
            "source": record.get("source") or os.path.relpath(path, root),
            # A record without an origin is its own, as in `text.sources`.
            "origin": record.get("origin") or record["text"],
          },
        )
        number += 1
