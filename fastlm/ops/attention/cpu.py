"""Run attention on the CPU: convert a call for the C++ kernels, and implement the CPU's torch ops."""

import torch
from torch import Tensor

from ...backend import DEFAULT
from ...backend import cpu as native
from ...backend.cpu import empty, view
from ..torch_op import may_bypass_dispatcher, sum_to
from . import observer
from .call import TENSORS, AttentionCall, KVCacheCall, Tangents, kernel_options
from .checks import no_columns
from .op import (
    Passes,
    attention_op,
    check_cache_strides,
    empty_like,
    empty_results,
    empty_statistics,
    kvcache_op,
    output_gradients,
    rows_of,
    sink_gradient,
    sink_weights,
)
from .stats import (
    StatsGradients,
    StatsPasses,
    empty_key_mass,
    empty_row_stats,
    gradient_of_sink_weights,
    stats_op,
    subtracted_from_scores,
)


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    if query.dtype == torch.float64:
        return "float64 runs on the reference"
    return native.why_not(query) or no_columns(query, value)


# ---- arguments of the C++ functions -----------------------------------------------------------------------------------------


def _mask_rows(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask expanded to (B, Hq, Lq, Lk) by strides of 0."""
    if mask.dtype == torch.float64:
        mask = mask.float()
    if mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*query.shape[:3], key.shape[2])


def tensor_args(call: AttentionCall) -> tuple:
    """Return the call's tensors as the C++ code reads them."""
    query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, places = call[:TENSORS]
    return (
        view(rows_of(query)),
        view(rows_of(key)),
        view(rows_of(value)),
        None if mask is None else view(_mask_rows(mask, query, key)),
        None if sinks is None else view(sinks.float().contiguous()),
        None if alibi_slopes is None else view(alibi_slopes.float().contiguous()),
        None if seed is None else view(seed.contiguous()),
        None if cu_seqlens_q is None else view(cu_seqlens_q.contiguous()),
        None if cu_seqlens_k is None else view(cu_seqlens_k.contiguous()),
        None if places is None else view(places.contiguous()),
    )


# ---- forward and backward ---------------------------------------------------------------------------------------------------


def infer(call: AttentionCall, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (out, lse), and write the ``statistics`` if they are given."""
    out, lse = empty_results(call.query, call.value, empty)
    results = view(out), view(lse), view(statistics)
    native.C.attention_forward(tensor_args(call), kernel_options(call), *results, (), torch.get_num_threads())
    return out, lse


def forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, statistics)."""
    statistics = empty_statistics(call.query, empty)
    return *infer(call, statistics), statistics


# If a mask is the same for all queries, this many share a row of its gradient: kBlockRows of csrc/cpu/attention/attention.h.
_MASK_BLOCK = native.C.attention_block_rows if native.C else 1


def _mask_gradient_buffer(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Make float32 zeros (mask's batch, mask's heads, rows, Lk). If the mask is the same for all queries, a row is a block."""
    batch, heads, rows, _ = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if rows == 1:
        rows = -(-query.shape[2] // _MASK_BLOCK)
    return torch.zeros(batch, heads, rows, key.shape[2], dtype=torch.float32, device="cpu")


def _gradient_buffers(call: AttentionCall, need_mask: bool) -> tuple[tuple[Tensor, ...], Tensor | None, tuple]:
    """Make the gradients of query, key and value, and the mask's buffer. Return these, and what the C++ code takes of them."""
    query, key, value, mask = call[:4]
    grads = tuple(empty_like(t, t.shape[3], empty) for t in (query, key, value))
    if not need_mask:
        return grads, None, ((*map(view, grads), None), False)
    grad_mask = _mask_gradient_buffer(mask, query, key)
    expanded = grad_mask.expand(query.shape[0], query.shape[1], *grad_mask.shape[2:])
    is_by_block = mask.dim() < 2 or mask.shape[-2] == 1
    return grads, grad_mask, ((*map(view, grads), view(expanded)), is_by_block)


def _shared_gradients(
    call: AttentionCall, grad_mask: Tensor | None, lse: Tensor, statistics: Tensor, by_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the mask, from its buffer, and of the sinks, from what multiplies their weights.

    An absent one is empty.
    """
    of_mask = call.query.new_empty(0) if grad_mask is None else sum_to(grad_mask, call.mask)
    if by_weight is None:
        return of_mask, call.query.new_empty(0)
    weights = sink_weights(call.sinks, statistics, score_unit(call), lse)
    return of_mask, sink_gradient(call.sinks, weights, by_weight)


def score_unit(call: AttentionCall) -> float:
    """Return the factor from C++'s scores to natural ones: `scores_are_products` in csrc/cpu/attention/scores-inl.h."""
    has_bias = call.alibi_slopes is not None or (call.mask is not None and call.mask.is_floating_point())
    return call.scale if 0.0 < call.scale < 2.0**127 and not call.softcap and not has_bias else 1.0


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    need_mask: bool,
    need_sinks: bool,
    call: AttentionCall,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask and sinks."""
    grads, grad_mask, delta = _backward(grad_out, grad_lse, out, lse, statistics, need_mask, (), call)
    by_weight = -delta if need_sinks else None
    return *grads, *_shared_gradients(call, grad_mask, lse, statistics, by_weight)


def _backward(grad_out, grad_lse, out, lse, statistics, need_mask: bool, of_stats: tuple, call: AttentionCall) -> tuple:
    """Return the gradients of query, key and value, the mask's buffer, and delta (B, Hq, Lq)."""
    grads, grad_mask, buffers = _gradient_buffers(call, need_mask)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    delta = empty(lse, lse.shape)
    native.C.attention_backward(
        tensor_args(call),
        kernel_options(call),
        tuple(map(view, (rows_of(out), grad_out, statistics.contiguous(), grad_lse, delta))),
        *buffers,
        of_stats,
        torch.get_num_threads(),
    )
    return grads, grad_mask, delta


# ---- statistics of the weights ----------------------------------------------------------------------------------------------


def stats_forward(call: AttentionCall, want_rows: bool, want_mass: bool) -> tuple[Tensor, ...]:
    """Return (out, lse, statistics, entropy, max_logit, max_key, key_mass)."""
    out, lse = empty_results(call.query, call.value, empty)
    statistics, row_stats = empty_statistics(call.query, empty), empty_row_stats(call, want_rows)
    key_mass, args = empty_key_mass(call, want_mass), (tensor_args(call), kernel_options(call))
    results = view(out), view(lse), view(statistics), tuple(map(view, row_stats)) if want_rows else ()
    native.C.attention_forward(*args, *results, torch.get_num_threads())
    if want_mass:
        native.C.attention_key_mass(*args, view(statistics), view(key_mass))
    return out, lse, statistics, *row_stats, key_mass


def stats_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    need_mask: bool,
    need_sinks: bool,
    of_stats: StatsGradients,
    call: AttentionCall,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask and sinks."""
    of_stats = StatsGradients(*(None if tensor is None else tensor.contiguous() for tensor in of_stats))
    grad_entropy, grad_max_logit, grad_key_mass, _, max_key = of_stats
    mean_of_keys = None
    if grad_key_mass is not None:
        mean_of_keys, args = empty(lse, lse.shape), (tensor_args(call), kernel_options(call))
        saved = view(statistics.contiguous()), view(grad_key_mass)
        native.C.attention_mean_of_keys(*args, *saved, view(mean_of_keys), torch.get_num_threads())
    grad_lse = subtracted_from_scores(grad_lse, mean_of_keys, of_stats)
    given = tuple(map(view, (grad_entropy, grad_max_logit, grad_key_mass, None if grad_max_logit is None else max_key)))
    grads, grad_mask, delta = _backward(grad_out, grad_lse, out, lse, statistics, need_mask, given, call)
    by_weight = None
    if need_sinks:
        weights = sink_weights(call.sinks, statistics, score_unit(call), lse)
        by_weight = gradient_of_sink_weights(delta, weights, of_stats)
    return *grads, *_shared_gradients(call, grad_mask, lse, statistics, by_weight)


def top_keys(call: AttentionCall, lse: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (indices, weights) of the k largest weights of each query. The call's value is not read."""
    shape = (*lse.shape, k)
    indices, weights = empty(lse, shape, dtype=torch.int64), empty(lse, shape, dtype=torch.float32)
    native.C.attention_top_keys(
        tensor_args(call),
        kernel_options(call),
        view(lse.float().contiguous()),
        k,
        view(indices),
        view(weights),
        torch.get_num_threads(),
    )
    return indices, weights


attend_with_stats = stats_op("attention_stats", StatsPasses(stats_forward, stats_backward), ("CPU",))


# ---- forward mode, and its backward -----------------------------------------------------------------------------------------


def _tangent_args(call: AttentionCall, tangents: Tangents) -> tuple:
    """Return the tangents as the C++ code reads them."""
    *rows, mask, sinks = tangents
    return (
        *(None if tangent is None else view(rows_of(tangent)) for tangent in rows),
        None if mask is None else view(_mask_rows(mask, call.query, call.key)),
        None if sinks is None else view(sinks.float().contiguous()),
    )


def jvp(call: AttentionCall, tangents: Tangents) -> tuple[Tensor, ...]:
    """Return (out, lse, statistics, out's tangent, lse's tangent)."""
    out, lse = empty_results(call.query, call.value, empty)
    out_tangent, lse_tangent = empty_results(call.query, call.value, empty)
    results = out, lse, empty_statistics(call.query, empty), out_tangent, lse_tangent
    native.C.attention_jvp(
        tensor_args(call),
        kernel_options(call),
        _tangent_args(call, tangents),
        tuple(map(view, results)),
        torch.get_num_threads(),
    )
    return results


def jvp_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    out_tangent: Tensor,
    lse_tangent: Tensor,
    need_mask: bool,
    need_sinks: bool,
    call: AttentionCall,
    tangents: Tangents,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask and sinks, from those of the tangents of out and lse."""
    grads, grad_mask, buffers = _gradient_buffers(call, need_mask)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    delta, tangent_delta, lse_tangent = empty(lse, lse.shape), empty(lse, lse.shape), lse_tangent.contiguous()
    native.C.attention_jvp_backward(
        tensor_args(call),
        kernel_options(call),
        _tangent_args(call, tangents),
        tuple(map(view, (rows_of(out), grad_out, statistics.contiguous(), grad_lse, delta))),
        tuple(map(view, (rows_of(out_tangent), lse_tangent, tangent_delta))),
        *buffers,
        torch.get_num_threads(),
    )
    by_weight = None
    if need_sinks:
        own = 0.0 if tangents.sinks is None else tangents.sinks.float()[:, None]
        by_weight = (lse_tangent - own) * delta - tangent_delta
    return *grads, *_shared_gradients(call, grad_mask, lse, statistics, by_weight)


attend, attend_watched = attention_op("attention", Passes(forward, stats_forward, backward, jvp, jvp_backward), ("CPU",), infer)


# ---- a cache of keys and values ---------------------------------------------------------------------------------------------


def kvcache_forward(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """Append to the caches, and return (out, lse)."""
    check_cache_strides(call)
    caches = call.key_cache, call.value_cache
    if call.block_table is not None:  # (pages, page, Hkv, D) -> (pages, Hkv, page, D), the order of a contiguous cache
        caches = tuple(cache.detach().transpose(1, 2) for cache in caches)
    over_caches = AttentionCall(
        call.query, *caches, None, call.sinks, call.alibi_slopes, seed=None, cu_seqlens_q=None, cu_seqlens_k=None,
        places=None, left=call.left, right=call.right, scale=call.scale, softcap=call.softcap, dropout_p=0.0,
    )  # fmt: skip
    out, lse = empty_results(call.query, call.value_cache, empty)
    native.C.kvcache_attention_forward(
        tensor_args(over_caches),
        kernel_options(over_caches),
        view(call.cache_seqlens.contiguous()),
        None if call.block_table is None else view(call.block_table.contiguous()),
        tuple(None if t is None else view(rows_of(t)) for t in (call.key, call.value)),
        view(out),
        view(lse),
        torch.get_num_threads(),
    )
    return out, lse


kvcache_attend = kvcache_op("kvcache_attention", kvcache_forward, ("CPU",))


# ---- small calls ------------------------------------------------------------------------------------------------------------

_SMALL = 1 << 18  # Up to this many query elements, a call may be all overhead.


def fast_path(query, key, value, scale, causal, top_left, grouped, backend) -> Tensor | None:
    """Return the output of a small call without options and gradients, at the least cost; None for any other call.

    ``top_left`` aligns the causal mask at the first query and key. ``grouped`` allows query heads to share key heads.
    """
    backend = backend or DEFAULT
    if native.C is None or (backend is not None and backend != "cpu"):
        return None
    if query is None or key is None or value is None:
        return None
    if not isinstance(causal, bool) or not (scale is None or isinstance(scale, float)):
        return None
    if not may_bypass_dispatcher(query, key, value) or query.numel() > _SMALL or torch._C._is_any_autocast_enabled():
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if observer.open_watches and observer.current():
        return None
    out = torch.empty_like(query)
    threads = torch.get_num_threads()
    return out if native.C.attention_plain(query, key, value, out, scale, causal, top_left, grouped, threads) else None
