"""The documentation's pages: their code blocks, how a block runs, and their links.

A comment in front of a block, which no reader of the page sees, says how the tests run it:

    <!-- given: CODE -->         runs first: what the reader is supposed to have, such as a trained model
    <!-- run as: OLD -> NEW -->  in the quick tests NEW stands in place of OLD, such as a smaller depth
    <!-- needs: PACKAGES -->     the block is skipped where one of these packages is not installed
    <!-- file: PATH -->          the block is the whole of this file, and a test of its own writes and runs it
    <!-- not run: REASON -->     the block needs a GPU, a network, several processes, or is not a program
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent.parent

# Folders with pages; a page elsewhere, such as a README beside some sources, is found by the last pattern.
PATTERNS = ("*.md", "docs/**/*.md", "bench/**/*.md", "csrc/**/*.md")

_COMMENT = re.compile(r"<!--\s*(given|run as|needs|file|not run):(.*?)-->", re.DOTALL)


@dataclass
class Block:
    page: Path
    line: int  # of its first line of code, from 1
    language: str
    text: str
    comments: dict[str, list[str]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def comment(self, kind: str) -> str | None:
        found = self.comments.get(kind)
        return found[0] if found else None

    def quick(self) -> str:
        """The code that the quick tests run. A replacement that finds nothing to replace is an error."""
        text = self.text
        for replacement in self.comments.get("run as", []):
            old, _, new = replacement.partition("->")
            if not old.strip() or old.strip() not in text:
                raise ValueError(f"{self.place}: {old.strip()!r} of <!-- run as --> is not in the block")
            text = text.replace(old.strip(), new.strip())
        return text


def pages() -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})


def parse(page: Path, text: str | None = None) -> list:
    """The page's tokens."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text() if text is None else text)


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The page's fenced blocks, each with the comments that stand directly in front of it."""
    found, comments = [], {}
    for token in parse(page, text):
        if token.type == "html_block":
            for kind, value in _COMMENT.findall(token.content):
                comments.setdefault(kind, []).append(value.strip())
        else:
            if token.type == "fence":
                found.append(Block(page, token.map[0] + 2, token.info.strip(), token.content, comments))
            elif comments:
                raise ValueError(f"{page}:{token.map[0] + 1}: no code block follows the comment {comments}")
            comments = {}
    return found


def links(page: Path) -> Iterator[tuple[int, str]]:
    """The line and the target of every link and picture."""
    for token in parse(page):
        if token.type != "inline":
            continue
        for child in token.children:
            target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if target is not None:
                yield token.map[0] + 1, target


def code_spans(page: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of every `code` within a sentence or a table, up to a heading "Planned"."""
    tokens = parse(page)
    for token, before in zip(tokens, [None, *tokens], strict=False):
        if token.content == "Planned" and before.type == "heading_open":
            return
        for child in token.children or ():
            if child.type == "code_inline":
                yield token.map[0] + 1, child.content


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them: two equal headings get different ones."""
    found: dict[str, int] = {}
    tokens = parse(page)
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
            if found[slug]:
                found[f"{slug}-{found[slug]}"] = 0
    return set(found)
