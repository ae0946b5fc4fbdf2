"""The pages for users: their blocks of code, how each of these is tested, and where their links lead.

A block of shell or Python runs in tests/test_pages.py as it stands, unless a comment right before it says otherwise:

    <!-- not run: REASON -->         it is only looked at: commands are parsed, Python is compiled
    <!-- run by tests/PATH.py -->    that test runs it
    <!-- not run below: REASON -->   the first, for all later blocks of the page
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdcache.tests.helpers.places import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
SHELL = ("bash", "sh", "console")
PROMPT = "$ "

_FENCE = re.compile(r"( *)(`{3,})(\S*)$")
_COMMENT = re.compile(r"<!-- *(.*?) *-->$")
_BELOW = re.compile(r"not run below: *(.+)")
_OPERATORS = re.compile(r"[();<>|&]+")


@dataclass(frozen=True)
class Block:
    """A fenced block. text: without its indentation. note: what a comment says of its test; "" for one that runs."""

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.note and self.language in (*SHELL, "python")

    def lines(self) -> list[str]:
        """What is typed: lines that go on are joined; of a session with its output only lines with a prompt count."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        if self.language == "console":
            lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    lines, note, below, at = page.read_text().splitlines(), "", "", 0
    while at < len(lines):
        line = lines[at]
        if comment := _COMMENT.fullmatch(line.strip()):
            if later := _BELOW.fullmatch(comment[1]):
                below = f"not run: {later[1]}"
            else:
                note = comment[1]
        elif fence := _FENCE.match(line):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence[2])
            text = textwrap.dedent("\n".join(lines[at + 1 : end]) + "\n")
            yield Block(page, at + 1, fence[3], text, note or below)
            note, at = "", end
        elif line.strip():
            note = ""
        at += 1


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"^( *)(`{3,})\S*\n.*?^ *\2$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(line: str) -> Iterator[list[str]]:
    """The commands of kdcache in a line for the shell: the words after kdcache or -m kdcache.cli, up to an operator."""
    lexer = shlex.shlex(re.sub(r"\$\w+", "1", re.sub(r"\$\([^()]*\)", "", line)), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] | None = None
    for word in [*lexer, ";"]:
        if words is None:
            words = [] if word in ("kdcache", "kdcache.cli") or word.endswith("/kdcache") else None
        elif _OPERATORS.fullmatch(word):
            if words:
                yield words
            words = None
        else:
            words.append(word)


def links(page: Path) -> Iterator[str]:
    """The targets of all links and pictures of a page."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from re.findall(r"\]\(([^()\s]+)\)", text)
    yield from re.findall(r'<img[^>]* src="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found
