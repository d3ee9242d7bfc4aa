"""Make the torch ops of attention for each backend: schema, fake tensors, vmap and autograd around the backend's functions.

fastlm::attention returns (out, lse, statistics). fastlm::attention_backward returns the gradients of query, key, value, mask
and sinks; an unwanted gradient is an empty tensor, because an op cannot return None. fastlm::kvcache_attention returns
(out, lse). cpu.py and triton.py hold the functions.

A backend's own backward recomputes the weights from ``statistics`` (B, Hq, Lq, 2). They hold the maximum that was subtracted
from a row's scores, in the backend's unit, and log2 of the sum of the row's weights. The log-sum-exp, which adds the two, would
not do: beside scores near -1e9, float32 has no room for the logarithm of the number of keys.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_op import batch_first, define_op, may_bypass_dispatcher, sum_to, with_gradient
from .call import DIFFERENTIABLE, INPUTS, KVCACHE_INPUTS, KVCACHE_TENSORS, TENSORS, AttentionCall, KVCacheCall

# ---- layout: results lie in memory as the tensors that they belong to -------------------------------------------------------


def empty_like(tensor: Tensor, columns: int, make: Callable) -> Tensor:
    """Make (B, H, L, columns) by ``make(tensor, shape)``; if ``tensor`` is transposed from (B, L, H, D), so is the result."""
    batch, heads, rows, _ = tensor.shape
    if heads > 1 and rows > 1 and tensor.stride(1) < tensor.stride(2):
        return make(tensor, (batch, rows, heads, columns)).transpose(1, 2)
    return make(tensor, (batch, heads, rows, columns))


def empty_results(query: Tensor, value: Tensor, make: Callable = Tensor.new_empty) -> tuple[Tensor, Tensor]:
    """Make the unwritten (out, lse) of a call on the query's device."""
    return empty_like(query, value.shape[3], make), make(query, query.shape[:3], dtype=torch.float32)


def empty_statistics(query: Tensor, make: Callable = Tensor.new_empty) -> Tensor:
    """Make the unwritten statistics (B, Hq, Lq, 2) of a call on the query's device."""
    return make(query, (*query.shape[:3], 2), dtype=torch.float32)


def empty_gradients(call: AttentionCall, need_mask: bool, need_sinks: bool) -> tuple[Tensor, ...]:
    """Make the unwritten gradients of query, key, value, mask and sinks; unwanted ones are empty."""
    query, key, value, mask, sinks = call[:DIFFERENTIABLE]
    grads = (empty_like(tensor, tensor.shape[3], Tensor.new_empty) for tensor in (query, key, value))
    grad_mask = mask.new_empty(mask.shape) if need_mask else query.new_empty(0)
    grad_sinks = sinks.new_empty(sinks.shape) if need_sinks else query.new_empty(0)
    return *grads, grad_mask, grad_sinks


# ---- inputs of every backend ------------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def output_gradients(out: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the outputs as kernels read them. A missing grad_out counts as zeros."""
    grad_out = torch.zeros_like(out) if grad_out is None else rows_of(grad_out)
    return grad_out, None if grad_lse is None else grad_lse.contiguous()


def sink_gradient(sinks: Tensor, statistics: Tensor, unit: float, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the sinks (Hq,), which have no value: the sum of p (0 - delta), with p the sink's weight in a row.

    lse and delta are (B, Hq, Lq); ``unit`` times a row's maximum is a natural score. Beside a huge maximum, the LSE has no room
    for the sum of the weights; far from the maximum, a sink has all of its row's weight, or none.
    """
    logits, maximum = sinks.float()[:, None], statistics[..., 0] * unit
    by_lse = logits - lse.masked_fill(lse == -math.inf, math.inf)
    by_total = logits - maximum - statistics[..., 1] * math.log(2.0)
    share = torch.exp(torch.where((logits - maximum).abs() < 64.0, by_total, by_lse))
    return sum_to(-share * delta, sinks[:, None]).reshape(sinks.shape)


# ---- vmap: if the op can batch them, entries become one batch; otherwise each is a call of its own --------------------------

# A backward takes these arguments before the call's: grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks.
_SAVED = 7


def _is_one_batch(in_dims: tuple, call: AttentionCall) -> bool:
    """Tell whether vmapped calls can be one batch. Dropout counts heads by batch, and masks, slopes and sinks may not fit."""
    shared = call.mask is None or call.mask.dim() < 4 or call.mask.shape[0] == 1
    shared &= call.alibi_slopes is None or call.alibi_slopes.dim() == 1
    return shared and call.seed is None and call.cu_seqlens_q is None and in_dims[3:TENSORS] == (None,) * (TENSORS - 3)


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Fold the vmapped dimension into the batch: (entries * batch, ...)."""
    tensor = batch_first(tensor, dim, size)
    return None if tensor is None else tensor.flatten(0, 1)


def _one_by_one(op, size: int, in_dims: tuple, args: tuple) -> tuple:
    """Call the op for each entry, and return the stacked results."""
    calls = (op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(size))
    return tuple(map(torch.stack, zip(*calls)))


def _forward_vmap(op, info, in_dims, *args):
    size = info.batch_size
    if not _is_one_batch(in_dims, AttentionCall._make(args)):
        return _one_by_one(op, size, in_dims, args), (0, 0, 0)
    folded = (_folded(t, d, size) for t, d in zip(args[:3], in_dims))
    results = op(*folded, *args[3:])
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0, 0, 0)


