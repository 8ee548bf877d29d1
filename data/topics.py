"""Trains a topic classifier for domain labels on labelled samples.

  python -m data.topics --files="samples/*.jsonl" --out=topics

fits a linear model of hashed character n-grams to the samples' domains, prints
its accuracy on held-out samples, and writes a folder that the rule
`{by: topic, model: topics}` of `data.labels` reads.
"""

import io
import json
import os
import sys
import zipfile
from collections.abc import Sequence

import numpy as np

from edl_jax import storage, tables
from edl_jax.command import Command
from edl_jax.config import UserError
from edl_jax.text.files import find_files
from edl_jax.text.mixture import origin_digest, position
from edl_jax.text.readers import read_records
from edl_jax.text.streams import need_package

COMMAND = Command(__doc__)
_FILES = COMMAND.flag("files", "", "Glob of labelled samples.", required=True)
_OUT = COMMAND.flag("out", "", "Folder to write.", required=True)

# Only these first characters count: they show the topic, and cost is linear.
_EXAMINED_CHARACTERS = 4000
_FEATURES = 2**18
# Shortest and longest n-gram in characters: parts of words, whole Han words.
_NGRAMS = (1, 4)
# Share of the samples, chosen by hash, that is held out to measure accuracy.
_TEST_SHARE = 0.2
_PURPOSE = "labelling by topic"


class TopicClassifier:
  """Scores hashed character n-grams with a linear model per label."""

  def __init__(
    self, labels: Sequence[str], weights_DF: np.ndarray, bias_D: np.ndarray
  ):
    """Takes float32 weights (labels, features) and biases (labels,)."""
    text = need_package("sklearn.feature_extraction.text", _PURPOSE)
    self.labels = tuple(labels)
    self._weights_FD = np.ascontiguousarray(weights_DF.T)
    self._bias_D = bias_D
    self._vectorizer = text.HashingVectorizer(
      analyzer="char",
      ngram_range=_NGRAMS,
      n_features=_FEATURES,
      dtype=np.float32,
    )

  def probabilities(self, texts: Sequence[str]) -> np.ndarray:
    """Returns each label's probability for each text, (texts, labels).

    Each label has a classifier against all others; their scores are scaled to
    sum to one.
    """
    features = self._vectorizer.transform(
      [text[:_EXAMINED_CHARACTERS] for text in texts]
    )
    scores = features @ self._weights_FD + self._bias_D
    share = 1 / (1 + np.exp(-np.clip(scores, -50, 50)))
    return share / share.sum(1, keepdims=True)

  def classify(self, text: str) -> tuple[str, float]:
    """Returns the most probable label of a text, and its probability."""
    (share,) = self.probabilities([text])
    best = int(share.argmax())
    return self.labels[best], float(share[best])

  def save(self, folder: str) -> None:
    """Writes the model and its list of labels into a folder.

    Raises:
      UserError: it cannot be written.
    """
    try:
      os.makedirs(folder, exist_ok=True)
      arrays = io.BytesIO()
      np.savez_compressed(arrays, weights=self._weights_FD.T, bias=self._bias_D)
      storage.write_bytes(os.path.join(folder, "model.npz"), arrays.getvalue())
      storage.write_json(
        os.path.join(folder, "labels.json"), self.labels, indent=2
      )
    except OSError as error:
      raise UserError(f"{folder}: {error.strerror}") from error

  @classmethod
  def load(cls, folder: str) -> "TopicClassifier":
    """Reads what `save` wrote, without running code from the files.

    Raises:
      UserError: the folder holds no such model.
    """
    try:
      with open(os.path.join(folder, "labels.json"), encoding="utf-8") as file:
        labels = json.load(file)
      with np.load(os.path.join(folder, "model.npz")) as arrays:
        weights_DF, bias_D = arrays["weights"], arrays["bias"]
      if weights_DF.shape != (len(labels), _FEATURES):
        raise ValueError("labels and model differ in number")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise UserError(
        f"{folder}: no topic classifier ({error}); make one with"
        " python -m data.topics"
      ) from error
    return cls(labels, weights_DF, bias_D)


def train_topics(
  texts: Sequence[str], names: Sequence[str], seed: int = 0
) -> TopicClassifier:
  """Trains a classifier; equal arguments give an equal one.

  Args:
    texts: the samples.
    names: the label of each sample.
    seed: sets the order in which training visits the samples.

  Raises:
    UserError: fewer than two labels.
  """
  linear = need_package("sklearn.linear_model", _PURPOSE)
  labels = sorted(set(names))
  if len(labels) < 2:
    raise UserError(f"a classifier needs two labels; the samples have {labels}")
  empty = TopicClassifier(labels, np.zeros((2, 1)), np.zeros(2))
  features = empty._vectorizer.transform(
    [text[:_EXAMINED_CHARACTERS] for text in texts]
  )
  model = linear.SGDClassifier(
    loss="log_loss", alpha=1e-6, average=True, random_state=seed
  )
  model.fit(features, [labels.index(name) for name in names])
  weights_DF, bias_D = model.coef_, model.intercept_
  if len(labels) == 2:  # scikit-learn fits a single model then.
    weights_DF, bias_D = (np.concatenate([-x, x]) for x in (weights_DF, bias_D))
  return TopicClassifier(
    labels, weights_DF.astype(np.float32), bias_D.astype(np.float32)
  )


def train_and_measure(pattern: str) -> tuple[TopicClassifier, list[str]]:
  """Trains on labelled files; returns the classifier and a report.

  Raises:
    UserError: a bad record, one without a domain, or too few samples.
  """
  samples: dict[str, str] = {}
  root, paths = find_files(pattern, "--files")
  for path in paths:
    for where, record in read_records(path, root):
      if isinstance(record, UserError):
        raise record
      if not record.get("domain"):
        raise UserError(f"{where}: a sample needs a domain")
      samples[record["text"]] = record["domain"]
  test = {
    text for text in samples if position(origin_digest(text)) < _TEST_SHARE
  }
  train = {text: name for text, name in samples.items() if text not in test}
  classifier = train_topics(list(train), list(train.values()))
  found: dict[str, list[bool]] = {
    name: [] for name in sorted(classifier.labels)
  }
  for text in test:
    right = classifier.classify(text)[0] == samples[text]
    found.setdefault(samples[text], []).append(right)
  every = [right for own in found.values() for right in own]
  if not every:
    raise UserError(f"--files={pattern}: too few samples to measure accuracy")
  rows = [
    (name, f"{np.mean(own):.3f}", f"{len(own):,}")
    for name, own in found.items()
    if own
  ]
  return classifier, [
    f"trained on {len(train):,} samples; accuracy {np.mean(every):.3f} on"
    f" {len(every):,} held-out samples:",
    *(f"  {line}" for line in tables.aligned(rows)),
  ]


@COMMAND.main
def main() -> None:
  """Trains, measures and saves a classifier."""
  classifier, report = train_and_measure(_FILES.value)
  classifier.save(_OUT.value)
  print("\n".join([*report, f"written to {_OUT.value}"]))


if __name__ == "__main__":
  sys.exit(main())
