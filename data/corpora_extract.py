"""Extracts plain text from files, with one small function a format.

An extractor takes the bytes of a file and yields its texts: a page, a poem, the
entries of a dictionary. It keeps words and drops markup. `corpora_clean` makes
documents of the texts.
"""

import csv
import email
import email.policy
import html.parser
import io
import json
import re
import sqlite3
import struct
import xml.etree.ElementTree
import zlib
from collections.abc import Callable, Iterator
from typing import Any


def decode(content: bytes) -> str:
  """Decodes UTF-8, without its byte order mark, or else Windows-1252."""
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError:
    return content.decode("cp1252", errors="replace")


def _set(names: str) -> frozenset[str]:
  return frozenset(names.split())


def plain(content: bytes) -> Iterator[str]:
  """Yields the whole file."""
  yield decode(content)


def fortunes(content: bytes) -> Iterator[str]:
  """Yields the texts between lines of "%"."""
  yield from re.split(r"^%$\n?", decode(content), flags=re.MULTILINE)


def dictionary(content: bytes) -> Iterator[str]:
  """Yields GNU's dictionary without notes of source: "[1913 Webster]"."""
  yield re.sub(
    r"^\s*\[[^\[\]\n]*(Webster|WordNet|PJC)[^\[\]\n]*\]$\n?",
    "",
    decode(content),
    flags=re.MULTILINE,
  )


# --- HTML --------------------------------------------------------------------

_VOID = _set("area base br col embed hr img input link meta source track wbr")
_BLOCKS = _set(
  "address article blockquote br dd details div dl dt fieldset figcaption "
  "figure h1 h2 h3 h4 h5 h6 hr li main ol p pre section summary table tbody "
  "thead tr ul"
)
_PARAGRAPHS = _set("blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul")
_NOT_TEXT = _set(
  "aside button footer form head header nav noscript script select style "
  "svg template"
)
# Classes and ids that documentation tools give to their menus.
_CHROME = _set(
  "chlinkbot chlinkprevnextbot chlinkprevnexttop chlinktop ChapSects "
  "ContSect contents footer header headerlink linenodiv mathjaxlink "
  "nav-panel navfooter navheader prev-next-area related search "
  "sphinxsidebar toc toctree-wrapper viewcode-link Contents SUMMARY "
  "SEC_Contents docnav previous next copiable-anchor printindex"
)


# As html.parser passes them: names, and values or None.
_Attributes = list[tuple[str, str | None]]


class _Page(html.parser.HTMLParser):
  """Collects the words of a page, without menus, scripts and styles."""

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.pieces: list[str] = []
    # Open elements, outermost first: (tag, whether its content is hidden).
    self._open: list[tuple[str, bool]] = []
    self._hidden = 0
    self._verbatim = 0

  def handle_starttag(self, tag: str, attrs: _Attributes) -> None:
    self._break(tag)
    names = [value for key, value in attrs if key in ("class", "id")]
    names = " ".join(filter(None, names)).split()
    if tag in ("td", "th") or "classifier" in names:
      self.handle_data(" ")
    if tag == "img" and "math" in names:
      self.handle_data(dict(attrs).get("alt") or "")
    if tag in _VOID:
      return
    hides = tag in _NOT_TEXT or not _CHROME.isdisjoint(names)
    self._open.append((tag, hides))
    self._hidden += hides
    self._verbatim += tag == "pre"
    if ("role", "main") in attrs or tag == "main":
      self.pieces.clear()

  def handle_startendtag(self, tag: str, attrs: _Attributes) -> None:
    self._break(tag)

  def handle_endtag(self, tag: str) -> None:
    if tag not in (name for name, _ in self._open):
      return
    while True:
      name, hides = self._open.pop()
      self._hidden -= hides
      self._verbatim -= name == "pre"
      if name == tag:
        break
    self._break(tag)

  def _break(self, tag: str) -> None:
    """Starts a new line for a block, after a blank one for a paragraph."""
    if tag in _BLOCKS and "".join(self.pieces[-1:])[-1:] != "\n":
      self.pieces.append("\n")
    if tag in _PARAGRAPHS:
      self.pieces.append("\n")

  def handle_data(self, data: str) -> None:
    if self._hidden:
      return
    if not self._verbatim:
      data = re.sub(r"\s+", " ", data)
      if not self.pieces or self.pieces[-1].endswith((" ", "\n")):
        data = data.lstrip(" ")
    self.pieces.append(data)


def html_page(content: bytes) -> Iterator[str]:
  """Yields the main part of a page, or all of it if no part is marked."""
  page = _Page()
  page.feed(decode(content))
  page.close()
  yield "".join(page.pieces).replace("\xa0", " ").replace("¶", "")


# --- Manuals -----------------------------------------------------------------

