"""Compute attention over a sequence that is spread over ranks, by all keys and values on each ("all-gather").

Each rank gets the keys and values of all, and attends to them with its own queries; their gradients, and the mass that keys
receive, go back and are added up. Any number of ranks can do it, with all derivatives and statistics, for the memory of all
keys and values, of which grouped queries have few. Under a causal limit rows of queries are exchanged first, as in ring.py.
Source: the context parallelism of Llama 3 (Grattafiori et al., "The Llama 3 Herd of Models", 2024, section 3.3.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.attention.batched import run
from ..ops.attention.call import AttentionCall
from ..ops.attention.stats import AttentionStats
from .exchange import move_rows, summed_rows
from .sequences import Sequences, Shards, is_lopsided, of_ranks, part_of, places_of, split


def attend(
    shards: Shards, call: AttentionCall, backend: str | None, wanted: frozenset[str], return_lse: bool
) -> tuple[Tensor, Tensor | None, AttentionStats | None]:
    """Return out, lse (if asked for) and statistics of this rank's rows, from the call of its rows."""
    (_, rank, size), keys = shards.ranks, sum(shards.keys)
    have = of_ranks(shards.query_ranges(), size)
    computed = of_ranks(split(sum(shards.queries), 2 * size), size) if is_lopsided(call, keys) else have
    key, value = _gathered(shards, call.key), _gathered(shards, call.value)
    query, mask = (
        tensor if have == computed or not has_rows else move_rows(shards.ranks, tensor, have, computed)
        for tensor, has_rows in ((call.query, True), (call.mask, shards.mask_has_rows))
    )
    sequences, op = Sequences.of(call, shards), "attention" if call.cu_seqlens_q is None else "varlen_attention"

    def attended(rows: tuple[int, int], place: slice) -> tuple:
        """Return (out, lse, statistics) of one of this rank's pieces of rows."""
        mask_of_piece = mask[:, :, place] if shards.mask_has_rows else mask
        piece = call._replace(query=query[:, :, place], key=key, value=value, mask=mask_of_piece)
        piece = piece._replace(**part_of(sequences, rows, (0, keys), query.device)._asdict())
        return run(op, piece, call.seed, backend, wanted)

    def home(pieces: Sequence[Tensor]) -> Tensor:
        """Return this rank's rows (B, H, L, *) from those of its pieces."""
        joined = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
        return joined if have == computed else move_rows(shards.ranks, joined, computed, have)

    def numbers(pieces: Sequence[Tensor | None]) -> Tensor | None:
        """Return the numbers (B, H, L) of this rank's rows, if there are any."""
        return None if pieces[0] is None else home([piece[..., None] for piece in pieces]).squeeze(3)

    outs, lses, stats = zip(*map(attended, computed[rank], places_of(computed[rank])))
    out, lse = home(outs), numbers(lses) if return_lse else None
    if not wanted:
        return out, lse, None
    entropy, max_logit, mass = zip(*stats)
    key_mass = None if mass[0] is None else summed_rows(shards.ranks, sum(mass), shards.keys)
    return out, lse, AttentionStats(numbers(entropy), numbers(max_logit), key_mass)


def _gathered(shards: Shards, tensor: Tensor) -> Tensor:
    """Return all rows (B, H, S, D) of keys or values, from this rank's."""
    size = shards.ranks.size
    return move_rows(shards.ranks, tensor, of_ranks(shards.key_ranges(), size), [[(0, sum(shards.keys))]] * size)
