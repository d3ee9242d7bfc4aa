"""Compute attention by the functions of flash_attn, in its layouts: (B, S, H, D), or (total, H, D) for packed sequences.

fastlm reads other layouts by their strides, so that nothing is copied on the way.
"""

import torch
from torch import Tensor

from ...ops.attention import attention, varlen_attention
from .options import UNLIMITED, check_call, explain_refusal, window_of


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute softmax attention of a batch, as flash_attn's function of that name.

    Args:
        q: (B, Sq, H, D), float16, bfloat16 or float32, D at most 256. Any strides.
        k, v: (B, Sk, Hk, D), where Hk divides H: query head h uses key head h // (H // Hk). v may have a head_dim of its own.
        dropout_p: the share of weights that are dropped; the noise is fastlm's, from a seed of torch's generator.
        softmax_scale: multiplies the scores; None means 1 / sqrt(D).
        causal: query i sees keys j <= i + Sk - Sq: aligned at the last query and key.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; a negative side sets no
            limit, and ``causal`` makes the right side 0.
        softcap: if positive, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H,) or (B, H), float32: subtracts slope * |i + Sk - Sq - j|.
        deterministic: changes nothing, because fastlm's backward has one order of sums.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (B, Sq, H, D), laid out in memory like q; a query that sees no key gets zeros. With ``return_attn_probs``
        (out, softmax_lse, S_dmask): softmax_lse (B, H, Sq) is float32, and -inf where no key is seen (flash_attn has +inf);
        S_dmask is None, because no kernel of fastlm writes the weights (`fastlm.attention_weights` computes those of chosen
        queries).

    Raises:
        RuntimeError: dtypes, shapes, head_dim or slopes do not fit; the message is flash_attn's.
        TypeError, ValueError: from `fastlm.attention`, for the other arguments.
    """
    check_call(q, alibi_slopes)
    try:
        results = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            causal=causal,
            window=None if window_size == UNLIMITED else window_of(window_size),
            scale=softmax_scale,
            softcap=softcap if softcap > 0.0 else None,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            return_lse=return_attn_probs,
        )
    except (TypeError, ValueError):
        explain_refusal(q, k, v)
        raise
    if return_attn_probs:
        out, lse = results
        return out.transpose(1, 2), lse, None
    return results.transpose(1, 2)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute `flash_attn_func` of q (B, Sq, H, D) and kv (B, Sk, 2, Hk, D), which is read where it lies."""
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute `flash_attn_func` of qkv (B, S, 3, H, D), which is read where it lies."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


# ---- packed sequences -------------------------------------------------------------------------------------------------------


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute `flash_attn_func` for sequences that are packed without padding, each by itself.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, Hk, D); or, with a ``block_table``, (pages, page, Hk, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,): sequence b has rows cu_seqlens[b] up to cu_seqlens[b + 1]. They end at the
            totals.
        max_seqlen_q, max_seqlen_k: not used, because fastlm reads the lengths from cu_seqlens.
        block_table: int32 (B, max_pages): row j of sequence b is row j % page of page block_table[b, j // page]. The rows are
            gathered into packed ones first, a copy, which on a GPU waits for cu_seqlens_k. `flash_attn_with_kvcache` reads
            pages where they lie.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            `flash_attn_func`.

    Returns:
        out (total_q, H, D), or (out, softmax_lse, S_dmask): softmax_lse (H, total_q), S_dmask None.

    Raises:
        RuntimeError, TypeError, ValueError: as `flash_attn_func`.
    """
    check_call(q, alibi_slopes)
    try:
        if block_table is not None:
            k, v = gather_rows((k, v), block_table, cu_seqlens_k)
        results = varlen_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            causal=causal,
            window=None if window_size == UNLIMITED else window_of(window_size),
            scale=softmax_scale,
            softcap=softcap if softcap > 0.0 else None,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            return_lse=return_attn_probs,
        )
    except (TypeError, ValueError):
        explain_refusal(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        raise
    return (*results, None) if return_attn_probs else results


def gather_rows(caches: tuple[Tensor, ...], block_table: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return the rows (total, H, D) of sequences that lie in pages (pages, page, H, D)."""
    if block_table.dtype is not torch.int32:
        raise RuntimeError(f"block_table must have dtype int32; got {block_table.dtype}")
    row = torch.arange(cu_seqlens[-1].item(), device=cu_seqlens.device)  # (total,)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    position = row - cu_seqlens[sequence]
    page = caches[0].shape[1]
    pages = block_table[sequence, position // page].long()
    return [cache[pages, position % page] for cache in caches]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute `flash_attn_varlen_func` of q (total_q, H, D) and kv (total_k, 2, Hk, D), which is read where it lies."""
    k, v = kv.unbind(1)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, *lengths, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Compute `flash_attn_varlen_func` of qkv (total, 3, H, D), which is read where it lies."""
    q, k, v = qkv.unbind(1)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, *lengths, *options)
