"""Where text comes from: the embedded mixture, or files of the user's."""

from edl_jax.config import DataConfig, UserError
from edl_jax.text.documents import Document, DomainNames, Gatherer
from edl_jax.text.embedded import read_embedded
from edl_jax.text.readers import SeenIds, find_files, read_records
from edl_jax.text.taxonomy import (
  UNLABELLED,
)


def read_documents(data: DataConfig) -> tuple[tuple[str, ...], list[Document]]:
  """Reads the documents of every domain, without duplicates or empty texts.

  A record (see `readers.read_records`) has a text and a domain and may have an
  origin, a name shared by texts that belong on the same side of the split;
  without it the text is its own origin. The last document of a domain is cut
  where `data.max_characters_per_domain` is reached. How domains are named and
  selected: `DomainNames`.

  Returns:
    The domains as "coarse/fine" ("fine" where there is no coarse name), and
    the documents, domain by domain and then those without, in an order that
    only depends on their origin (embedded) or place (files).

  Raises:
    UserError: nothing to read, a bad record, an unknown or an empty domain.
  """
  domains = DomainNames(data)
  gathered = Gatherer(data.max_characters_per_domain)
  if data.files:
    _read_files(data, domains, gathered)
    source = data.files
  else:
    read_embedded(data, domains, gathered)
    source = "the embedded mixture"
  names = domains.names(gathered.documents, source)
  documents = []
  for name in (*names, UNLABELLED):
    documents += gathered.documents[name.rsplit("/", 1)[-1]]
  return names, documents


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
