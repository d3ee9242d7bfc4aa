"""Describe a report as a list of blocks, which html.py and markdown.py both write.

Text has Markdown's **bold**, *italic* and `code`, and a backslash before a character that is meant as it stands. `plain` puts
backslashes into whatever comes from elsewhere, such as an error's message.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    level: int  # 1 is the title
    text: str


@dataclass(frozen=True)
class Text:
    text: str  # a paragraph


@dataclass(frozen=True)
class Warn:
    text: str  # a paragraph that must not be overlooked


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str  # as it stands


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    name: str  # of its file
    alt: str
    draw: Callable[[int], Figure]  # takes the number of panels that may stand side by side


@dataclass(frozen=True)
class Photo:
    """A picture that lies in a PNG file."""

    path: Path
    alt: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until the reader asks for them."""

    summary: str
    blocks: Sequence


Block = Heading | Text | Warn | Bullets | Code | Table | Plot | Photo | Details

_MARKED = re.compile(r"\\(?P<literal>.)|\*\*(?P<bold>.+?)\*\*|\*(?P<italic>[^*]+?)\*|`(?P<code>[^`]+?)`", re.S)


def plain(text: object) -> str:
    """Return the text with every mark escaped."""
    return re.sub(r"([\\*_`\[\]|])", r"\\\1", " ".join(str(text).split()))


def marked(text: str, write: Callable[[str, str], str]) -> str:
    """Rewrite each piece of ``text`` by ``write(kind, piece)``. Kinds are "text", "bold", "italic" and "code"."""
    parts, end = [], 0
    for match in _MARKED.finditer(text):
        parts.append(write("text", text[end : match.start()]))
        kind, piece = match.lastgroup, match.group(match.lastgroup)
        parts.append(write("text" if kind == "literal" else kind, piece))
        end = match.end()
    return "".join(parts) + write("text", text[end:])
