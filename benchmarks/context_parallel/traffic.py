"""Count the bytes and operations of each rank, for both methods of context parallelism. Rank r of n holds part r of the rows.

- *All-to-all*: ranks exchange rows for heads, attend over all rows of their heads, and exchange back.
- *Ring*: keys and values travel to the ranks that see them; balanced causal work moves rows first (zigzag).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from context_parallel.layer import Layer, Rows, length, parts


class Traffic(NamedTuple):
    """Bytes that one rank sends and receives."""

    sent: int
    received: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.received + other.received)

    def reverse(self) -> "Traffic":
        return Traffic(self.received, self.sent)


NOTHING = Traffic(0, 0)
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class AllToAll:
    """All-to-all over ``ranks``: the heads are divided as evenly as can be, and ranks share a key head where there are fewer.

    Raises:
        ValueError: there are fewer query heads than ranks.
    """

    layer: Layer
    ranks: int

    def __post_init__(self):
        if self.layer.query_heads < self.ranks:
            raise ValueError(
                f"all-to-all needs a query head for each rank; got {self.layer.query_heads} for {self.ranks} ranks"
            )

    @cached_property
    def key_heads(self) -> list[int]:
        """Return the number of key heads of each rank, which is 1 where ranks share them."""
        return [max(1, length([heads])) for heads in parts(self.layer.key_heads, self.ranks)]

    @cached_property
    def query_heads(self) -> list[int]:
        """Return the number of query heads of each rank: whole groups, or a part of the group of its key head."""
        layer, group = self.layer, self.layer.query_heads // self.layer.key_heads
        if layer.key_heads >= self.ranks:
            return [heads * group for heads in self.key_heads]
        sharing = [length([ranks]) for ranks in parts(self.ranks, layer.key_heads)]
        return [length([heads]) for number in sharing for heads in parts(group, number)]

    def rows_for_heads(self, rank: int, heads: list[int]) -> Traffic:
        """Return what a rank sends of its rows to the others' heads, and receives of theirs for its own."""
        first, last = parts(self.layer.sequence, self.ranks)[rank]
        own, row_bytes = last - first, self.layer.row_bytes
        sent, received = own * row_bytes(sum(heads) - heads[rank]), (self.layer.sequence - own) * row_bytes(heads[rank])
        return Traffic(sent, received)

    def before(self, rank: int, backward: bool) -> Traffic:
        """Return the exchange before the computation: of q, k and v; in the backward of grad_out."""
        query = self.rows_for_heads(rank, self.query_heads)
        key = self.rows_for_heads(rank, self.key_heads)
        return query if backward else query + key + key

    def after(self, rank: int, backward: bool) -> Traffic:
        """Return the exchange behind it, the other way round: of out; in the backward of dq, dk and dv."""
        return self.before(rank, not backward).reverse()

    def messages(self, backward: bool) -> tuple[int, int]:
        """Return the number of exchanges before and behind the computation: each tensor has one."""
        return (1, 3) if backward else (3, 1)

    def traffic(self, rank: int, backward: bool) -> Traffic:
        return self.before(rank, backward) + self.after(rank, backward)

    def flops(self, rank: int, backward: bool) -> int:
        every = (0, self.layer.sequence)
        return self.layer.flops(self.layer.scores(every, every), self.query_heads[rank], backward)

    def memory(self, rank: int) -> int:
        """Return the bytes of the tensors that a rank holds at most in a forward and backward, at the end of the computation.

        Of its rows it has q, k, v, out and grad_out; of its heads these too, and dq, dk, dv and the float32 log-sum-exps.
        """
        layer, (first, last) = self.layer, parts(self.layer.sequence, self.ranks)[rank]
        of_rows = (last - first) * (3 * layer.row_bytes(layer.query_heads) + 2 * layer.row_bytes(layer.key_heads))
        of_heads = 4 * layer.row_bytes(self.query_heads[rank]) + 4 * layer.row_bytes(self.key_heads[rank])
        return of_rows + layer.sequence * (of_heads + FLOAT32 * layer.batch * self.query_heads[rank])


