"""Describe one layer's attention, and count the scores that each part of its queries sees."""

from collections.abc import Iterable
from dataclasses import dataclass

# Floating-point operations for each score, divided by head_dim: 2 for each product that a pass computes.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10

Rows = tuple[int, int]  # from the first row to before the second


@dataclass(frozen=True)
class Layer:
    """One call of attention over a whole sequence, as one process would make it. Queries and keys are as many."""

    sequence: int
    query_heads: int
    key_heads: int
    head_dim: int
    batch: int = 1
    itemsize: int = 2  # bytes of a number: 2 in bfloat16, 4 in float32
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)  # keys to the left and to the right of the diagonal

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Return how many keys a query sees to its left and to its right, and None where these are all."""
        left, right = self.window[0], 0 if self.causal else self.window[1]
        return tuple(None if keys is None or keys >= self.sequence - 1 else keys for keys in (left, right))

    def row_bytes(self, heads: int) -> int:
        """Return the bytes of one row of so many heads, of all examples of the batch."""
        return self.batch * heads * self.head_dim * self.itemsize

    def flops(self, scores: int, heads: int, backward: bool) -> int:
        """Return the operations of a pass over so many scores of each of so many heads."""
        return (BACKWARD_FLOPS if backward else FORWARD_FLOPS) * self.head_dim * scores * heads * self.batch

    def scores(self, queries: Rows, keys: Rows) -> int:
        """Count the pairs (i, j) of these rows in which query i sees key j."""
        left, right = self.reach
        seen = _pairs_up_to(queries, keys, self.sequence if right is None else right)
        return seen - (0 if left is None else _pairs_up_to(queries, keys, -left - 1))


def parts(sequence: int, number: int) -> list[Rows]:
    """Cut the rows of a sequence into contiguous parts, as even as can be."""
    return [(part * sequence // number, (part + 1) * sequence // number) for part in range(number)]


def length(rows: Iterable[Rows]) -> int:
    return sum(stop - start for start, stop in rows)


def _pairs_up_to(queries: Rows, keys: Rows, offset: int) -> int:
    """Count the pairs (i, j) with j <= i + offset."""
    (first, last), (start, stop) = queries, keys

    def pairs_from(begin: int) -> int:
        """Count them as if no key ended the range behind ``begin``: sum max(0, i + offset + 1 - begin) over the queries."""
        return _triangle(last + offset - begin) - _triangle(first + offset - begin)

    return pairs_from(start) - pairs_from(stop)


def _triangle(n: int) -> int:
    """Return 1 + 2 + ... + n, and 0 where n is negative."""
    return n * (n + 1) // 2 if n > 0 else 0
