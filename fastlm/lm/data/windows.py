"""Cutting long documents into overlapping windows at sentence ends."""

import re
from bisect import bisect_left, bisect_right

# A match ends where the next sentence begins. Chinese and Japanese put no blank after a sentence. A match begins where a run of
# punctuation does: one from each of its marks would read to its end.
_END = re.compile(r"""(?:(?<![.!?…؟।])[.!?…؟।]+["'”’»)\]]*(?=\s)|[。！？｡]+["'”’」』）]*|\n\n)\s*""")


def windows(text: str, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return the (start, end) of windows of at most ``size`` characters that together cover ``text``.

    A window begins and ends at sentence boundaries. It begins with the last sentences of the window before that fit into
    ``overlap`` characters. A sentence that is longer than a window is cut at a blank, or else anywhere, without overlap.

    Raises:
        ValueError: ``size`` is not positive, or ``overlap`` is negative or more than half of it.
    """
    if size < 1:
        raise ValueError(f"size (of a window) must be at least 1 character; got {size}")
    if not 0 <= overlap <= size // 2:
        raise ValueError(f"overlap must be from 0 to half of the window of {size} characters; got {overlap}")
    if len(text) <= size:
        return [(0, len(text))]
    ends = [match.end() for match in _END.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    spans, start = [], 0
    while len(text) - start > size:
        end = _end(text, ends, start, size)
        spans.append((start, end))
        start = _next_start(ends, start, end, size, overlap)
    return [*spans, (start, len(text))]


def _end(text: str, ends: list[int], start: int, size: int) -> int:
    # Where no sentence end fits, `last` is one before `start`, or the very last of the text.
    last = ends[bisect_right(ends, start + size) - 1]
    if start < last <= start + size:
        return last
    blank = max(text.rfind(white, start + 1, start + size) for white in " \n")
    return blank + 1 if blank > 0 else start + size


def _next_start(ends: list[int], start: int, end: int, size: int, overlap: int) -> int:
    """Return the start of the next window: the first sentence of the overlap with which it still reaches beyond ``end``."""
    following = ends[bisect_right(ends, end)]
    index = bisect_left(ends, max(end - overlap, following - size, start + 1))
    return min(ends[index], end)
