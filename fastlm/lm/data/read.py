"""Reading text files as a stream: plain text, JSONL and CSV, in bounded memory. Malformed rows are counted."""

import codecs
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SHOWN = 5  # problems to keep as examples
HEAD = 1 << 16  # bytes at the beginning by which `check_file` judges a file
MAX_LINE = 1 << 22  # bytes; a longer line is a malformed row
MAX_DOCUMENT = 1 << 20  # characters; a longer document of a text file is split at the end of a line
TEXT, JSONL, CSV = {".txt", ".text", ".md", ".rst"}, {".jsonl", ".ndjson"}, {".csv", ".tsv"}
UNITS = ("paragraph", "line", "file")


class Document(NamedTuple):
    """A text, its label if it has one, and its origin: ``path:line``, or a module of Python."""

    text: str
    label: str | None
    origin: str


@dataclass
class Problems:
    """The number of rows and files that could not be read, and the first five of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.first.append(f"{where}: {reason}")


class Lines:
    """The decoded lines of a file, without their ends. ``number`` is the number of the last line given, counted from 1.

    A line that cannot be decoded, or that has more than MAX_LINE bytes, goes to ``problems``.
    """

    def __init__(self, path: Path, encoding: str, problems: Problems) -> None:
        self.path, self.encoding, self.problems, self.number = path, encoding, problems, 0

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            while raw := file.readline(MAX_LINE):
                self.number += 1
                if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                    self.malformed(f"the line is longer than {MAX_LINE} bytes")
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_LINE)
                    continue
                try:
                    line = raw.decode(self.encoding).rstrip("\r\n")
                except UnicodeDecodeError as error:
                    self.malformed(f"not {self.encoding}: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
                    continue
                yield line.removeprefix("\ufeff") if self.number == 1 else line

    def malformed(self, reason: str) -> None:
        self.problems.add(f"{self.path}:{self.number}", reason)


def check_encoding(encoding: str) -> None:
    """Raise a ValueError unless ``encoding`` is known and encodes ASCII as ASCII does (UTF-16 does not)."""
    try:
        ascii_like = "a\n".encode(encoding) == b"a\n"
    except (LookupError, UnicodeError):
        raise ValueError(f"encoding must be the name of a text encoding, such as utf-8 or latin-1; got {encoding!r}") from None
    if not ascii_like:
        raise ValueError(f"encoding must hold ASCII as it is; convert files of {encoding!r} to UTF-8")


def check_file(path: Path, encoding: str) -> None:
    """Raise an error that names the file if it is missing, empty or binary, or if its beginning is of another encoding."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head.strip():
        raise ValueError(f"{path} is empty")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16: convert it to UTF-8")
    if (offset := head.find(b"\0")) >= 0:
        raise ValueError(f"{path} is binary, not text: it has a zero byte at offset {offset}")
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path} is not {encoding} text: {byte}; name its encoding, e.g. encoding='latin-1'") from None


def rows(
    path: Path, fields: Sequence[str], problems: Problems, *, optional: Sequence[str] = (), encoding: str = "utf-8"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, {field: text}) for each row of a JSONL or CSV file; malformed rows go to ``problems``.

    Args:
        path: a .jsonl or .ndjson file has an object in each line; a .csv file, or a .tsv file with tabs, begins with a header.
        fields: the fields that each row must have. Those of ``optional`` are given where a row has them.

    Raises:
        FileNotFoundError, ValueError: as `check_file`, or the header of a CSV file lacks one of ``fields``.
    """
    check_file(path, encoding)
    lines = Lines(path, encoding, problems)
    yield from (_jsonl if path.suffix.lower() in JSONL else _csv)(lines, fields, optional)


def _jsonl(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            lines.malformed(f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            lines.malformed(f"expected an object; got {type(row).__name__}")
        elif bad := [name for name in fields if not isinstance(row.get(name), str)]:
            lines.malformed(f"the field {bad[0]!r} must be a text; got {json.dumps(row.get(bad[0]))[:40]}")
        else:
            more = {name: str(row[name]) for name in optional if row.get(name) is not None}
            yield lines.number, {name: row[name] for name in fields} | more


def _csv(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    # A row may span several lines. csv joins them if each line keeps its end.
    delimiter = "\t" if lines.path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    header = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.malformed(f"not CSV: {error}")
            continue
        if header is None:
            header = row
            if missing := [name for name in fields if name not in header]:
                raise ValueError(f"{lines.path} has no column {missing[0]!r}; its header is {', '.join(header)[:200]}")
        elif row and len(row) != len(header):
            lines.malformed(f"expected {len(header)} fields, as in the header; got {len(row)}")
        elif row:
            values = dict(zip(header, row))
            yield lines.number, {name: values[name] for name in [*fields, *optional] if name in values}


def _text(lines: Lines, unit: str) -> Iterator[tuple[int, str]]:
    """Yield (first line's number, text) for each document of a text file; ``unit`` determines where a document ends."""
    held, size, start = [], 0, 1
    for line in lines:
        if line.strip():
            start = start if held else lines.number
        held.append(line)
        size += len(line) + 1
        if unit == "line" or size >= MAX_DOCUMENT or (unit == "paragraph" and not line.strip()):
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
        paths: files and folders. Every text, JSONL and CSV file of a folder is read, in the order of their names, except hidden
            ones. A file with another suffix is read as text if ``paths`` names it.
        problems: collects the malformed rows, and the files of a folder that cannot be read.
        unit: what one document of a text file is: a "paragraph" (up to a blank line), a "line" or the whole "file". A document
            of more than MAX_DOCUMENT characters is split.
        text_field, label_field: the names of the fields in JSONL and CSV files. A row may lack the label.

    Raises:
        FileNotFoundError, ValueError: a file of ``paths`` is missing, empty, binary or of another encoding.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    check_encoding(encoding)
    for given in map(Path, paths):
        for path in _files(given):
            try:
                yield from _documents_of(path, problems, unit, text_field, label_field, encoding)
            except (OSError, ValueError) as error:
                if path == given:
                    raise
                problems.add(str(path), str(error).removeprefix(f"{path} "))


def _documents_of(
    path: Path, problems: Problems, unit: str, text_field: str, label_field: str, encoding: str
) -> Iterator[Document]:
    if path.suffix.lower() in JSONL | CSV:
        for number, row in rows(path, [text_field], problems, optional=[label_field], encoding=encoding):
            if row[text_field].strip():
                yield Document(row[text_field], row.get(label_field) or None, f"{path}:{number}")
    else:
        check_file(path, encoding)
        for number, text in _text(Lines(path, encoding, problems), unit):
            if text.strip():
                yield Document(text, None, f"{path}:{number}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in TEXT | JSONL | CSV
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise ValueError(f"{path} holds no file that ends in {', '.join(sorted(TEXT | JSONL | CSV))}")
    return found
