"""Compute attention over a sequence that is spread over ranks, by all rows of some heads on each ("Ulysses").

Query, key and value move from some rows of all heads to all rows of some heads; each rank attends with its heads as one process
would; out moves back. A row's result does not depend on the heads around it, and noise goes by place, so that the results are
one process's to the bit, and all derivatives are those of fastlm.attention.
Source: Jacobs et al., "DeepSpeed Ulysses" (2023).
"""

from torch import Tensor

from ..ops.attention.batched import run
from ..ops.attention.call import AttentionCall
from ..ops.attention.stats import AttentionStats
from .exchange import heads_to_rows, rows_to_heads
from .sequences import Sequences, Shards, part_of, split


def head_split(heads: int, kv_heads: int, size: int) -> tuple[list[slice], list[slice]]:
    """Return each rank's query heads, and the key heads that they need.

    Whole groups go to a rank where there are enough. Else a few ranks share a key head, which each of them gets.
    """
    group = heads // kv_heads
    if kv_heads >= size:
        kv = split(kv_heads, size)
        return [slice(a * group, b * group) for a, b in kv], [slice(a, b) for a, b in kv]
    own, shared = [], []
    for head, (first, last) in enumerate(split(size, kv_heads)):
        for a, b in split(group, last - first):
            own.append(slice(head * group + a, head * group + b))
            shared.append(slice(head, head + 1))
    return own, shared


def attend(
    shards: Shards, call: AttentionCall, backend: str | None, wanted: frozenset[str], return_lse: bool
) -> tuple[Tensor, Tensor | None, AttentionStats | None]:
    """Return out, lse (if asked for) and statistics of this rank's rows, from the call of its rows."""
    ranks = shards.ranks
    own, shared = head_split(call.query.shape[1], call.key.shape[1], ranks.size)
    heads, places = own[ranks.rank], None
    if call.dropout_p:
        whole = (0, sum(shards.queries)), (0, sum(shards.keys))
        places = part_of(Sequences.of(call, shards), *whole, call.query.device, heads.start).places
    of_heads = call._replace(
        query=rows_to_heads(ranks, call.query, own, shards.queries),
        key=rows_to_heads(ranks, call.key, shared, shards.keys),
        value=rows_to_heads(ranks, call.value, shared, shards.keys),
        mask=None if call.mask is None else _mask_of_heads(shards, call.mask, own),
        sinks=None if call.sinks is None else call.sinks[heads],
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes[..., heads],
        places=places,
    )
    op = "attention" if call.cu_seqlens_q is None else "varlen_attention"
    out, lse, stats = run(op, of_heads, call.seed, backend, wanted)

    def rows_of(tensor: Tensor | None, lengths: tuple[int, ...]) -> Tensor | None:
        if tensor is None:
            return None
        return heads_to_rows(ranks, tensor[..., None], own, lengths, like=tensor[..., None]).squeeze(3)

    if stats is not None:
        entropy, max_logit, key_mass = stats
        stats = AttentionStats(*(rows_of(t, shards.queries) for t in (entropy, max_logit)), rows_of(key_mass, shards.keys))
    out = heads_to_rows(ranks, out, own, shards.queries, like=call.query)
    return out, rows_of(lse, shards.queries) if return_lse else None, stats


def _mask_of_heads(shards: Shards, mask: Tensor, own: list[slice]) -> Tensor:
    """Return the mask (1 or B, 1 or h, 1 or all rows, keys) for this rank's heads, from that of its rows."""
    ranks, is_per_head = shards.ranks, mask.shape[1] > 1
    if not shards.mask_has_rows:
        return mask[:, own[ranks.rank]] if is_per_head else mask
    return rows_to_heads(ranks, mask, own if is_per_head else [slice(0, 1)] * ranks.size, shards.queries)
