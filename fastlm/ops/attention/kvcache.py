"""Decode: compute attention of a few new queries to a cache of keys and values, which may be paged."""

import torch
from torch import Tensor

from ...backend import Implementation, select
from ...reference import attention as reference
from ..tensor_classes import runner
from ..torch_op import reference_only
from . import cpu, observer, triton
from .call import KVCACHE_TENSORS, KVCacheCall
from .checks import (
    BATCHED,
    PAGED,
    check_groups,
    check_indices,
    check_keys,
    check_per_head,
    check_rows,
    check_writable,
    score_options,
    window_bounds,
)


def kvcache_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to their caches in place, and compute attention of new queries to the caches. No gradient.

    Args:
        query: (B, Hq, Lq, D), float32, bfloat16 or float16. Under autocast, query, key and value take the caches' dtype.
        key_cache: (B, Hkv, Lmax, D); or, with a ``block_table``, (n_pages, page, Hkv, D). Hq is a multiple of Hkv.
        value_cache: as key_cache, with a head_dim Dv of its own.
        cache_seqlens: int32 (B,): how many rows of each sequence are cached, before appending. Not changed. Cache contents
            past a sequence's rows have no influence.
        key: (B, Hkv, L, D), appended to key_cache in place; L need not be Lq.
        value: (B, Hkv, L, Dv), appended to value_cache; given together with key or not at all.
        block_table: int32 (B, max_pages): row j of sequence b is row j % page of page block_table[b, j // page]. Entries past a
            sequence's rows are not read. Sequences that append must not share the page that they write to.
        causal, window: as in `attention`; query i sits at row i + (rows cached and appended) - Lq of its sequence.
        scale, softcap, alibi_slopes, sinks, return_lse, backend: as in `attention`.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype, laid out in memory like query; or (out, lse), lse float32 (B, Hq, Lq).

    Raises:
        TypeError, ValueError: naming the argument that does not fit; nothing is appended then. The numbers in cache_seqlens
            and block_table are not checked on a GPU, because that would wait for it: rows outside the cache are neither
            written nor attended to.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    check_rows("query", query, BATCHED)
    check_rows("key_cache", key_cache, BATCHED if block_table is None else PAGED)
    check_rows("value_cache", value_cache, BATCHED if block_table is None else PAGED)
    if (key is None) != (value is None):
        raise ValueError(f"key and value must be given together; got only {'value' if key is None else 'key'}")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t if t is None else t.to(key_cache.dtype) for t in (query, key, value))
    check_keys(query, key_cache, value_cache, ("key_cache", "value_cache"))
    batch, heads, _, head_dim = query.shape
    kv_heads = key_cache.shape[1 if block_table is None else 2]
    check_groups(heads, kv_heads, "key_cache")
    if block_table is not None:
        check_indices("block_table", block_table, (batch, None), query.device)
    elif key_cache.shape[0] != batch:
        raise ValueError(f"key_cache must have query's batch size {batch}; got shape {tuple(key_cache.shape)}")
    check_indices("cache_seqlens", cache_seqlens, (batch,), query.device)
    if key is not None:
        _check_appended(query, key, value, (batch, kv_heads), value_cache.shape[3])
        check_writable("key_cache", key_cache)
        check_writable("value_cache", value_cache)
    check_per_head(alibi_slopes, sinks, batch, query, heads)
    left, right = window_bounds(causal, window)
    scale, softcap = score_options(scale, softcap, head_dim)
    call = KVCacheCall(
        query, key_cache, value_cache, cache_seqlens, key, value, block_table, sinks, alibi_slopes, left, right, scale, softcap
    )
    out, lse = _run(call, backend)
    return (out, lse) if return_lse else out


def _run(call: KVCacheCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Choose the backend and run the call."""
    tensors = call[:KVCACHE_TENSORS]
    elsewhere = runner("kvcache_attention", tensors)
    if elsewhere is not None:
        return elsewhere(lambda local: _run(local, backend), call)
    attend = select("kvcache_attention", IMPLEMENTATIONS, (call.query, call.value_cache), backend, reference_only(*tensors))
    observer.miss("fastlm.kvcache_attention has no statistics")
    return attend(call)


def _check_appended(query: Tensor, key: Tensor, value: Tensor, outer: tuple[int, int], value_dim: int) -> None:
    check_rows("key", key, BATCHED)
    check_rows("value", value, BATCHED)
    check_keys(query, key, value)
    if tuple(key.shape[:2]) != outer:
        raise ValueError(f"key must have the caches' batch and heads {outer}; got shape {tuple(key.shape)}")
    if value.shape[3] != value_dim:
        raise ValueError(f"value must have value_cache's head_dim {value_dim}; got shape {tuple(value.shape)}")


@torch.no_grad()
def _attend_by_reference(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    return reference.attend_kvcache(*call)


IMPLEMENTATIONS = (
    Implementation("cpu", cpu.kvcache_attend, cpu.why_not),
    Implementation("triton", triton.kvcache_attend, triton.why_not),
    Implementation("reference", _attend_by_reference, lambda query, value: None),
)
