"""Which parts of documentation are English prose: paragraphs in, clean paragraphs or nothing out.

Rules, not a model: each drops a kind of text that is not running English. What passes is put on one
line and freed of markup, so that a model learns sentences and not line lengths. Pure; knows nothing
of where a text comes from.
"""

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["is_prose", "paragraph_key", "paragraphs", "sentences"]

MIN_WORDS: Final = 10
MIN_LETTERS: Final = 0.86  # share of letters, spaces and sentence marks
MIN_COMMON: Final = 0.25  # share of words that any English prose is full of
MAX_WORD: Final = 40  # characters

COMMON: Final = frozenset(
    re.findall(
        r"\w+",
        """
    a about after all also an and any are as at be because been before both but by can do does
    each for from given had has have how if in into is it its may more most must no not of on one
    only or other same should so some such than that the their them then there these they this to
    two under until up use used using was we were what when where which while will with would you
    your
""",
    )
)
LICENCE: Final = re.compile(
    r"copyright|licen[sc]e|warrant|all rights reserved|redistribut|liabilit|spdx|\bpatent", re.I
)
CODE: Final = re.compile(r"^\s*(>>>|\.\.\. |\$ |In \[|@|[|+]-|\||[=\-~^*_#.]{3,}\s*$|\.\. )", re.M)
BULLET: Final = re.compile(r"^(\s*)(?:[-*•]|\d{1,2}[.)]|\[\d+\])\s+")
HEADING: Final = re.compile(r"^\s*#{1,6}\s")
MARKUP: Final = (  # what it looks like, what stays of it
    (re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]*?)\s*(?:<[^`]*>)?`"), r"`\1`"),  # rst role
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # markdown link
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # rst link
    (re.compile(r"\[`([^`\]]+)`\]"), r"`\1`"),
    (re.compile(r"``+"), "`"),
    (re.compile(r"\*\*([^*]+)\*\*|(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1\2"),
    (re.compile(r"\s*\[\d+\]_"), ""),  # rst reference
    (re.compile(r"</?[a-zA-Z][^>]{0,80}>"), ""),
    (re.compile(r"\s+"), " "),
)
SENTENCE_END: Final = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.) (?=[A-Z`\"(])")
NAME: Final = re.compile(r"`[^`]*`|\b\w*[._A-Z0-9]\w*[A-Z_.]\w*|\d+")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the prose paragraphs of a docstring, a README or a comment, each on one line."""
    for lines in _blocks(text):
        joined = " ".join(lines)
        for pattern, kept in MARKUP:
            joined = pattern.sub(kept, joined)
        joined = joined.strip()
        if is_prose(joined):
            yield joined


def is_prose(paragraph: str) -> bool:
    """Say whether a paragraph on one line is running English of some length, and no licence."""
    if not paragraph[:1].isupper() or paragraph[-1] not in ".!?":
        return False
    words = paragraph.split()
    if len(words) < MIN_WORDS or max(map(len, words)) > MAX_WORD or not paragraph.isascii():
        return False
    letters = sum(1 for c in paragraph if c.isalpha() or c in " .,`'\"()-")
    if letters < MIN_LETTERS * len(paragraph):
        return False
    common = sum(1 for word in words if word.strip(".,:;()").lower() in COMMON)
    return common >= MIN_COMMON * len(words) and not LICENCE.search(paragraph)


def paragraph_key(paragraph: str) -> str:
    """Return what equal paragraphs share, names and numbers left out: copies differ in these."""
    return " ".join(re.findall(r"[a-z]+", NAME.sub("", paragraph).lower()))


def sentences(paragraph: str) -> list[str]:
    """Cut a paragraph into sentences; joined by one space they are the paragraph."""
    return SENTENCE_END.split(paragraph)


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield runs of lines of one indentation, code and headings left out.

    A list's item is one run though its first line begins further left.
    """
    run: list[str] = []
    indent = -1
    fenced = False
    for line in text.expandtabs().splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            line = ""
        stripped = line.strip()
        if fenced or not stripped or CODE.match(line) or HEADING.match(line):
            if run:
                yield run
            run, indent = [], -1
            continue
        bullet = BULLET.match(line)
        column = bullet.end() if bullet else len(line) - len(line.lstrip())
        if run and (bullet or column != indent):
            yield run
            run = []
        run.append(line[column:].strip())
        indent = column
    if run:
        yield run
