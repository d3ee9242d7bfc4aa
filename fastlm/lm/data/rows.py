"""Rows with named fields, as a stream: JSONL, JSON, CSV and Parquet. Malformed rows are counted."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from .lines import MAX_LINE, Lines, check_file, reading, suffix_of
from .problems import Problems

JSONL, JSON, CSV, PARQUET = {".jsonl", ".ndjson"}, {".json"}, {".csv", ".tsv"}, {".parquet"}
CHUNK = 1 << 20  # characters of a JSON array to read at a time
_BETWEEN = re.compile(r"[\s,]*")

Row = tuple[int, dict[str, str]]  # (line, or for Parquet the row's number; {field: text})


def rows(
    path: Path, fields: Sequence[str], problems: Problems, *, optional: Sequence[str] = (), encoding: str = "utf-8"
) -> Iterator[Row]:
    """Yield (line number, {field: text}) for each row of a file; malformed rows go to ``problems``.

    Args:
        path: a .jsonl or .ndjson file has an object in each line; a .json file has that, or one array of objects; a .csv file,
            or a .tsv file with tabs, begins with a header. These may be gzipped. A .parquet file has columns, and its rows are
            counted instead of lines.
        fields: the fields that each row must have. Those of ``optional`` are given where a row has them.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.lines.check_file`; a file with columns lacks one of ``fields``; a
            .json file is neither; pyarrow, which reads Parquet, is not installed.
    """
    kind = suffix_of(path)
    if kind in PARQUET:
        yield from _parquet(path, fields, problems, optional)
        return
    check_file(path, encoding)
    read = _json if kind in JSON else _jsonl if kind in JSONL else _csv
    yield from read(Lines(path, encoding, problems), fields, optional)


def _checked(value: object, line: int, lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """Yield the fields of a JSON value, or count it as malformed."""
    if not isinstance(value, dict):
        lines.malformed("expected an object", detail=f"; got {type(value).__name__}", line=line)
    elif bad := [name for name in fields if not isinstance(value.get(name), str)]:
        got = json.dumps(value.get(bad[0]), default=str)[:40]
        lines.malformed(f"the field {bad[0]!r} must be a text", detail=f"; got {got}", line=line)
    else:
        more = {name: str(value[name]) for name in optional if value.get(name) is not None}
        yield line, {name: value[name] for name in fields} | more


def _jsonl(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            lines.malformed("not JSON", detail=f": {error}")
            continue
        yield from _checked(value, lines.number, lines, fields, optional)


def _json(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    first = next((line for line in lines if line.strip()), "")
    lines.number = 0
    if first.lstrip().startswith("["):
        yield from _array(lines, fields, optional)
        return
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        raise ValueError(f"{lines.path} is neither an array of objects nor has an object in each line") from None
    yield from _jsonl(lines, fields, optional)


def _array(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of an array of objects, of which CHUNK characters and one object are in memory at a time."""
    decoder, place, line = json.JSONDecoder(), 0, 1
    with reading(lines.path) as raw, io.TextIOWrapper(raw, lines.encoding, errors="replace") as file:
        text = file.read(CHUNK)
        text, more = text[text.index("[") + 1 :], True
        while True:
            between = _BETWEEN.match(text, place)
            line, place = line + text.count("\n", place, between.end()), between.end()
            if text.startswith("]", place):
                return
            try:
                value, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                end, reason = len(text), getattr(error, "msg", str(error))
                if more and len(text) - place < MAX_LINE:
                    read = file.read(CHUNK)
                    text, place, more = text[place:] + read, 0, bool(read)
                    continue
                lines.malformed("not JSON, so that the rest of the array is not read", detail=f": {reason}", line=line)
                return
            yield from _checked(value, line, lines, fields, optional)
            line, place = line + text.count("\n", place, end), end


def _csv(lines: Lines, fields: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    source, header = _Resumable(lines), None
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    reader = csv.reader(source, delimiter="\t" if suffix_of(lines.path) == ".tsv" else ",", strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            several = ", where a quote opens that is not closed as it should be" if len(source.row) > 1 else ""
            lines.malformed("not CSV", detail=f"{several}: {error}", line=source.first)
            source.go_back()
            continue
        first = source.first
        source.row.clear()
        if header is None:
            header = row
            if missing := [name for name in fields if name not in header]:
                raise ValueError(f"{lines.path} has no column {missing[0]!r}; its header is {', '.join(header)[:200]}")
        elif row and len(row) != len(header):
            lines.malformed(f"expected {len(header)} fields, as in the header", detail=f"; got {len(row)}", line=first)
        elif row:
            values = dict(zip(header, row))
            yield first, {name: values[name] for name in [*fields, *optional] if name in values}


class _Resumable:
    """The lines of a CSV file, with their ends, of which those after the first of a row can be read again.

    A row may span several lines. A quote that is never closed would make one row of all that follow.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines, self.source = lines, iter(lines)
        self.row, self.again = [], deque()  # both of (number, line)

    def __iter__(self) -> "_Resumable":
        return self

    def __next__(self) -> str:
        if self.again:
            self.row.append(self.again.popleft())
        else:
            line = next(self.source)
            self.row.append((self.lines.number, line + "\n"))
        return self.row[-1][1]

    @property
    def first(self) -> int:
        """Return the number of the row's first line."""
        return self.row[0][0]

    def go_back(self) -> None:
        """Make the line after the row's first the next one."""
        self.again.extendleft(reversed(self.row[1:]))
        self.row.clear()


def _parquet(path: Path, fields: Sequence[str], problems: Problems, optional: Sequence[str]) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} needs pyarrow to be read: pip install 'fastlm[parquet]'") from None
    lines, number = Lines(path, "utf-8", problems), 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in fields if name not in names]:
                raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(names)[:200]}")
            for batch in file.iter_batches(1024, columns=[name for name in [*fields, *optional] if name in names]):
                for value in batch.to_pylist():
                    number += 1
                    yield from _checked(value, number, lines, fields, optional)
    except ArrowException as error:
        raise ValueError(f"{path} is no Parquet file, or damaged: {error}") from None
