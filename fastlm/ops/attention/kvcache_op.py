"""The torch ops behind decoding with a cache, one for each backend: append to the caches in place, then attend. No gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...backend import cpu as native
from ...backend import triton as triton_kernels
from ...backend.cpu import view
from ..torch_op import define_op, may_bypass_dispatcher
from .cpu import arranged, empty_results
from .op import attention_fake, numbers, rows_of
from .triton import allow_tf32

# ---- the CPU ----------------------------------------------------------------------------------------------------------------


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


# ---- GPUs -------------------------------------------------------------------------------------------------------------------


def _triton(query, key_cache, value_cache, cache_seqlens, key, value, *rest):
    _check_strides("key_cache", key_cache)
    _check_strides("value_cache", value_cache)
    out, lse, _ = attention_fake(query, None, value_cache)
    kernels = triton_kernels.attention()
    query, key, value = (None if t is None else rows_of(t) for t in (query, key, value))
    with torch.cuda.device_of(query):
        tensors = (query, key_cache, value_cache, cache_seqlens, key, value)
        kernels.run(kernels.plan_kvcache(*tensors, *rest, allow_tf32(), out, lse))
    return out, lse


# ---- the ops ----------------------------------------------------------------------------------------------------------------

_SIGNATURE = (
    "(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? key, Tensor? value, "
    "Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, SymInt? left, SymInt? right, float scale, float softcap) "
    "-> (Tensor out, Tensor lse)"
)


def _note_writes(*caches: Tensor) -> None:
    """Tell autograd that tensors were written, so that a backward which saved one of them before raises."""
    if not torch.compiler.is_compiling():  # there the schema tells
        for cache in caches:
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)


def _fake(query, key_cache, value_cache, *rest):
    return attention_fake(query, None, value_cache)[:2]


def _cache_op(name: str, run: Callable, devices: tuple[str, ...]) -> Callable:
    """Make a backend's ``attend_cache``: (out, lse) by its torch op; without a gradient, whatever the inputs ask for."""
    op = define_op(name, _SIGNATURE, run, _fake, devices)

    def attend_cache(query, key_cache, value_cache, cache_seqlens, key, value, block_table, slopes, sinks, *options):
        tensors = (query, key_cache, value_cache, cache_seqlens, key, value, block_table, slopes, sinks)
        if may_bypass_dispatcher(*tensors):
            results = run(*tensors, *options)
        else:
            with torch.no_grad():
                results = op(*tensors, *options)
        if key is not None:
            _note_writes(key_cache, value_cache)
        return results

    return attend_cache


attend_cache = _cache_op("kvcache_attention", _cpu, ("CPU",))
attend_cache_triton = _cache_op("triton_kvcache_attention", _triton, ("CPU", "CUDA"))
