"""Exact and near duplicates in a stream of texts, found in bounded memory.

MinHash and locality-sensitive hashing find the near duplicates (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3). The index is a SQLite file; datasketch's is a dictionary that was measured to take 3.5 KiB a text.
"""

import sqlite3
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHINGLE = 9  # characters, not words: some languages have no blanks between words
# At a similarity of 0.8, 99.8% of pairs agree in a band. At 0.5, 27% do; comparing their signatures then rules them out.
BANDS, ROWS = 20, 6
# Texts of one template share bands with all the others. A band remembers the last text of each slot, and a text is compared
# with those seen texts alone that share the most bands with it, so that a text costs the same however many came before.
SLOTS, CANDIDATES = 16, 32
CACHE = 64  # MiB of the index to keep in memory
FILTER = 1 << 25  # bytes, one of which each band marks, so that only bands that were marked are looked up in the index
BLOCK = 1 << 10  # shingles that are hashed at a time
_factors, _shifts = np.random.default_rng(0).integers(0, 1 << 32, (2, BANDS * ROWS, 1), dtype=np.uint32)
_factors |= np.uint32(1)
_powers = np.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(SHINGLE)], dtype=np.uint64)
_places = np.random.default_rng(1).integers(0, 1 << 64, (BANDS, ROWS), dtype=np.uint64)


def normal_form(text: str) -> str:
    """Return the form in which texts are compared: without differences of case and white space."""
    return " ".join(text.casefold().split())


def signature(form: str) -> np.ndarray:
    """Return the MinHash of a normal form: uint32 (BANDS * ROWS,).

    The share of equal elements of two signatures estimates the Jaccard index of the texts' shingles.
    """
    points = np.frombuffer(form.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if not len(points):
        points = np.zeros(1, dtype=np.uint64)
    shingles = np.convolve(points, _powers[: len(points)], "valid")  # a polynomial in an odd base, mod 2^64
    shingles = (_mixed(shingles) >> np.uint64(32)).astype(np.uint32)
    blocks = (shingles[start : start + BLOCK] for start in range(0, len(shingles), BLOCK))
    return np.min([(block * _factors + _shifts).min(1) for block in blocks], axis=0)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix bits by the finaliser of splitmix64: each bit of a result depends on every bit of the input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Marks(NamedTuple):
    """What a text is compared by: a digest of its normal form, and the signature with the keys of its bands.

    The latter two are None where exact duplicates alone count.
    """

    digest: bytes
    signature: np.ndarray | None = None
    bands: list[int] | None = None


def marks_of(text: str, near: bool = True) -> Marks:
    """Return what a text is compared by; ``near`` says whether near duplicates count."""
    form = normal_form(text)
    digest = blake2b(form.encode(), digest_size=16).digest()
    return Marks(digest, mine := signature(form), band_keys(mine)) if near else Marks(digest)


class Duplicates:
    """The texts seen so far: a context manager, whose index is a new file ``path``.

    Args:
        similarity: texts with at least this Jaccard index of their shingles are near duplicates; above 0.5, or 1 to find exact
            duplicates only.
    """

    def __init__(self, path: Path, similarity: float = 0.8) -> None:
        if not 0.5 < similarity <= 1:
            raise ValueError(f"similarity must be above 0.5 and at most 1; got {similarity}")
        self.similarity = similarity
        self._marked = bytearray(FILTER)
        self._index = sqlite3.connect(path, isolation_level=None)
        self._index.executescript(f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE * 1024};
            CREATE TABLE texts (number INTEGER PRIMARY KEY, owner INTEGER, signature BLOB);
            CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE bands (band INTEGER, slot INTEGER, number INTEGER, PRIMARY KEY (band, slot)) WITHOUT ROWID;
            BEGIN;
        """)

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, *_) -> None:
        self._index.close()

    def add(self, text: str | Marks, owner: int) -> str | None:
        """Add a text, or its marks: return None if it is new, or else what it is, an "exact duplicate" or a "near duplicate".

        Texts of one owner are never near duplicates of each other, as the windows of a document overlap. Of texts that share
        most of their bands with many others, as those of a template do, a near duplicate may be missed.
        """
        marks = marks_of(text) if isinstance(text, str) else text
        if self._index.execute("SELECT 1 FROM digests WHERE digest = ?", [marks.digest]).fetchone():
            return "exact duplicate"
        if self.similarity < 1 and self._near(marks.signature, marks.bands, owner):
            return "near duplicate"
        self._index.execute("INSERT INTO digests VALUES (?)", [marks.digest])
        return None

    def _near(self, mine: np.ndarray, bands: list[int], owner: int) -> bool:
        """Return whether a seen text is a near duplicate of that with this signature; if none is, add this one."""
        known = [band for band in bands if self._marked[band % FILTER]]
        sharing = self._index.execute(f"SELECT number FROM bands WHERE band IN ({', '.join('?' * len(known))})", known)
        candidates = [number for (number,), _ in Counter(sharing).most_common(CANDIDATES)]
        if candidates:
            theirs = self._index.execute(
                f"SELECT signature FROM texts WHERE owner != ? AND number IN ({', '.join('?' * len(candidates))})",
                [owner, *candidates],
            )
            signatures = np.frombuffer(b"".join(found for (found,) in theirs), np.uint32).reshape(-1, len(mine))
            if (np.mean(signatures == mine, axis=1) >= self.similarity).any():
                return True
        number = self._index.execute("INSERT INTO texts (owner, signature) VALUES (?, ?)", [owner, mine.tobytes()]).lastrowid
        slot = owner % SLOTS  # the windows of a document take one slot
        self._index.executemany("INSERT OR REPLACE INTO bands VALUES (?, ?, ?)", [(band, slot, number) for band in bands])
        for band in bands:
            self._marked[band % FILTER] = 1
        return False


def band_keys(mine: np.ndarray) -> list[int]:
    """Return a key for each band of a signature: a hash of the band and its place."""
    return _mixed((mine.reshape(BANDS, ROWS) * _places).sum(1)).astype(np.int64).tolist()
