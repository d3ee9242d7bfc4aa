"""Reading text from files as a stream: plain text, JSONL and CSV, in bounded memory, with what is malformed counted."""

import codecs
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SHOWN = 5  # problems that are kept to be shown
HEAD = 1 << 16  # bytes by which a file is judged before anything is read
MAX_LINE = 1 << 22  # bytes of a line; a longer one is a malformed row
MAX_DOCUMENT = 1 << 20  # characters at which a document of a text file is ended, at a line
TEXT, JSONL, CSV = {".txt", ".text", ".md", ".rst"}, {".jsonl", ".ndjson"}, {".csv", ".tsv"}
UNITS = ("paragraph", "line", "file")


class Document(NamedTuple):
    """One text with its label, if it has one, and where it came from: ``path:line``, or a module of Python's."""

    text: str
    label: str | None
    origin: str


@dataclass
class Problems:
    """What could not be read: how much, and the first five."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.first.append(f"{where}: {reason}")


class Lines:
    """The lines of a file, decoded, without their ends; ``number`` is that of the line last given, from 1.

    A line that cannot be decoded, or of more than MAX_LINE bytes, goes to ``problems``.
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
    """Raise a ValueError unless ``encoding`` is known and its lines end as ASCII's do (UTF-16's do not)."""
    try:
        ascii_like = "a\n".encode(encoding) == b"a\n"
    except (LookupError, UnicodeError):
        raise ValueError(f"encoding must be the name of a text encoding, such as utf-8 or latin-1; got {encoding!r}") from None
    if not ascii_like:
        raise ValueError(f"encoding must hold ASCII as it is; convert files of {encoding!r} to UTF-8")


def check_file(path: Path, encoding: str) -> None:
    """Raise an error that names the file if it is missing, empty, binary, or by its beginning of another encoding."""
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
    """(line number, {field: text}) for each row of a JSONL or CSV file; malformed rows go to ``problems``.

    Args:
        path: .jsonl or .ndjson: an object a line; .csv, or .tsv with tabs: a header line first.
        fields: the fields that each row must have; ``optional`` ones are given where they are there.

    Raises:
        ValueError: the header of a CSV file lacks one of ``fields``; `check_file`'s.
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
    # csv takes a row that goes over several lines from lines that keep their ends
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
    """(first line's number, text) for each document of a text file: ``unit`` says what ends one."""
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
    """Every document of the files and folders, in a stream; those of blanks only are left out.

    Args:
        paths: files, or folders, of which every text, JSONL and CSV file is read, in the order of their names, hidden ones
            excepted. A file of another suffix is read as text if it is named itself.
        problems: takes the malformed rows, and the files of a folder that cannot be read.
        unit: what is one document of a text file: a "paragraph" (up to a blank line), a "line" or the whole "file". One of
            more than MAX_DOCUMENT characters is given in several.
        text_field, label_field: the names in JSONL and CSV files. A row need not have a label.

    Raises:
        FileNotFoundError, ValueError: a file that was named is missing, empty, binary or of another encoding.
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
