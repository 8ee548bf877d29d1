"""Extractors: the text of each kind of file, and nothing else of it."""

import json
import sqlite3
import struct
import textwrap
import zlib

import pytest

from data.corpora_extract import EXTRACTORS


def texts(name, content):
  if isinstance(content, str):
    content = textwrap.dedent(content).encode()
  return list(EXTRACTORS[name](content))


def test_plain_decodes_what_is_not_utf_8():
  assert texts("plain", "\ufeffnaïve\n".encode()) == ["naïve\n"]
  assert texts("plain", "naïve “x”\n".encode("cp1252")) == ["naïve “x”\n"]


def test_fortunes_are_separated_by_percent_signs():
  assert texts("fortunes", "a\n%\nb 5%\nc\n") == ["a\n", "b 5%\nc\n"]


def words_of_page(content):
  (text,) = texts("html", content)
  return [line for line in text.splitlines() if line.strip()]


def test_html_keeps_words_and_drops_menus():
  page = """
    <html><head><title>T</title><style>p {}</style></head><body>
    <div class="navheader big">menu <p>in it</p></div><script>a < b</script>
    <h1>Head<a class="headerlink">#</a></h1>
    <p>One &amp; <b>two</b>
       three<br>four</p><nav>no</nav>
    <pre>  kept
       as is</pre>
    <ul><li>first<li>second</ul><table><tr><td>a<td>b</table>
    <dl><dt>x<span class="classifier">int</span></dt></dl>
    <p>A formula <img class="math" alt="x^2"> and <img alt="logo"></p>
    </body></html>"""
  assert words_of_page(page) == [
    "Head",
    "One & two three",
    "four",
    "  kept",
    "   as is",
    "first",
    "second",
    "a b",
    "x int",
    "A formula x^2 and ",
  ]


def test_html_takes_the_main_part():
  page = '<body>site<div role="main"><p>text</p></div></body>'
  assert words_of_page(page) == ["text"]


def test_html_survives_elements_left_open():
  page = "<div><nav>menu <p>in it</div><p>text<div></nav></p>end"
  assert words_of_page(page) == ["text", "end"]


def test_roff():
  (text,) = texts(
    "roff",
    r"""
    .\" a comment
    .de XX
    no text
    ..
    .TH NAME 1
    .SH "SEE WHAT"
    Words of
    .BR open (2)
    go\-on \fIhere\fP, a back\eslash.
    .PP
    Next \(aqquoted\(aq.
    .nf
    int
      main;
    .fi
    .TS
    allbox;
    lb l.
    a	T{
    b
    T}
    .TE
    """,
  )
  assert [p.strip("\n") for p in text.split("\n\n") if p.strip()] == [
    "SEE WHAT",
    "Words of open(2) go-on here, a back\\slash.",
    "Next 'quoted'.",
    "int\n  main;",
    "a\tb",
  ]


def test_pod():
  content = (
    "code;\n\n=head1 A B<bold> head\n\nText with C<< a->b >> and L<perl|x>,"
    " E<lt>I<i>E<gt>.X<index>\n\n  verbatim B<x>\n\n=begin html\n\nno\n\n=end"
    " html\n\n=cut\n\nmore code;\n"
  )
  assert texts("pod", content) == [
    "A bold head\n\nText with a->b and perl, <i>.\n\n  verbatim B<x>"
  ]


def test_mail_takes_subject_and_text():
  message = (
    b"Received: from x\nSubject: Hi\n there\nMIME-Version: 1.0\n"
    b"Content-Type: multipart/mixed; boundary=B\n\n--B\nContent-Type:"
    b" text/html\n\n<p>no</p>\n--B\nContent-Type: text/plain\n"
    b"Content-Transfer-Encoding: quoted-printable\n\nA=20b\n--B--\n"
  )
  assert texts("mail", message) == ["Hi  there\n\nA b"]
  assert texts("mail", b"Content-Type: image/png\n\nabc") == []


def test_brown_loses_its_tags():
  content = "\n\n\tThe/at jury/nn ``/`` said/vbd so/rb ''/'' ,/, and/cc ./.\n"
  assert texts("brown", content) == ['\nThe jury "said so", and.\n']