@dataclass(frozen=True)
class Ring:
    """The ring over ``ranks``. In step s rank r computes with the keys of rank r - s, where its queries see any of them."""

    layer: Layer
    ranks: int

    @cached_property
    def balanced(self) -> bool:
        """Say whether rows move first: where keys end on the right, unless a window is narrower than a quarter of all."""
        left, right = self.layer.reach
        narrow = left is not None and right is not None and left + right <= self.layer.sequence // 4
        return self.ranks > 1 and right is not None and not narrow

    @cached_property
    def rows(self) -> list[list[Rows]]:
        """Return the rows that each rank computes with: its own, or where balanced pieces r and 2n - 1 - r of 2n."""
        if not self.balanced:
            return [[rows] for rows in parts(self.layer.sequence, self.ranks)]
        pieces = parts(self.layer.sequence, 2 * self.ranks)
        return [[pieces[rank], pieces[-1 - rank]] for rank in range(self.ranks)]

    @cached_property
    def scores(self) -> list[list[int]]:
        """Count the scores of each rank's queries with each rank's keys."""
        return [[sum(self._scores(own, keys) for keys in other) for other in self.rows] for own in self.rows]

    def _scores(self, own: list[Rows], keys: Rows) -> int:
        return sum(self.layer.scores(rows, keys) for rows in own)

    def key_bytes(self, owner: int, rank: int) -> int:
        """Return the bytes of the pieces of a rank's keys and values that another sees; its partial dk and dv have as many."""
        seen = [keys for keys in self.rows[owner] if self._scores(self.rows[rank], keys)]
        return 2 * length(seen) * self.layer.row_bytes(self.layer.key_heads)

    def moved_rows(self, rank: int) -> Traffic:
        """Return how many rows go from a rank to where they are computed, and come to it."""
        own = parts(self.layer.sequence, self.ranks)[rank]
        stay = sum(_overlap(rows, own) for rows in self.rows[rank])
        return Traffic(length([own]) - stay, length(self.rows[rank]) - stay)

    def before(self, rank: int, backward: bool) -> Traffic:
        """Return the exchange before the computation: of q, k and v; in the backward of grad_out."""
        layer = self.layer
        row_bytes = layer.row_bytes(layer.query_heads) + (0 if backward else 2 * layer.row_bytes(layer.key_heads))
        return Traffic(*(rows * row_bytes for rows in self.moved_rows(rank)))

    def after(self, rank: int, backward: bool) -> Traffic:
        """Return the exchange behind it: of out and its float32 log-sum-exps; in the backward of dq, dk and dv."""
        layer = self.layer
        more = 2 * layer.row_bytes(layer.key_heads) if backward else FLOAT32 * layer.batch * layer.query_heads
        row_bytes = layer.row_bytes(layer.query_heads) + more
        return Traffic(*(rows * row_bytes for rows in self.moved_rows(rank).reverse()))

    def messages(self, backward: bool) -> tuple[int, int]:
        """Return the number of exchanges before and behind the computation: each tensor has one."""
        return (0, 0) if not self.balanced else (1, 3) if backward else (3, 2)

    def circulated(self, rank: int) -> Traffic:
        """Return a rank's keys and values to those who see them, and those of others to it."""
        others = [other for other in range(self.ranks) if other != rank]
        sent = sum(self.key_bytes(rank, other) for other in others)
        return Traffic(sent, sum(self.key_bytes(other, rank) for other in others))

    def traffic(self, rank: int, backward: bool) -> Traffic:
        """Return all that a rank sends and receives in a pass: the exchanges, keys and values, and back their gradients."""
        keys = self.circulated(rank)
        moved = self.before(rank, backward) + self.after(rank, backward) + keys
        return moved + keys.reverse() if backward else moved

    def flops(self, rank: int, backward: bool) -> int:
        return sum(self.step_flops(rank, step, backward) for step in range(self.ranks))

    def step_flops(self, rank: int, step: int, backward: bool) -> int:
        return self.layer.flops(self.scores[rank][(rank - step) % self.ranks], self.layer.query_heads, backward)

    def memory(self, rank: int) -> int:
        """Return the bytes of the tensors that a rank holds at most in a forward and backward, in a late step of the backward.

        Of its rows it has q, k, v, out and grad_out, where balanced also those of the rows that it computes; of these dq, the
        log-sum-exps and two statistics in float32. Of keys it has float32 sums of its own dk and dv and of the step's, and the
        kernel's own; the keys and values of the step and the next one; and the dk and dv of the step before, on their way from
        here and to here.
        """
        layer, pieces = self.layer, len(self.rows[rank])
        query, pair = layer.row_bytes(layer.query_heads), 2 * layer.row_bytes(layer.key_heads)
        own = (3 * query + pair) * (2 if self.balanced else 1)
        kernel = query // pieces + pair // pieces
        travelling = min(2, self.ranks - 1) * pair + (2 * pair if self.ranks > 2 else 0)
        single = layer.batch * (layer.query_heads * (layer.head_dim + 3) + 4 * layer.key_heads * layer.head_dim)
        return length(self.rows[rank]) * (own + kernel + travelling + FLOAT32 * single)


METHODS = {"all-to-all": AllToAll, "ring": Ring}


def one_process_memory(layer: Layer) -> int:
    """Return the bytes of q, k, v, out, their gradients and the float32 log-sum-exps, which one process holds."""
    of_row = 4 * layer.row_bytes(layer.query_heads) + 4 * layer.row_bytes(layer.key_heads)
    return layer.sequence * (of_row + FLOAT32 * layer.batch * layer.query_heads)


def _overlap(a: Rows, b: Rows) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
