"""Reads the text that a finished run was trained and evaluated on."""

import functools

from edl_jax.checkpoint import Loaded, Provenance
from edl_jax.config import DataConfig, UserError
from edl_jax.text.chat import ChatTemplate, find_template
from edl_jax.text.mixture import Corpus, load_corpus
from edl_jax.text.prepared import PreparedCorpus, load_prepared


def read_corpus(
  run: Loaded | Provenance, workdir: str
) -> Corpus | PreparedCorpus:
  """Reads the text of a run, which must be that of its training.

  Args:
    run: what the checkpoint says about it.
    workdir: the run's folder, for messages.

  Raises:
    UserError: the text is gone, or has changed since.
  """
  data = run.experiment.data
  try:
    if data.prepared:
      corpus = load_prepared(run.experiment)
    else:
      special = tuple(run.tokenizer.special_ids)
      template = find_template(data, run.source, special)
      corpus = _load(data, template)
  except UserError as error:
    raise UserError(
      f"the text of --workdir={workdir} cannot be read: {error}"
    ) from error
  if corpus.content_hash != run.content_hash:
    source = data.prepared or data.files or "of installed packages"
    raise UserError(
      f"the text of --workdir={workdir} ({source}) has changed since its"
      " training (content hash differs); restore it, or train again"
    )
  return corpus


# Runs of one sweep share their text.
@functools.lru_cache(maxsize=1)
def _load(data: DataConfig, template: ChatTemplate | None) -> Corpus:
  return load_corpus(data, template)