# Delimiters of table cells with several lines, and rules of tables.
_ROFF_TABLES = ((r"\n?T\}", ""), (r"T\{\n?", ""), (r"^[_=]$\n?", ""))
_ROFF_ESCAPES = (
  (r'\\".*$', ""),
  (r"\\f(\(..|\[[^\]]*\]|.)", ""),
  (r"\\s[-+]?\d+", ""),
  (r"\\\*\((lq|rq)|\\\((lq|rq|dq)", '"'),
  (r"\\\((aq|cq|oq)", "'"),
  (r"\\\(em", " - "),
  (r"\\\((en|hy|mi)|\\-", "-"),
  (r"\\\((bu|ci)", "*"),
  (r"\\\(co", "(C)"),
  (r"\\\(ha", "^"),
  (r"\\\(ti", "~"),
  (r"\\\(rs|\\e", "\0"),
  (r"\\\(\w\w|\\\[[^\]]*\]|\\\*(\(..|\[[^\]]*\]|.)", ""),
  (r"\\[hvwn]'[^']*'|\\n(\(..|.)", ""),
  (r"\\[ ~0]", " "),
  (r"\\[|^&:%/,acdpt)]", ""),
  (r"\\(.)", r"\1"),
  # \\e became a NUL above, so that no other rule changes its backslash.
  ("\0", r"\\"),
)
# Requests whose arguments are text in a font; alternating fonts join words.
_ROFF_FONTS = _set("B I R SB SM UR MT TQ")
_ROFF_GLUED = _set("BI BR IB IR RB RI")
_ROFF_BREAKS = _set("SH SS TP PP P LP IP HP RS RE sp TS")


def roff(content: bytes) -> Iterator[str]:
  """Yields a manual page: headings, and paragraphs of one line each."""
  paragraphs: list[list[str]] = [[]]
  # Pattern that ends a macro definition or a table's column description.
  skipped_to, filled = "", True
  source = re.sub(r"\\\n", "", decode(content).replace("\\\\", "\\e"))
  for line in source.splitlines():
    if skipped_to:
      if re.search(skipped_to, line):
        skipped_to = ""
      continue
    found = re.match(r"[.'][ \t]*([^\s\\]*)[ \t]*(.*)", line)
    request, rest = (found[1], found[2]) if found else ("", line)
    if not found:
      words = rest
    elif request in _ROFF_FONTS:
      words = _roff_arguments(rest)
    elif request in _ROFF_GLUED:
      words = _roff_arguments(rest, "")
    elif request in ("SH", "SS"):
      paragraphs += [[_roff_arguments(rest)], []]
      continue
    else:
      words = ""
      if request in ("ig", "de", "de1", "am"):
        skipped_to = r"^\.\."
      elif request == "TS":
        skipped_to = r"\.\s*$"
      if request in ("nf", "EX", "TS", "fi", "EE", "TE"):
        filled = request in ("fi", "EE", "TE")
        paragraphs.append([])
      elif request in _ROFF_BREAKS:
        paragraphs.append([])
        if request == "IP" and rest:
          words = _roff_arguments(_first(rest))
    if not found and not words.strip():
      paragraphs.append([])
    elif words:
      paragraphs[-1].append(words if filled else f"{words}\n")
  # Unfilled lines end with a line break and keep it.
  text = "\n\n".join(
    "".join(lines) if lines[-1].endswith("\n") else " ".join(lines)
    for lines in filter(None, paragraphs)
  )
  for pattern, replacement in (*_ROFF_TABLES, *_ROFF_ESCAPES):
    text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
  yield text


def _roff_arguments(rest: str, glue: str = " ") -> str:
  """Joins the arguments of a request, of which some are quoted."""
  rest = re.sub(r'\\".*$', "", rest).replace("\\ ", "\\~")
  found = re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)
  return glue.join(quoted.replace('""', '"') or word for quoted, word in found)


def _first(rest: str) -> str:
  found = re.match(r'"[^"]*"|\S+', rest)
  return found[0] if found else ""


def pod(content: bytes) -> Iterator[str]:
  """Yields the Perl documentation of a file, from =head to =cut."""
  paragraphs, shown, skipping = [], False, False
  for paragraph in re.split(r"\n[ \t]*\n", decode(content)):
    paragraph = paragraph.strip("\n")
    command = re.match(r"=(\w+)[ \t]*(.*)", paragraph, re.DOTALL)
    if command:
      name, rest = command[1], command[2]
      shown = name != "cut"
      skipping = name == "begin" or (skipping and name != "end")
      paragraph = rest if name.startswith(("head", "item")) else ""
    if shown and not skipping and paragraph.strip():
      paragraphs.append(_pod_words(paragraph))
  yield "\n\n".join(paragraphs)


