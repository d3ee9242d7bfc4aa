"""What is made of each document alone, before it is compared with the others: in several processes where there is much text."""

import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import NamedTuple

from .clean import clean, why_noise
from .duplicates import Marks, marks_of
from .read import Document
from .windows import windows

CHUNK = 1 << 18  # characters that go to a process at a time
ALONE = 4  # chunks from which on other processes help


class Ready(NamedTuple):
    """A document as read, its clean text, why it is noise or None, its windows, and the marks of the text and the windows.

    Noise has no windows and no marks. A text that is one window has no marks of that.
    """

    document: Document
    text: str
    noise: str | None
    windows: list[str]
    marks: list[Marks]


@dataclass(frozen=True)
class Steps:
    """How documents are made ready: the options of `why_noise`, those of `windows`, and whether near duplicates count."""

    filters: dict
    window: int
    overlap: int
    near: bool

    def __call__(self, documents: Iterable[Document]) -> list[Ready]:
        return list(map(self._ready, documents))

    def _ready(self, document: Document) -> Ready:
        text = clean(document.text)
        if noise := why_noise(text, **self.filters):
            return Ready(document, text, noise, [], [])
        cut = [part for start, end in windows(text, self.window, self.overlap) if (part := text[start:end].strip())]
        marked = [text, *cut] if len(cut) > 1 else [text]
        return Ready(document, text, None, cut, [marks_of(each, self.near) for each in marked])


def make_ready(read: Iterable[Document], steps: Steps) -> Iterator[Ready]:
    """Yield each document made ready, in order. Memory holds a few chunks for each processor."""
    chunks = _chunks(read)
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere processes import torch when they start
    for chunk in islice(chunks, ALONE if workers > 1 else None):
        yield from steps(chunk)
    if workers == 1:
        return
    pending = deque()
    pool = ProcessPoolExecutor(workers, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for chunk in chunks:
            pending.append(pool.submit(steps, chunk))
            if len(pending) > workers + 1:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(read: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in read:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
