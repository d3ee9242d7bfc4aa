"""Exact and near duplicates in a stream of texts, found in bounded memory.

MinHash and locality-sensitive hashing find the near duplicates (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3). The index is a SQLite file; datasketch's is a dictionary that was measured to take 3.5 KiB a text.
"""

import sqlite3
from hashlib import blake2b
from pathlib import Path

import numpy as np

SHINGLE = 9  # characters, not words: some languages have no blanks between words
# At a similarity of 0.8, 99.8% of pairs agree in a band. At 0.5, 27% do; comparing their signatures then rules them out.
BANDS, ROWS = 20, 6
CACHE = 16  # MiB of the index to keep in memory
_factors, _shifts = np.random.default_rng(0).integers(0, 1 << 64, (2, BANDS * ROWS), dtype=np.uint64)
_factors |= np.uint64(1)


def normal_form(text: str) -> str:
    """Return the form in which texts are compared: without differences of case and white space."""
    return " ".join(text.casefold().split())


def signature(form: str) -> np.ndarray:
    """Return the MinHash of a normal form: uint32 (BANDS * ROWS,).

    The share of equal elements of two signatures estimates the Jaccard index of the texts' shingles.
    """
    points = np.frombuffer(form.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    shingles = np.zeros(max(len(points) - SHINGLE + 1, 1), dtype=np.uint64)
    for offset in range(min(SHINGLE, len(points))):  # a shingle's hash is a polynomial in an odd base, mod 2^64
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + len(shingles)]
    shingles = _mixed(np.unique(shingles))
    minima = [(shingles * factor + shift).min() for factor, shift in zip(_factors, _shifts)]
    return (np.array(minima, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix bits by the finaliser of splitmix64: each bit of a result depends on every bit of the input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
        self._index = sqlite3.connect(path, isolation_level=None)
        self._index.executescript(f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{CACHE * 1024};
            CREATE TABLE texts (number INTEGER PRIMARY KEY, owner INTEGER, signature BLOB);
            CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE bands (band INTEGER, number INTEGER, PRIMARY KEY (band, number)) WITHOUT ROWID;
            BEGIN;
        """)

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, *_) -> None:
        self._index.close()

    def add(self, text: str, owner: int) -> str | None:
        """Add a text: return None if it is new, or else what it is, an "exact duplicate" or a "near duplicate".

        Texts of one owner are never near duplicates of each other, as the windows of a document overlap.
        """
        form = normal_form(text)
        digest = blake2b(form.encode(), digest_size=16).digest()
        if self._index.execute("SELECT 1 FROM digests WHERE digest = ?", [digest]).fetchone():
            return "exact duplicate"
        if self.similarity < 1 and self._near(form, owner):
            return "near duplicate"
        self._index.execute("INSERT INTO digests VALUES (?)", [digest])
        return None

    def _near(self, form: str, owner: int) -> bool:
        """Return whether a seen text is a near duplicate; if none is, add this one."""
        mine = signature(form)
        bands = [_band_key(index, band) for index, band in enumerate(mine.reshape(BANDS, ROWS))]
        compared = set()
        for band in bands:
            for number, owned_by, theirs in self._index.execute(
                "SELECT number, owner, signature FROM bands JOIN texts USING (number) WHERE band = ?", [band]
            ):
                if owned_by == owner or number in compared:
                    continue
                compared.add(number)
                if np.mean(mine == np.frombuffer(theirs, dtype=np.uint32)) >= self.similarity:
                    return True
        number = self._index.execute("INSERT INTO texts (owner, signature) VALUES (?, ?)", [owner, mine.tobytes()]).lastrowid
        self._index.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(band, number) for band in bands])
        return False


def _band_key(index: int, band: np.ndarray) -> int:
    digest = blake2b(band.tobytes(), digest_size=8, salt=index.to_bytes(2, "little")).digest()
    return int.from_bytes(digest, "little", signed=True)
