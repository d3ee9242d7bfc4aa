"""The torch op behind decoding with a cache: it appends to the caches in place, then attends to them. No gradient."""

import torch
from torch import Tensor

from .. import native
from ..native import view
from .attention_op import arranged, attention_fake, empty_results, numbers, rows_of
from .torch_op import unobserved

_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(
    "kvcache_attention(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? key, "
    "Tensor? value, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, SymInt? left, SymInt? right, float scale, "
    "float softcap) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(query, key_cache, value_cache, *rest):
    return attention_fake(query, None, value_cache)


def _paged_as_rows(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(n_pages, page, Hkv, D) as (n_pages, Hkv, page, D), the order of a contiguous cache."""
    return cache if block_table is None else cache.detach().transpose(1, 2)


def _check_strides(name: str, cache: Tensor) -> None:
    if cache.shape[3] > 1 and cache.stride(3) != 1:
        raise ValueError(f"{name} is written in place: its last dimension must be contiguous; got strides {cache.stride()}")


def _cpu(
    query, key_cache, value_cache, cache_seqlens, key, value, block_table, alibi_slopes, sinks, left, right, scale, softcap
):
    _check_strides("key_cache", key_cache)
    _check_strides("value_cache", value_cache)
    key_rows, value_rows = _paged_as_rows(key_cache, block_table), _paged_as_rows(value_cache, block_table)
    out, lse = empty_results(query, value_cache.shape[3])
    native.C.cached_attention_forward(
        arranged(query, key_rows, value_rows, None, sinks, alibi_slopes, None, None, None),
        numbers(left, right, scale, softcap, 0.0),
        view(cache_seqlens.contiguous()),
        None if block_table is None else view(block_table.contiguous()),
        tuple(None if t is None else view(rows_of(t)) for t in (key, value)),
        view(out),
        view(lse),
        torch.get_num_threads(),
    )
    return out, lse


_library.impl("kvcache_attention", _cpu, "CPU")
torch.library.register_fake("fastlm::kvcache_attention", _fake, lib=_library)
_op = torch.ops.fastlm.kvcache_attention.default


def attend_cache(query, key_cache, value_cache, *rest) -> tuple[Tensor, Tensor]:
    """(out, lse) by the op; without a gradient, whatever its inputs ask for."""
    if unobserved(query, key_cache, value_cache):
        return _cpu(query, key_cache, value_cache, *rest)
    with torch.no_grad():
        return _op(query, key_cache, value_cache, *rest)
