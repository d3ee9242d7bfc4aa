"""Reading text files as a stream, in bounded memory: plain text, JSONL, JSON, CSV and Parquet. Malformed rows are counted."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .lines import MAX_DOCUMENT, Lines, check_encoding, check_file, suffix_of
from .problems import Problems
from .rows import CSV, JSON, JSONL, PARQUET, rows

TEXT = {".txt", ".text", ".md", ".rst"}
WITH_FIELDS = JSONL | JSON | CSV | PARQUET
UNITS = ("paragraph", "line", "file")


class Document(NamedTuple):
    """A text, its label if it has one, and its origin: ``path:line``, or a module of Python."""

    text: str
    label: str | None
    origin: str


def _text(lines: Lines, unit: str) -> Iterator[tuple[int, str]]:
    """Yield (first line's number, text) for each document of a text file; ``unit`` determines where a document ends."""
    held, size, start = [], 0, 1
    for line in lines:
        if line.strip():
            start = start if held else lines.number
        held.append(line)
        size += len(line) + 1
        if unit == "line" or lines.goes_on or size >= MAX_DOCUMENT or (unit == "paragraph" and not line.strip()):
            yield start, "\n".join(held)
            held, size = [], 0
    yield start, "\n".join(held)


def documents(
    paths: Sequence[str | os.PathLike],
    problems: Problems,
    *,
    unit: str = "paragraph",
    text_field: str = "text",
    label_field: str = "label",
    encoding: str = "utf-8",
) -> Iterator[Document]:
    """Yield every document of the files and folders that has more than white space.

    Args:
        paths: files and folders. Every text, JSONL, JSON, CSV and Parquet file of a folder is read, gzipped or not, in order
            of the names, except hidden ones. A file with another suffix is read as text if ``paths`` names it.
        problems: collects the malformed rows, and the files of a folder that cannot be read or have another suffix.
        unit: what one document of a text file is: a "paragraph" (up to a blank line), a "line" or the whole "file". A document
            of more than MAX_DOCUMENT characters is split.
        text_field, label_field: the names of the fields in files that have fields. A row may lack the label.

    Raises:
        FileNotFoundError, ValueError: a file of ``paths`` is missing, empty, binary or of another encoding.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    check_encoding(encoding)
    for given in map(Path, paths):
        for path in _files(given, problems):
            try:
                yield from _documents_of(path, problems, unit, text_field, label_field, encoding)
            except (OSError, ValueError) as error:
                if path == given:
                    raise
                problems.add(path, str(error).removeprefix(f"{path} "))


def _documents_of(
    path: Path, problems: Problems, unit: str, text_field: str, label_field: str, encoding: str
) -> Iterator[Document]:
    if suffix_of(path) in WITH_FIELDS:
        for number, row in rows(path, [text_field], problems, optional=[label_field], encoding=encoding):
            if row[text_field].strip():
                yield Document(row[text_field], row.get(label_field) or None, f"{path}:{number}")
    else:
        check_file(path, encoding)
        for number, text in _text(Lines(path, encoding, problems, cut=True), unit):
            if text.strip():
                yield Document(text, None, f"{path}:{number}")


def size_of(paths: Sequence[str | os.PathLike]) -> int | None:
    """Return the bytes of the files that `documents` reads, or None if some are compressed."""
    files = [file for path in map(Path, paths) if path.exists() for file in _files(path, Problems())]
    if not files or any(file.suffix.lower() in {".gz", *PARQUET} for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def _files(path: Path, problems: Problems) -> list[Path]:
    if not path.is_dir():
        return [path]
    found, every = [], (file for file in sorted(path.rglob("*")) if file.is_file())
    for file in every:
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if suffix_of(file) in TEXT | WITH_FIELDS:
            found.append(file)
        else:
            problems.skip(file)
    if not found:
        held = "".join(f"; it holds {count} {suffix}" for suffix, count in problems.skipped.items())
        raise ValueError(f"{path} holds no file that ends in {', '.join(sorted(TEXT | WITH_FIELDS))}{held}")
    return found
