"""The decoded lines of text files, plain or gzipped, in bounded memory, and checks of a file before it is read."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .problems import Problems

HEAD = 1 << 16  # bytes at the beginning by which `check_file` judges a file
MAX_LINE = 1 << 22  # bytes; a longer line of JSONL and CSV is a malformed row
MAX_DOCUMENT = 1 << 20  # characters; a longer document of a text file is split, at the end of a line or else at a blank
_GZIP = b"\x1f\x8b\x08"
_CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked if it is gzipped; raise a ValueError that names it if that is damaged."""
    with open(path, "rb") as file:
        packed = path.suffix.lower() == ".gz" or file.read(len(_GZIP)) == _GZIP
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case; of a gzipped file, the one before .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


class Lines:
    """The decoded lines of a file, without their ends. ``number`` is the number of the last line given, counted from 1.

    A line that cannot be decoded, or that has more than MAX_LINE bytes, goes to ``problems``.

    Args:
        cut: give a line of more than MAX_DOCUMENT bytes in pieces, cut at blanks; ``goes_on`` says whether another follows.
    """

    def __init__(self, path: Path, encoding: str, problems: Problems, *, cut: bool = False) -> None:
        self.path, self.encoding, self.problems, self.cut = path, encoding, problems, cut
        self.number, self.goes_on = 0, False

    def __iter__(self) -> Iterator[str]:
        longest = MAX_DOCUMENT if self.cut else MAX_LINE
        with reading(self.path) as file:
            while raw := file.readline(longest):
                self.number += 1
                if len(raw) < longest or raw.endswith(b"\n"):
                    lines = self._decoded(raw)
                elif self.cut:
                    lines = self._pieces(file, raw)
                else:
                    lines = self._skipped(file, raw)
                for line in lines:
                    yield line.removeprefix("\ufeff") if self.number == 1 else line

    def _decoded(self, raw: bytes) -> Iterator[str]:
        try:
            yield raw.decode(self.encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            self._undecodable(error)

    def _pieces(self, file: BinaryIO, raw: bytes) -> Iterator[str]:
        decoder, held, self.goes_on = codecs.getincrementaldecoder(self.encoding)(), "", True
        while raw and not raw.endswith(b"\n"):
            try:
                held += decoder.decode(raw)
            except UnicodeDecodeError as error:  # costs this piece
                self._undecodable(error)
                decoder.reset()
            end = held.rfind(" ") + 1 or len(held)
            yield held[:end]
            held, raw = held[end:], file.readline(MAX_DOCUMENT)
        self.goes_on = False
        try:
            yield held + decoder.decode(raw, final=True).rstrip("\r\n")
        except UnicodeDecodeError as error:
            self._undecodable(error)

    def _skipped(self, file: BinaryIO, raw: bytes) -> tuple[()]:
        self.malformed(f"the line is longer than {MAX_LINE} bytes")
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE)
        return ()

    def _undecodable(self, error: UnicodeDecodeError) -> None:
        detail = f": byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        self.malformed(f"not {self.encoding}", detail=detail)

    def malformed(self, reason: str, *, detail: str = "", line: int | None = None) -> None:
        """Count a row that begins in a line, by default in the last one."""
        self.problems.add(self.path, reason, line=line or self.number, detail=detail)


def check_encoding(encoding: str) -> None:
    """Raise a ValueError unless ``encoding`` is known and decodes ASCII as ASCII does (UTF-16 does not)."""
    try:
        ascii_like = b"a\n".decode(encoding) == "a\n"
    except UnicodeError:
        ascii_like = False
    except LookupError:
        raise ValueError(f"encoding must be the name of a text encoding, such as utf-8 or latin-1; got {encoding!r}") from None
    if not ascii_like:
        raise ValueError(f"encoding must hold ASCII as it is; convert files of {encoding!r} to UTF-8")


def check_file(path: Path, encoding: str) -> None:
    """Raise an error that names the file if it is missing, empty or binary, or if its beginning is of another encoding."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with reading(path) as file:
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
        byte, likely = f"byte 0x{error.object[error.start]:02x} at offset {error.start}", likely_encoding(head)
        way_out = f"name its encoding, such as --encoding {likely}, or convert it: iconv -f {likely} -t utf-8"
        raise ValueError(f"{path} is not {encoding} text: {byte}; {way_out}") from None


def likely_encoding(head: bytes) -> str:
    """Guess the encoding of the beginning of a text that is not UTF-8: gb18030 if that makes Chinese of it, or else latin-1."""
    try:
        odd = [character for character in codecs.getincrementaldecoder("gb18030")().decode(head) if not character.isascii()]
    except UnicodeDecodeError:
        return "latin-1"
    return "gb18030" if len(_CHINESE.findall("".join(odd))) > 0.9 * len(odd) else "latin-1"
