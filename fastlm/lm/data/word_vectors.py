"""Embeddings from files of pre-trained word vectors: word2vec's text and binary formats, and GloVe's text format.

gensim (4.4) reads these files too. It was tried, and it repeats the number of a line that was cut short, accepts NaN, names no
lines, and allocates as much memory as a wrong header claims. This reader holds one vector at a time.
"""

import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from gzip import GzipFile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .lines import likely_encoding, reading

MAX_WIDTH = 1 << 14
MAX_WORD = 1 << 12  # bytes
_MAX_LINE = MAX_WORD + 32 * MAX_WIDTH


def read_vectors(path: str | os.PathLike, *, binary: bool | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (word, float32 (width,)) for each vector of a word2vec file (text or binary) or a GloVe file (text, no header).

    The file may be gzipped, and begin with a byte order mark.

    Args:
        binary: whether the file is binary; None detects it by the file's beginning.

    Raises:
        FileNotFoundError, ValueError: the file is missing, empty, cut short or malformed; a number is not finite; there are not
            as many numbers as the first line says; a word is not UTF-8. The message names the file, and the line or the vector.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of word vectors")
    with reading(path) as file:
        start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(start)
        first = file.readline(_MAX_LINE)
        header = re.fullmatch(rb"\s*(\d{1,12})\s+(\d{1,6})\s*", first)
        if header:
            count, width = map(int, header.groups())
            if not (count and 1 <= width <= MAX_WIDTH):
                raise ValueError(f"{path}: a header of {count} vectors of {width} numbers; expected 1 to {MAX_WIDTH} numbers")
        else:
            count, width = None, len(_fields(first)) - 1
            file.seek(start)
        if binary is None:
            binary = header is not None and not _starts_as_text(file)
        if binary and not header:
            raise ValueError(f"{path} is no binary word2vec file, whose first line gives the number of vectors and their width")
        yield from _binary(file, path, count, width) if binary else _text(file, path, count, width)


def _fields(line: bytes) -> list[bytes]:
    return line.rstrip(b" \t\r\n").replace(b"\t", b" ").split(b" ")


def _starts_as_text(file: BinaryIO) -> bool:
    """Return whether the next line is text: its second field is a number, or all of its characters are printable."""
    here = file.tell()
    line = file.readline(_MAX_LINE)
    file.seek(here)
    fields = _fields(line)
    if len(fields) > 1 and _is_number(fields[1]):
        return True
    try:
        return all(letter.isprintable() for letter in line.decode().strip())
    except UnicodeDecodeError:
        return False


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _text(file: BinaryIO, path: Path, count: int | None, width: int) -> Iterator[tuple[str, np.ndarray]]:
    number, found = 0 if count is None else 1, 0
    while line := file.readline(_MAX_LINE):
        number += 1
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if found == count:
            raise ValueError(f"{where}: the header says {count} vectors, and more follow")
        fields = _fields(line)
        # Some words of GloVe contain blanks, such as ". . .". A number before the last `width` fields means a wider vector.
        numbers = fields[-width:] if len(fields) > width else []
        word = fields[: len(fields) - width]
        if width < 1 or not numbers or (len(word) > 1 and _is_number(word[-1])):
            raise ValueError(f"{where}: expected a word and {max(width, 1)} numbers; got {len(fields) - 1} after the word")
        try:
            vector = np.array(list(map(float, numbers)), dtype=np.float32)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found += 1
        yield _word(b" ".join(word), where), _finite(vector, where)
    if not found or (count is not None and found < count):
        raise ValueError(f"{path} is cut short or empty: {found} vectors, and the header says {count or 'nothing'}")


def _binary(file: BinaryIO, path: Path, count: int, width: int) -> Iterator[tuple[str, np.ndarray]]:
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not isinstance(file, GzipFile) and left < count * (
        4 * width + 2
    ):  # a word has at least one byte, and a blank follows it
        raise ValueError(f"{path} is cut short: its header says {count} vectors of {width} numbers, and {left} bytes follow")
    for number in range(1, count + 1):
        where = f"{path}, vector {number} of {count}"
        word = bytearray()
        while (byte := file.read(1)) != b" ":
            if not byte:
                raise ValueError(f"{where}: the file is cut short")
            word += byte
            if len(word) > MAX_WORD:
                raise ValueError(f"{where}: no word ends within {MAX_WORD} bytes; is the header's width of {width} right?")
        raw = file.read(4 * width)
        if len(raw) < 4 * width:
            raise ValueError(f"{where}: the file is cut short")
        yield _word(bytes(word).lstrip(b"\n"), where), _finite(np.frombuffer(raw, dtype="<f4"), where)
    if rest := file.read(MAX_WORD).strip():
        raise ValueError(f"{path}: the header says {count} vectors, and more follow ({len(rest)} bytes at least)")


def _word(raw: bytes, where: str) -> str:
    try:
        word = raw.decode()
    except UnicodeDecodeError:
        way_out = f"convert the file to UTF-8: iconv -f {likely_encoding(raw)} -t utf-8"
        raise ValueError(f"{where}: the word {raw[:20]!r} is not UTF-8; {way_out}") from None
    if not word:
        raise ValueError(f"{where}: the word is missing")
    return word


def _finite(vector: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(vector).all():
        raise ValueError(f"{where}: a number is not finite")
    return vector


class PretrainedEmbedding(NamedTuple):
    """An embedding, and the number of words of the vocabulary that have a vector in the file."""

    embedding: nn.Embedding
    found: int


def embedding_from_vectors(
    path: str | os.PathLike,
    vocabulary: Mapping[str, int],
    *,
    width: int | None = None,
    freeze: bool = False,
    padding: str | None = None,
    seed: int = 0,
    binary: bool | None = None,
) -> PretrainedEmbedding:
    """Make an embedding (len(vocabulary), width) with the vectors that a file has for the words: see `read_vectors`.

    A word takes the vector of its own spelling, or else of its lower case. The vectors of the other words are drawn from a
    normal distribution with the mean and the standard deviation that the found vectors have in each dimension.

    Args:
        vocabulary: token -> id, where the ids count from 0 without gaps, such as ``tokenizer.get_vocab()``.
        width: the width that the model needs; None takes the file's.
        freeze: whether training leaves the vectors as they are.
        padding: a token whose vector is zeros and stays so.

    Raises:
        FileNotFoundError, ValueError: as `read_vectors`; the file has another width, or a vector for none of the words.
    """
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or not vocabulary:
        raise ValueError("vocabulary must give each token an id, from 0 without gaps")
    if padding is not None and padding not in vocabulary:
        raise ValueError(f"padding must be a token of the vocabulary; got {padding!r}")
    rows = _rows_for(path, vocabulary, width, binary)
    known = torch.from_numpy(np.stack(list(rows.values())))  # (found, width)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(vocabulary), known.shape[1], generator=generator)
    matrix = known.mean(0) + known.std(0, correction=0) * noise
    matrix[torch.tensor(list(rows))] = known
    padding_idx = None if padding is None else vocabulary[padding]
    if padding_idx is not None:
        matrix[padding_idx] = 0
    return PretrainedEmbedding(nn.Embedding.from_pretrained(matrix, freeze=freeze, padding_idx=padding_idx), len(rows))


def _rows_for(path: str | os.PathLike, vocabulary: Mapping[str, int], width: int | None, binary: bool | None) -> dict:
    """Return id -> vector: the first in the file of the word's own spelling, or else of its lower case."""
    lowered: dict[str, list[int]] = {}
    for word, number in vocabulary.items():
        if word.lower() != word:
            lowered.setdefault(word.lower(), []).append(number)
    exact, by_case, checked = {}, {}, False
    for word, vector in read_vectors(path, binary=binary):
        if not checked and width not in (None, len(vector)):
            raise ValueError(f"width is {width}, and the vectors of {path} have {len(vector)} numbers")
        checked = True
        if word in vocabulary:
            exact.setdefault(vocabulary[word], vector)
        for number in lowered.get(word, ()):
            by_case.setdefault(number, vector)
    if not exact and not by_case:
        raise ValueError(f"{path} has a vector for none of the {len(vocabulary)} tokens of the vocabulary")
    return by_case | exact


def neighbours(embedding: Tensor, vocabulary: Mapping[str, int], word: str, count: int = 10) -> list[tuple[str, float]]:
    """Return the ``count`` tokens nearest to ``word`` by the cosine of their vectors, nearest first, without ``word`` itself.

    Args:
        embedding: (len(vocabulary), width), such as ``model.get_input_embeddings().weight``.

    Raises:
        ValueError: ``word`` is no token of the vocabulary; the embedding has another number of rows.
    """
    if word not in vocabulary:
        raise ValueError(f"word must be a token of the vocabulary; got {word!r}")
    if embedding.dim() != 2 or len(embedding) != len(vocabulary):
        raise ValueError(f"embedding must be ({len(vocabulary)}, width), a row a token; got {tuple(embedding.shape)}")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    unit = nn.functional.normalize(embedding.detach().float(), dim=-1)
    cosine = unit @ unit[vocabulary[word]]  # (tokens,)
    cosine[vocabulary[word]] = -torch.inf
    best = cosine.topk(min(count, len(vocabulary) - 1))
    tokens = {number: token for token, number in vocabulary.items()}
    return [(tokens[number], value) for number, value in zip(best.indices.tolist(), best.values.tolist())]