def test_wordnet_gives_synonyms_and_gloss():
  content = (
    "  1 This software and database | is licensed\n"
    "00003431 29 v 04 burp 0 belch_out 0 big(a) 0 eruct 0 001 @ 00105333 v"
    " 0000 01 + 02 00 | expel gas  \n"
  )
  assert texts("wordnet", content) == ["burp, belch out, big, eruct: expel gas"]


def test_front_matter_and_dictionary():
  assert texts("front_matter", "---\nkey: x\n---\nThe text\n---\n") == [
    "The text\n---\n"
  ]
  content = "Curse\n   To utter.\n   [1913 Webster]\n\n   See [x].\n"
  assert texts("dictionary", content) == [
    "Curse\n   To utter.\n\n   See [x].\n"
  ]


def test_r_strings():
  lines = [f"line {n} é" for n in range(200)]
  vector = struct.pack(">ii", 16, len(lines)) + b"".join(
    struct.pack(">ii", 0x8009, len(line.encode())) + line.encode()
    for line in lines
  )
  short = struct.pack(">ii", 16, 1) + struct.pack(">ii", 0x40009, 1) + b"a"
  content = b"\0\0\1\0" + zlib.compress(b"X\n\0\0" + short + vector) + b"tail"
  assert texts("r_strings", content) == ["\n".join(lines)]


def test_wiki_dump_that_breaks_off():
  content = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.7/">
    <page><title>Cat</title><revision><text>{{box|{{a}}}}The '''cat''' is
    a [[Felis|small]] [[animal]].&lt;ref name="x"&gt;no&lt;/ref&gt;
    [[File:a.png|thumb|see [[b]]]]
    </text></revision></page>
    <page><title>Dog</title><revision><text>#REDIRECT [[Cat]]</text></revision>
    </page><page><title>Talk:Cat</title><revision><text>x</text></revision>
    </page><page><title>Broken"""
  (article,) = texts("wiki_dump", content)
  assert article.split() == [
    "Cat",
    *["The", "cat", "is", "a", "small", "animal."],
  ]


def test_poems_idioms_and_questions():
  poem = {"title": "題", "author": "人", "paragraphs": ["一。", "二。"]}
  assert texts("poems", json.dumps([poem])) == ["題\n人\n一。\n二。"]
  rows = "word,explanation,derivation,example\n成语,意思,无,例\n"
  assert texts("idioms", rows) == ["成语\n意思\n例"]
  record = {"system": "no", "query": "问", "response": "答"}
  assert texts("questions", json.dumps(record) + "\n") == ["问\n答"]


def test_laws(tmp_path):
  path = tmp_path / "laws.db"
  with sqlite3.connect(path) as connection:
    connection.execute(
      "CREATE TABLE articles (id INTEGER, law_name TEXT, chapter TEXT,"
      " article_no TEXT, article_text TEXT)"
    )
    connection.executemany(
      "INSERT INTO articles VALUES (?, ?, ?, ?, ?)",
      [
        (3, "乙法", None, "第一条", "丙。"),
        (1, "甲法", "第一章", "第一条", "甲。"),
        (2, "甲法", "第一章", "第二条", "乙。"),
      ],
    )
  connection.close()
  assert texts("laws", path.read_bytes()) == [
    "甲法\n第一章\n第一条 甲。\n第二条 乙。",
    "乙法\n第一条 丙。",
  ]


@pytest.mark.parametrize("name", ["comments", "statements"])
def test_metamath(name):
  content = """
    $( A set is a collection of ` x ` as <HTML>in</HTML> ~ ax-7 and so on.
       (Contributed by NM, 5-Aug-1993.) $)
    $( =-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-=-= $)
    ${
      min $e |- ph $.
      ax $a |- ps $.
      th $p |- ( ph -> ps ) $= ( wi a1i ) ABCZDEF
        GH $.
    $}
    """
  expected = {
    "comments": ["A set is a collection of x as in ax-7 and so on."],
    "statements": [
      "${\nmin $e |- ph $.",
      "ax $a |- ps $.",
      "th $p |- ( ph -> ps ) $= ( wi a1i ) $.\n$}",
    ],
  }[name]
  found = [" ".join(t.split()) for t in texts(f"metamath_{name}", content)]
  assert [t for t in found if t] == [" ".join(t.split()) for t in expected]