def _backward_vmap(op, info, in_dims, *args):
    size, (need_mask, need_sinks) = info.batch_size, args[_SAVED - 2 : _SAVED]
    if need_mask or need_sinks or not _is_one_batch(in_dims[_SAVED:], AttentionCall._make(args[_SAVED:])):
        return _one_by_one(op, size, in_dims, args), (0,) * DIFFERENTIABLE
    folded = [_folded(a, d, size) if isinstance(a, Tensor) else a for a, d in zip(args[: _SAVED + 3], in_dims)]
    *grads, grad_mask, grad_sinks = op(*folded, *args[_SAVED + 3 :])
    return (*(grad.unflatten(0, (size, -1)) for grad in grads), grad_mask, grad_sinks), (0, 0, 0, None, None)


# ---- a backend's ops --------------------------------------------------------------------------------------------------------


def attention_op(
    name: str, forward: Callable, backward: Callable, devices: tuple[str, ...], infer: Callable | None = None
) -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
    """Make a backend's ``attend(call)``, which returns (out, lse) by its torch op, with the required gradients.

    Args:
        forward: ``forward(call)`` returns (out, lse, statistics).
        backward: ``backward(grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks, call)`` returns the gradients of
            query, key, value, mask and sinks.
        infer: ``infer(call)`` returns (out, lse) of a call without gradients, for a backend that can omit the statistics.
    """
    infer = infer or forward

    def run_forward(*args):
        return forward(AttentionCall._make(args))

    def run_backward(*args):
        return backward(*args[:_SAVED], AttentionCall._make(args[_SAVED:]))

    def fake_forward(query, key, value, *_):
        return *empty_results(query, value), empty_statistics(query)

    def fake_backward(*args):
        return empty_gradients(AttentionCall._make(args[_SAVED:]), *args[_SAVED - 2 : _SAVED])

    forward_op = define_op(
        name,
        f"({INPUTS}) -> (Tensor out, Tensor lse, Tensor statistics)",
        run_forward,
        fake_forward,
        devices,
        _forward_vmap,
    )
    backward_op = define_op(
        f"{name}_backward",
        "(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor statistics, bool need_mask, bool need_sinks, "
        f"{INPUTS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
        run_backward,
        fake_backward,
        devices,
        _backward_vmap,
    )

    def save(ctx, args, outputs) -> None:
        ctx.save_for_backward(*args[:TENSORS], *outputs)
        ctx.options = args[TENSORS:]
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_out, grad_lse, _) -> tuple:
        *tensors, out, lse, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:DIFFERENTIABLE]
        direct = may_bypass_dispatcher(grad_out, grad_lse, out, lse, statistics, *tensors)
        run = run_backward if direct else backward_op
        grads = run(grad_out, grad_lse, out, lse, statistics, *needed[3:], *tensors, *ctx.options)
        unused = (None,) * (TENSORS - DIFFERENTIABLE + len(ctx.options))
        return *(grad if need else None for grad, need in zip(grads, needed)), *unused

    run_direct, run_dispatched = with_gradient(run_forward, forward_op, save, gradients)

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
        direct = may_bypass_dispatcher(*call[:TENSORS])
        if torch.is_grad_enabled() and call.requires_grad():
            return (run_direct if direct else run_dispatched)(*call)[:2]
        return infer(call)[:2] if direct else forward_op(*call)[:2]

    return attend


def kvcache_op(name: str, forward: Callable, devices: tuple[str, ...]) -> Callable[[KVCacheCall], tuple[Tensor, Tensor]]:
    """Make a backend's ``attend(call)``, which returns (out, lse) by its torch op, always without a gradient."""

    def run_forward(*args):
        return forward(KVCacheCall._make(args))

    def fake(query, key_cache, value_cache, *_):
        return empty_results(query, value_cache)

    op = define_op(name, f"({KVCACHE_INPUTS}) -> (Tensor out, Tensor lse)", run_forward, fake, devices)

    def attend(call: KVCacheCall) -> tuple[Tensor, Tensor]:
        if may_bypass_dispatcher(*call[:KVCACHE_TENSORS]):
            results = forward(call)
        else:
            with torch.no_grad():
                results = op(*call)
        if call.key is not None:
            _note_writes(call.key_cache, call.value_cache)
        return results

    return attend


def _note_writes(*caches: Tensor) -> None:
    """Tell autograd that tensors were written, so that an older graph that saved one of them raises in its backward."""
    if not torch.compiler.is_compiling():  # When compiling, the schema tells.
        for cache in caches:
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)


def check_cache_strides(call: KVCacheCall) -> None:
    """Refuse caches whose rows the kernels cannot write in place."""
    for name, cache in (("key_cache", call.key_cache), ("value_cache", call.value_cache)):
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise ValueError(f"{name} is written in place: its last dimension must be contiguous; got strides {cache.stride()}")
