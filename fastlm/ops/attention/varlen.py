"""Compute attention over packed sequences of different lengths, without padding and without a mask."""

from collections.abc import Iterable

from torch import Tensor

from ..checks import autocast, check_integer
from ..noise import check_seed
from .batched import results, run
from .call import AttentionCall
from .checks import (
    VARLEN,
    check_dropout_p,
    check_groups,
    check_indices,
    check_keys,
    check_no_gradient,
    check_per_head,
    check_rows,
    score_options,
    window_bounds,
)
from .stats import AttentionStats, check_return_stats


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_stats: Iterable[str] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor | AttentionStats, ...]:
    """Compute `fastlm.attention` for a batch of sequences of any lengths, packed without padding.

    Args:
        query: (total_q, Hq, D), the rows of all sequences; dtypes as in `attention`.
        key: (total_k, Hkv, D).
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: int32 (B + 1,): sequence b has the query rows from cu_seqlens_q[b] up to cu_seqlens_q[b + 1]. Starts at 0,
            does not fall, ends at total_q. A sequence may be empty.
        cu_seqlens_k: int32 (B + 1,), the same for keys and values.
        max_seqlen_q, max_seqlen_k: the longest sequences, for backends that plan by them; none does so yet.
        alibi_slopes: (Hq,) or (B, Hq), floating.
        seed: as in `attention`; an int64 tensor (B,) gives each sequence a stream of its own.
        causal, window, scale, softcap, sinks, dropout_p, return_lse, return_stats, backend: as in `attention`, for each
            sequence by itself.

    Returns:
        out (total_q, Hq, Dv) in query's dtype; or (out, lse), lse float32 (Hq, total_q). With ``return_stats``, a last element
        holds the statistics: entropy and max_logit (Hq, total_q), key_mass (Hq, total_k).

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The numbers in cu_seqlens are not checked on a GPU,
            because that would wait for it: wrong ones leave rows unwritten, and nothing outside the tensors is touched.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            check_integer(name, longest, 0, 2**31 - 1)
    call = varlen_call(
        query, key, value, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p
    )
    if seed is not None:
        check_seed(seed, cu_seqlens_q[1:])
    wanted = check_return_stats(return_stats)
    out, lse, stats = run("varlen_attention", call, seed, backend, wanted)
    return packed_results(out, lse, stats, return_lse)


def packed_results(out: Tensor, lse: Tensor | None, stats: AttentionStats | None, return_lse: bool) -> Tensor | tuple:
    """Return what `varlen_attention` returns, from the results of its call, which is a batch of one."""
    if stats is not None:
        stats = AttentionStats(*(None if tensor is None else tensor.squeeze(0) for tensor in stats))
    return results(out.squeeze(0).transpose(0, 1), lse.squeeze(0) if return_lse else None, stats, return_lse)


def varlen_call(
    query, key, value, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p
) -> AttentionCall:
    """Check the arguments of `varlen_attention` but its seed, and return the call without its seed."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_rows(name, tensor, VARLEN)
    query, key, value = autocast(query, key, value)
    check_keys(query, key, value)
    heads = query.shape[1]
    check_groups(heads, key.shape[1])
    check_indices("cu_seqlens_q", cu_seqlens_q, (None,), query.device)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q must hold at least the 0 that it starts with; got none")
    check_indices("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), query.device)
    check_per_head(alibi_slopes, sinks, cu_seqlens_q.shape[0] - 1, query, heads)
    check_no_gradient(alibi_slopes)
    left, right = window_bounds(causal, window)
    scale, softcap = score_options(scale, softcap, query.shape[2])
    dropout_p = check_dropout_p(dropout_p)
    rows = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # (1, heads, total, head_dim)
    return AttentionCall(
        *rows, None, sinks, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k, None, left, right, scale, softcap, dropout_p
    )