def _pod_words(text: str) -> str:
  if text[:1].isspace():
    return text
  text = re.sub(r"X<[^<>]*>|Z<>", "", text)
  entities = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}
  # Literal angle brackets become control characters while codes, innermost
  # first, are removed.
  angles = str.maketrans("<>", "\1\2")
  text = re.sub(
    r"E<(\w+)>",
    lambda m: entities.get(m[1], "").translate(angles),
    text,
  )
  text = re.sub(
    r"[BCFILS](<{2,})\s(.*?)\s>{2,}",
    lambda m: m[2].translate(angles),
    text,
    flags=re.DOTALL,
  )
  text = re.sub(
    r"->|=>|<=|>=|< | >(?=\s)", lambda m: m[0].translate(angles), text
  )
  previous = None
  while previous != text:
    previous = text
    text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
    text = re.sub(r"[BCFISN]<([^<>]*)>", r"\1", text)
  return text.translate(str.maketrans("\1\2", "<>"))


# --- Collections -------------------------------------------------------------


def mail(content: bytes) -> Iterator[str]:
  """Yields the subject and the plain text of a message."""
  message = email.message_from_bytes(content, policy=email.policy.compat32)
  subject = str(message.get("Subject", "")).replace("\n", " ")
  for part in message.walk():
    if part.get_content_type() == "text/plain":
      payload = part.get_payload(decode=True)
      text = decode(payload) if isinstance(payload, bytes) else ""
      yield f"{subject}\n\n{text}"
      return


def brown(content: bytes) -> Iterator[str]:
  """Yields sentences, one a line, of words tagged as "The/at jury/nn"."""
  text = re.sub(r"(\S+)/\S+", r"\1", decode(content))
  text = re.sub(r"[ \t]+", " ", text)
  text = re.sub(r" ([,.;:?!)\]]+)(?=\s)", r"\1", text)
  text = re.sub(r"`` ?", '"', text)
  text = re.sub(r" ?''", '"', text)
  text = re.sub(r"([(\[]) ", r"\1", text)
  # The final sign is tagged too, as "./." or ";/.", and often occurs twice.
  text = re.sub(r"([.;?!])\1$", r"\1", text, flags=re.MULTILINE)
  yield re.sub(r"\n+ ?", "\n", text)


def wordnet(content: bytes) -> Iterator[str]:
  """Yields the synonyms and gloss of each line; skips the licence above."""
  for line in decode(content).splitlines():
    if "|" not in line or line.startswith(" "):
      continue
    fields, gloss = line.split("|", 1)
    fields = fields.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    names = ", ".join(re.sub(r"\(\w+\)$", "", word) for word in words)
    yield f"{names.replace('_', ' ')}: {gloss.strip()}"


def front_matter(content: bytes) -> Iterator[str]:
  """Yields what follows a block of settings between two lines of "---"."""
  yield re.sub(r"\A---\n.*?\n---\n", "", decode(content), flags=re.DOTALL)


def r_strings(content: bytes) -> Iterator[str]:
  """Yields the long string vectors in R's database of lazily loaded objects.

  Objects are zlib streams of R's serialization (R Internals, section 1.8):
  after a vector's flags, 16, and its length, each string has flags whose last
  byte is 9, its length, and its bytes; integers are big-endian.
  """
  for start in re.finditer(b"\x78[\x01\x5e\x9c\xda]", content):
    try:
      data = zlib.decompressobj().decompress(content[start.start() :])
    except zlib.error:
      continue
    for vector in re.finditer(b"\x00[\x00-\x03]\x00\x10(?=\x00)", data):
      (count,) = struct.unpack_from(">i", data, vector.end())
      strings, at = [], vector.end() + 4
      while len(strings) < count and data[at + 3 : at + 4] == b"\x09":
        (size,) = struct.unpack_from(">i", data, at + 4)
        strings.append(decode(data[at + 8 : at + 8 + max(size, 0)]))
        at += 8 + max(size, 0)
      if len(strings) == count > 100:
        yield "\n".join(strings)


def wiki_dump(content: bytes) -> Iterator[str]:
  """Yields the articles of a MediaWiki export, which may be truncated."""
  tag, parser = "{*}", xml.etree.ElementTree.XMLPullParser(("end",))
  for start in range(0, len(content), 1 << 16):
    try:
      parser.feed(content[start : start + (1 << 16)])
      # The declared type covers kinds of events that were not requested.
      events: list[Any] = list(parser.read_events())
    except xml.etree.ElementTree.ParseError:
      return
    for _, element in events:
      if element.tag.rsplit("}", 1)[-1] != "page":
        continue
      title = element.findtext(f"{tag}title", "")
      text = element.findtext(f"{tag}revision/{tag}text", "") or ""
      if ":" not in title and not text[:9].upper().startswith("#REDIRECT"):
        yield f"{title}\n\n{_wiki_words(text)}"
      element.clear()


