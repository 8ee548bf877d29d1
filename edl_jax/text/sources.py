"""Reads the documents of an experiment: the embedded mixture, or files."""

from edl_jax.config import DataConfig, UserError
from edl_jax.text.documents import Document, DomainNames, Gatherer
from edl_jax.text.embedded import read_embedded
from edl_jax.text.files import find_files
from edl_jax.text.readers import SeenIds, read_records
from edl_jax.text.taxonomy import Taxonomy


def read_documents(data: DataConfig) -> tuple[Taxonomy, list[Document]]:
  """Reads the documents of every domain, without duplicates or empty texts.

  A record (see `readers.read_records`) has a text and a domain. It may have an
  origin, a name shared by texts that belong on the same side of the split; a
  text without one is its own origin. The last document of a domain is cut where
  `data.max_characters_per_domain` is reached. `DomainNames` names and selects
  the domains.

  Returns:
    The taxonomy; and the documents, source by source. Within a source their
    order depends on their origins (embedded mixture) or places (files) alone.

  Raises:
    UserError: there is nothing to read, a bad record, an unknown or an empty
      domain.
  """
  domains = DomainNames(data)
  gathered = Gatherer(data.max_characters_per_domain)
  if data.files:
    _read_files(data, domains, gathered)
    source = data.files
  else:
    read_embedded(data, domains, gathered)
    source = "the embedded mixture"
  taxonomy = domains.taxonomy(gathered.documents, source)
  documents = [
    document
    for fine in taxonomy.sources
    for document in gathered.documents[fine]
  ]
  return taxonomy, documents


def _read_files(
  data: DataConfig, domains: DomainNames, gathered: Gatherer
) -> None:
  """Adds every record of every file."""
  root, paths = find_files(data.files, "data.files")
  seen = SeenIds()
  for path in paths:
    for where, record in read_records(path, root):
      if isinstance(record, UserError):
        raise record
      if problem := seen.problem(record, where):
        raise problem
      text = record["text"]
      fine = domains.add(record.get("domain"), where)
      gathered.add(text, fine, record.get("origin") or text)
