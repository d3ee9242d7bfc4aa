"""Move rows and heads between ranks. Each move has all derivatives, because it is linear: its backward moves the other way.

Tensors are (B, H, L, D), of which a rank has some rows of all heads, or all rows of some heads. They travel rows first,
(L, B, H, D), so that what the ranks send lies in the order of the sequence where it arrives, and is used where it lies.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.attention.op import is_transposed
from .ranks import Ranks

Range = tuple[int, int]  # rows from the first up to the second


class _Exchange(torch.autograd.Function):
    """Send a piece to each rank, and return what all of them send, one after the other, as (numbers,)."""

    @staticmethod
    def forward(ranks: Ranks, sizes: list[int], *pieces: Tensor) -> Tensor:
        sent = pieces[0].new_empty(sum(piece.numel() for piece in pieces))
        for part, piece in zip(sent.split([piece.numel() for piece in pieces]), pieces):
            part.view(piece.shape).copy_(piece)
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [piece.numel() for piece in pieces], group=ranks.group)
        return received

    @staticmethod
    def setup_context(ctx, args: tuple, output: Tensor) -> None:
        ctx.ranks, ctx.sizes, *pieces = args
        ctx.shapes = [piece.shape for piece in pieces]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        sizes = [shape.numel() for shape in ctx.shapes]
        grads = exchange(ctx.ranks, grad.split(ctx.sizes), sizes)
        return None, None, *(part.view(shape) for part, shape in zip(grads.split(sizes), ctx.shapes))

    @staticmethod
    def jvp(ctx, _, __, *tangents: Tensor) -> Tensor:
        return exchange(ctx.ranks, tangents, ctx.sizes)


def exchange(ranks: Ranks, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Send piece r to rank r, and return the ``sizes[r]`` numbers that each rank r sends, one after the other."""
    return _Exchange.apply(ranks, list(sizes), *pieces)


def rows_first(tensor: Tensor) -> Tensor:
    """Return (B, H, L, D) as (L, B, H, D)."""
    return tensor.permute(2, 0, 1, 3)


def rows_third(tensor: Tensor) -> Tensor:
    """Return (L, B, H, D) as (B, H, L, D)."""
    return tensor.permute(1, 2, 0, 3)


# ---- all rows of some heads -------------------------------------------------------------------------------------------------


def rows_to_heads(ranks: Ranks, tensor: Tensor, heads: Sequence[slice], lengths: Sequence[int]) -> Tensor:
    """Return all rows of this rank's heads, (B, h, sum of lengths, D), from this rank's rows of all heads (B, H, L, D).

    ``heads`` are those of each rank, which may overlap; ``lengths`` are the numbers of rows of each.
    """
    batch, _, _, columns = tensor.shape
    own = heads[ranks.rank]
    shape = batch, own.stop - own.start, columns
    pieces = [rows_first(tensor[:, of_rank]) for of_rank in heads]
    flat = exchange(ranks, pieces, [length * shape[0] * shape[1] * shape[2] for length in lengths])
    return rows_third(flat.view(sum(lengths), *shape))


def heads_to_rows(ranks: Ranks, tensor: Tensor, heads: Sequence[slice], lengths: Sequence[int], like: Tensor) -> Tensor:
    """Return this rank's rows of all heads, (B, H, L, D), from all rows of its heads (B, h, sum of lengths, D).

    ``heads`` do not overlap. The result lies in memory like ``like`` (B, H, L, *).
    """
    batch, _, _, columns = tensor.shape
    rows = lengths[ranks.rank]
    shapes = [(rows, batch, of_rank.stop - of_rank.start, columns) for of_rank in heads]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = exchange(ranks, list(map(rows_first, tensor.split(list(lengths), dim=2))), sizes)
    parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)]
    if is_transposed(like):
        return torch.cat([part.transpose(0, 1) for part in parts], dim=2).transpose(1, 2)
    return torch.cat(list(map(rows_third, parts)), dim=1)


# ---- other rows of all heads ------------------------------------------------------------------------------------------------


def move_rows(ranks: Ranks, tensor: Tensor, have: Sequence[Sequence[Range]], want: Sequence[Sequence[Range]]) -> Tensor:
    """Return the rows that this rank wants, (B, H, L', D), from those that it has, (B, H, L, D).

    ``have`` and ``want`` hold the ranges of rows of each rank, in the order in which they lie in its tensor.
    """
    batch, heads, _, columns = tensor.shape
    pieces = []
    for wanted in want:
        rows = [tensor[:, :, begin:end] for begin, end in _local(have[ranks.rank], _overlaps(have[ranks.rank], wanted))]
        pieces.append(rows_first(torch.cat(rows, dim=2) if rows else tensor[:, :, :0]))
    arriving = [_overlaps(had, want[ranks.rank]) for had in have]
    per_row = batch * heads * columns
    flat = exchange(ranks, pieces, [per_row * sum(end - begin for begin, end in ranges) for ranges in arriving])
    ranges = [found for of_rank in arriving for found in of_rank]
    lengths = [end - begin for begin, end in ranges]
    flat = flat.view(sum(lengths), batch, heads, columns)  # There may be no heads, as in a shard of a DTensor.
    parts = flat.split(lengths)
    places = _local(want[ranks.rank], ranges)
    ordered = [part for _, part in sorted(zip(places, parts), key=lambda pair: pair[0])]
    rows = torch.cat(ordered) if len(ordered) > 1 else flat
    return rows_third(rows)


def summed_rows(ranks: Ranks, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum over ranks of this rank's ``lengths[rank]`` rows, (B, H, L), from what each has of all, (B, H, S)."""
    *outer, _ = tensor.shape
    own = [*outer, lengths[ranks.rank]]
    pieces = tensor.split(list(lengths), dim=2)
    return exchange(ranks, pieces, [torch.Size(own).numel()] * ranks.size).view(ranks.size, *own).sum(dim=0)


def _overlaps(have: Sequence[Range], want: Sequence[Range]) -> list[Range]:
    """Return the ranges that are in both, in the order of ``want``, and there of ``have``."""
    found = [(max(a, c), min(b, d)) for c, d in want for a, b in have]
    return [(begin, end) for begin, end in found if begin < end]


def _local(ranges: Sequence[Range], parts: Sequence[Range]) -> list[Range]:
    """Return where parts of the ranges lie in a tensor that holds the ranges one after the other."""
    places, starts, at = [], [], 0
    for begin, end in ranges:
        starts.append(at - begin)
        at += end - begin
    for begin, end in parts:
        shift = next(s for s, (a, b) in zip(starts, ranges) if a <= begin and end <= b)
        places.append((begin + shift, end + shift))
    return places
