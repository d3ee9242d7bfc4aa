"""Say which rows each rank has of the sequences that all ranks share, and where a part of them stands in the whole.

Rows are numbered through all ranks. The examples of a batch share their rows; packed sequences follow one another.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention.call import AttentionCall, Place
from .exchange import Range
from .ranks import Ranks


class Shards(NamedTuple):
    """Hold how many rows of the sequences each rank has, contiguous and in the order of the ranks."""

    ranks: Ranks
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    mask_has_rows: bool  # The mask has a row for each query, of which a rank has those of its own queries.

    def query_ranges(self) -> list[Range]:
        """Return each rank's rows of queries."""
        return ranges_of(self.queries)

    def key_ranges(self) -> list[Range]:
        """Return each rank's rows of keys."""
        return ranges_of(self.keys)


def ranges_of(lengths: tuple[int, ...]) -> list[Range]:
    """Return the ranges of these lengths, one after the other."""
    ends = list(accumulate(lengths))
    return [(end - length, end) for length, end in zip(lengths, ends)]


def split(total: int, parts: int) -> list[Range]:
    """Cut a total into parts that differ by one at most."""
    return [(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def of_ranks(ranges: list[Range], size: int) -> list[list[Range]]:
    """Return each rank's ranges: one, or of twice as many ranges as ranks those of numbers r and 2n - 1 - r ("zigzag")."""
    return [[ranges[r], ranges[-1 - r]] if len(ranges) == 2 * size else [ranges[r]] for r in range(size)]


def places_of(ranges: list[Range]) -> list[slice]:
    """Return where the ranges of a rank's rows lie in its tensors."""
    return [slice(*rows) for rows in ranges_of(tuple(end - begin for begin, end in ranges))]


def is_lopsided(call: AttentionCall, keys: int) -> bool:
    """Tell whether the last of all rows have much more work than the first, of so many keys.

    Under a window of a share w of the keys, the mean rank has 1 - w / 2 of the work of the last.
    """
    left, right = call.left, call.right
    return right is not None and right < keys and (left is None or left + right > keys // 4)


class Sequences(NamedTuple):
    """Hold where each sequence begins and ends in the rows of all ranks: int64 (B,) on the CPU."""

    q_begin: Tensor
    q_end: Tensor
    k_begin: Tensor
    k_end: Tensor
    packed: bool
    heads: int
    per_example: bool  # Each sequence has a seed of its own.

    @classmethod
    def of(cls, call: AttentionCall, shards: Shards) -> "Sequences":
        """Return the sequences of a call that holds one rank's rows, and cu_seqlens of all ranks'."""
        batch, heads = call.query.shape[:2]
        packed = call.cu_seqlens_q is not None
        per_example = call.seed is not None and call.seed.dim() == 1
        if packed:
            q, k = (cu.cpu().long() for cu in (call.cu_seqlens_q, call.cu_seqlens_k))
        else:
            q, k = (torch.tensor([0, sum(lengths)]) for lengths in (shards.queries, shards.keys))
        bounds = q[:-1], q[1:], k[:-1], k[1:]
        return cls(*(bounds if packed else (bound.expand(batch) for bound in bounds)), packed, heads, per_example)


class Part(NamedTuple):
    """Hold where the rows of some queries and some keys stand in their sequences."""

    places: Tensor  # int64 (B, 4)
    cu_seqlens_q: Tensor | None  # int32 (B + 1,)
    cu_seqlens_k: Tensor | None


def part_of(sequences: Sequences, queries: Range, keys: Range, device: torch.device, first_head: int = 0) -> Part:
    """Return the part of the sequences that has these rows of queries and of keys, and heads from ``first_head`` on."""
    s = sequences
    (q_from, q_to), (k_from, k_to) = _cut(s.q_begin, s.q_end, queries), _cut(s.k_begin, s.k_end, keys)
    first_query, first_key = q_from - s.q_begin, torch.where(k_from < k_to, k_from - s.k_begin, 0)
    position = first_query + (s.k_end - s.k_begin) - (s.q_end - s.q_begin) - first_key
    stream = torch.full_like(position, first_head)
    if not s.per_example:
        stream += s.heads * torch.arange(len(position))
    places = torch.stack(Place(position, first_query, first_key, stream), dim=1)
    cu_seqlens = (_offsets(q_from, q_to), _offsets(k_from, k_to)) if s.packed else (None, None)
    return Part(*(None if tensor is None else tensor.to(device) for tensor in (places, *cu_seqlens)))


def visible(
    sequences: Sequences, queries: list[Range], keys: list[Range], left: int | None, right: int | None
) -> list[list[bool]]:
    """Tell for each of the queries and each of the keys whether some of the queries see some of the keys."""
    s = sequences
    q_from, q_to = _cut(s.q_begin, s.q_end, torch.tensor(queries).reshape(-1, 2, 1, 1).unbind(1))  # (queries, 1, B)
    k_from, k_to = _cut(s.k_begin, s.k_end, torch.tensor(keys).reshape(-1, 2, 1).unbind(1))  # (keys, B)
    seen = (q_from < q_to) & (k_from < k_to)
    to_key = s.k_end - s.q_end  # A query of that row stands at the key of that row + to_key.
    if left is not None:
        seen &= q_from + to_key - left < k_to
    if right is not None:
        seen &= q_to - 1 + to_key + right >= k_from
    return seen.any(dim=2).tolist()


def _cut(begin: Tensor, end: Tensor, rows: tuple) -> tuple[Tensor, Tensor]:
    """Return the first row, and the row behind the last, of each sequence among ``rows``."""
    first = torch.minimum(begin.clamp(min=rows[0]), end)
    return first, torch.maximum(end.clamp(max=rows[1]), first)


def _offsets(first: Tensor, last: Tensor) -> Tensor:
    return torch.cat([first.new_zeros(1), (last - first).cumsum(0)]).int()


def align_to_counters(sequences: Sequences, ranges: list[Range]) -> list[Range]:
    """Move the bounds between ranks back by up to 3 keys, so that no counter of dropout, which is for 4 keys, is cut."""
    bounds = [end for _, end in ranges[:-1]]
    aligned = []
    for bound in bounds:
        inside = (sequences.k_begin < bound) & (bound < sequences.k_end)
        aligned.append(bound - max(((bound - sequences.k_begin[inside]) % 4).tolist(), default=0))
    edges = [0, *aligned, ranges[-1][1]]
    return list(zip(edges, edges[1:]))
