"""Decode with a cache of keys and values by flash_attn's function, which appends to the cache in place."""

import torch
from torch import Tensor

from ...backend import UnsupportedError
from ...ops.attention import kvcache_attention
from .layers.rotary import rotate
from .options import UNLIMITED, check_call, explain_refusal, window_of


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to their caches in place, and compute attention of q to the caches, without a gradient.

    Nothing of the caches is copied: each of ``cache_batch_idx`` and ``cache_leftpad`` becomes a block table over them.

    Args:
        q: (B, Sq, H, D), float16, bfloat16 or float32.
        k_cache, v_cache: (sequences, Smax, Hk, D); or, with a ``block_table``, (pages, page, Hk, D). The last dimension is
            contiguous.
        k, v: (B, Snew, Hk, D), appended behind each sequence's rows.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), in q's dtype: k is rotated by its positions in the cache, and q by
            the positions from cache_seqlens on if ``causal`` or windowed, else all of q by cache_seqlens.
        cache_seqlens: rows of each sequence that are cached, before appending: an int, int32 (B,), or None for all rows.
        cache_batch_idx: int32 (B,): which sequences of the caches q attends to. Those that append must be distinct.
        cache_leftpad: int32 (B,): the first row of each sequence; those before it are padding.
        block_table: int32 (B, max_pages): row j of sequence b is row j % page of page block_table[b, j // page].
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: rotate dimensions 0 and 1, 2 and 3, …; else 0 and rotary_dim / 2, ….
        num_splits: not used, because fastlm splits the keys as it needs.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out (B, Sq, H, D), or (out, softmax_lse), softmax_lse float32 (B, H, Sq).

    Raises:
        AssertionError, RuntimeError: an argument does not fit, or a pair of them excludes each other; the message is
            flash_attn's.
        UnsupportedError: ``cache_leftpad`` with caches whose sequences do not lie whole rows apart, or not alike.
        TypeError, ValueError: from `fastlm.kvcache_attention`, for the other arguments.
    """
    check_call(q, alibi_slopes)
    try:
        lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else _lengths(cache_seqlens, q, k_cache, block_table)
        if rotary_cos is not None:
            _check_rotary(k, rotary_sin)
            moves = causal or window_size[0] >= 0 or window_size[1] >= 0
            queries = _positions(lengths, q.shape[1] if moves else 1)
            q = rotate(q, rotary_cos, rotary_sin, queries, rotary_interleaved)
            k = rotate(k, rotary_cos, rotary_sin, _positions(lengths, k.shape[1]), rotary_interleaved)
        if block_table is None and cache_batch_idx is None and cache_leftpad is None:
            caches, table = (k_cache.transpose(1, 2), v_cache.transpose(1, 2)), None
        else:
            caches, lengths, table = _paged((k_cache, v_cache), lengths, cache_batch_idx, cache_leftpad, block_table)
        results = kvcache_attention(
            q.transpose(1, 2),
            *caches,
            lengths,
            key=None if k is None else k.transpose(1, 2),
            value=None if v is None else v.transpose(1, 2),
            block_table=table,
            causal=causal,
            window=None if window_size == UNLIMITED else window_of(window_size),
            scale=softmax_scale,
            softcap=softcap if softcap > 0.0 else None,
            alibi_slopes=alibi_slopes,
            return_lse=return_softmax_lse,
        )
    except (TypeError, ValueError):
        assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
        assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
        explain_refusal(q, k_cache, v_cache, seqlens_k=cache_seqlens, cache_batch_idx=cache_batch_idx, block_table=block_table)
        if k is not None:
            _explain_refusal_to_append(v, cache_seqlens)
        raise
    if return_softmax_lse:
        out, lse = results
        return out.transpose(1, 2), lse
    return results.transpose(1, 2)


def _lengths(cache_seqlens: int | None, q: Tensor, k_cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Return how many rows of each sequence are cached, int32 (B,), for one number, or None: all."""
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _positions(lengths: Tensor, rows: int) -> Tensor:
    """Return the positions (B, rows) behind the cached rows."""
    return lengths[:, None] + torch.arange(rows, device=lengths.device)


def _check_rotary(k: Tensor | None, rotary_sin: Tensor | None) -> None:
    """Check that there is something to rotate, and both tables."""
    if k is None:
        raise RuntimeError("If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided")
    if rotary_sin is None:
        raise RuntimeError("If rotary cos is provided, rotary sin must also be provided")


def _explain_refusal_to_append(v: Tensor | None, cache_seqlens: int | Tensor | None) -> None:
    """Raise flash_attn's error if what is appended is not complete."""
    if v is None:
        raise RuntimeError("If key is supplied, value must also be passed in")
    if cache_seqlens is None:
        raise RuntimeError("If key is supplied, seqlens_k must also be passed in")


# ---- caches as pages --------------------------------------------------------------------------------------------------------


def _paged(
    caches: tuple[Tensor, Tensor],
    lengths: Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return the caches, lengths and block table that `fastlm.kvcache_attention` takes for one of the last three arguments."""
    if block_table is not None:
        if cache_batch_idx is not None:
            raise RuntimeError("Paged KVcache does not support cache_batch_idx")
        if cache_leftpad is not None:
            raise RuntimeError("We don't support Paged KV and leftpad_k running at the same time yet")
        return caches, lengths, block_table
    if cache_leftpad is None:
        return caches, lengths, cache_batch_idx[:, None]  # A whole sequence is a page.
    if cache_leftpad.dtype is not torch.int32:
        raise RuntimeError(f"leftpad_k must have dtype int32; got {cache_leftpad.dtype}")
    return _behind_padding(caches, lengths, cache_batch_idx, cache_leftpad)


def _behind_padding(
    caches: tuple[Tensor, Tensor], lengths: Tensor, cache_batch_idx: Tensor | None, cache_leftpad: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return the caches as pages of one row, so that a sequence may begin anywhere, its lengths from there, and the table."""
    steps = {_rows_apart(cache) for cache in caches}
    if len(steps) > 1:
        raise UnsupportedError("cache_leftpad needs a k_cache and a v_cache whose sequences lie equally many rows apart")
    (step,) = steps
    pages = tuple(
        cache.as_strided(
            ((cache.shape[0] - 1) * step + cache.shape[1], 1, *cache.shape[2:]), (cache.stride(1), *cache.stride()[1:])
        )
        for cache in caches
    )
    sequence = torch.arange(len(lengths), device=lengths.device) if cache_batch_idx is None else cache_batch_idx
    row = torch.arange(caches[0].shape[1], device=lengths.device)
    table = (sequence * step + cache_leftpad)[:, None] + row  # (B, Smax); what lies past a length is not read
    return pages, lengths - cache_leftpad, table.int()


def _rows_apart(cache: Tensor) -> int:
    """Return how many rows lie from the beginning of a sequence to the next one's."""
    to_sequence, to_row = cache.stride()[:2]
    if to_row == 0 or to_sequence % to_row:
        raise UnsupportedError(
            f"cache_leftpad needs caches whose sequences lie whole rows apart; got strides {tuple(cache.stride())}"
        )
    return to_sequence // to_row