def _wiki_words(text: str) -> str:
  text = re.sub(r"<!--.*?-->|<math.*?</math>", "", text, flags=re.DOTALL)
  text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
  text = re.sub(r"<(gallery|table)\b.*?</\1>", "", text, flags=re.DOTALL)
  previous = None
  while previous != text:  # Innermost brackets first.
    previous = text
    text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\{\|[^{}]*\|\}", "", text)
    text = re.sub(
      r"\[\[\s*(?:File|Image|[a-z-]{2,12}|Category):"
      r"[^\[\]]*\]\]",
      "",
      text,
      flags=re.IGNORECASE,
    )
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
  text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
  text = re.sub(r"<[^<>]+>|'{2,}|__[A-Z]+__", "", text)
  text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
  # Lists are mostly links at the end of an article; drop their marks.
  text = re.sub(r"^[*#:;]+ *", "", text, flags=re.MULTILINE)
  return html.unescape(html.unescape(text))


# --- Chinese -----------------------------------------------------------------


def poems(content: bytes) -> Iterator[str]:
  """Yields the poems of a JSON list: title, author, lines."""
  for poem in json.loads(decode(content)):
    title = poem.get("title") or poem.get("rhythmic") or ""
    lines = [title, poem.get("author", ""), *poem.get("paragraphs", ())]
    yield "\n".join(filter(None, lines))


def idioms(content: bytes) -> Iterator[str]:
  """Yields the idioms of a CSV file: word, explanation, source, example."""
  for row in csv.DictReader(io.StringIO(decode(content))):
    fields = ("word", "explanation", "derivation", "example")
    texts = [row[field].strip() for field in fields if row[field]]
    yield "\n".join(text for text in texts if text != "无")


def laws(content: bytes) -> Iterator[str]:
  """Yields the laws of an SQLite database, each with all its articles."""
  connection = sqlite3.connect(":memory:")
  connection.deserialize(content)
  rows = connection.execute(
    "SELECT law_name, chapter, article_no, article_text FROM articles"
    " ORDER BY id"
  )
  law, chapter, lines = None, None, []
  for name, part, number, text in rows:
    if name != law:
      if lines:
        yield "\n".join(lines)
      law, chapter, lines = name, None, [name]
    if part and part != chapter:
      chapter = part
      lines.append(part)
    lines.append(f"{number} {text}")
  yield "\n".join(lines)


def questions(content: bytes) -> Iterator[str]:
  """Yields the questions and answers of JSON lines, without instructions."""
  for line in decode(content).splitlines():
    record = json.loads(line)
    yield f"{record['query']}\n{record['response']}"


# --- Formal mathematics ------------------------------------------------------


def metamath_comments(content: bytes) -> Iterator[str]:
  """Yields the comments of a Metamath database, between "$(" and "$)"."""
  for comment in re.findall(r"\$\((.*?)\$\)", decode(content), re.DOTALL):
    words = " ".join(comment.split())
    # Remove authors, dates, and advice to writers of proofs.
    words = re.sub(
      r" ?\((Contributed|Revised|Proof shortened|Proof modification"
      r"|New usage)[^()]*\)",
      "",
      words,
    )
    # Runs of signs underline headings; "$j" and "$t" are settings.
    if len(words) > 40 and not re.match(r"[$]|\W{4}", words):
      # Remove the backquotes of formulas and the tildes before labels.
      words = re.sub(r"(?<!\S)~ |`|</?[A-Za-z][^<>]*>", "", words)
      yield re.sub(r" +", " ", words)


def metamath_statements(content: bytes) -> Iterator[str]:
  """Yields the statements of a Metamath database and the labels they cite.

  Drops compressed proofs, in which letters stand for steps.
  """
  text = re.sub(r"\$\(.*?\$\)", "", decode(content), flags=re.DOTALL)
  for block in re.split(r"\n(?=\s*\S+ \$[ap])", text):
    block = re.sub(r"(\$=\s*\([^)]*\))[A-Z?\s]*\$\.", r"\1 $.", block)
    block = re.sub(r"\s*\n\s*", " ", block).strip()
    yield re.sub(r" ?(\$[{}]) ?", r"\n\1\n", block).strip()


EXTRACTORS: dict[str, Callable[[bytes], Iterator[str]]] = {
  "brown": brown,
  "dictionary": dictionary,
  "fortunes": fortunes,
  "front_matter": front_matter,
  "html": html_page,
  "idioms": idioms,
  "laws": laws,
  "mail": mail,
  "metamath_comments": metamath_comments,
  "metamath_statements": metamath_statements,
  "plain": plain,
  "pod": pod,
  "poems": poems,
  "questions": questions,
  "r_strings": r_strings,
  "roff": roff,
  "wiki_dump": wiki_dump,
  "wordnet": wordnet,
}
