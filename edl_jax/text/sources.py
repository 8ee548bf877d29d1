"""Reads the documents of an experiment: the embedded mixture, or files."""

import dataclasses
from typing import NamedTuple

from edl_jax.config import DataConfig, UserError
from edl_jax.text.chat import ChatTemplate
from edl_jax.text.documents import Document, DomainNames, Gatherer
from edl_jax.text.embedded import read_embedded
from edl_jax.text.examples import is_example, read_example
from edl_jax.text.files import find_files
from edl_jax.text.readers import Record, SeenIds, read_records
from edl_jax.text.taxonomy import Taxonomy

# Bad records of which a message is kept.
_MESSAGES = 5


class Documents(NamedTuple):
  """What `read_documents` found."""

  taxonomy: Taxonomy
  # Source by source. Within a source their order depends on their origins
  # (embedded mixture) or places (files) alone.
  documents: list[Document]
  # What was left out, a line each.
  notes: list[str]


def read_documents(
  data: DataConfig, template: ChatTemplate | None = None
) -> Documents:
  """Reads the documents of every domain, without duplicates or empty texts.

  A record (see `readers.read_records`) has a text and a domain, or is a
  supervised example, whose messages `template` renders. It may have an
  origin, a name shared by texts that belong on the same side of the split; a
  text without one is its own origin. The last document of a domain is cut where
  `data.max_characters_per_domain` is reached. `DomainNames` names and selects
  the domains.

  Raises:
    UserError: there is nothing to read, a bad record without `data.skip_bad`,
      an unknown or an empty domain.
  """
  domains = DomainNames(data)
  gathered = Gatherer(data.max_characters_per_domain)
  notes = []
  if data.files:
    notes = _read_files(data, domains, gathered, template)
    source = data.files
  else:
    read_embedded(data, domains, gathered)
    source = "the embedded mixture"
  taxonomy = domains.taxonomy(gathered.documents, source)
  documents = [
    document
    if document.domain == name
    else dataclasses.replace(document, domain=name)
    for name in taxonomy.sources
    for document in gathered.documents[domains.key(name)]
  ]
  return Documents(taxonomy, documents, [*notes, *gathered.vanished()])


def _read_files(
  data: DataConfig,
  domains: DomainNames,
  gathered: Gatherer,
  template: ChatTemplate | None,
) -> list[str]:
  """Adds every record of every file; returns lines about bad ones."""
  root, paths = find_files(data.files, "data.files")
  seen, bad, messages = SeenIds(), 0, []
  for path in paths:
    for where, record in read_records(path, root, examples=True):
      try:
        if isinstance(record, UserError):
          raise record
        if problem := seen.problem(record, where):
          raise problem
        fine = domains.add(record.get("domain"), where)
        document = _document(record, fine, where, template)
      except UserError as error:
        if not data.skip_bad:
          raise
        bad += 1
        if bad <= _MESSAGES:
          messages.append(f"  {error}")
        continue
      gathered.add(document)
  return [f"left out {bad:,} bad records:", *messages] if bad else []


def _document(
  record: Record, domain: str, where: str, template: ChatTemplate | None
) -> Document:
  if is_example(record):
    return read_example(record, domain, where, template)
  text = record["text"]
  return Document(text, domain, record.get("origin") or text)
