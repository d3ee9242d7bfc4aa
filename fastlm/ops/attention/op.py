"""Make the torch ops of attention for each backend: schema, fake tensors, vmap and autograd around the backend's functions.

fastlm::attention returns (out, lse, statistics). fastlm::attention_backward returns the gradients of query, key, value, mask
and sinks; an unwanted gradient is an empty tensor, because an op cannot return None. fastlm::attention_jvp, forward mode,
returns what the forward does and the tangents of out and lse; fastlm::attention_jvp_backward returns the gradients of a
function of these two tangents. derivatives.py makes of the four what autograd calls. fastlm::kvcache_attention returns
(out, lse). cpu.py and triton.py hold the functions.

A backend's own backward recomputes the weights from ``statistics`` (B, Hq, Lq, 2). They hold the maximum that was subtracted
from a row's scores, in the backend's unit, and log2 of the sum of the row's weights. The log-sum-exp, which adds the two, would
not do: beside scores near -1e9, float32 has no room for the logarithm of the number of keys.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..torch_op import batch_first, define_op, leave_gradients_to_eager, may_bypass_dispatcher, sum_to
from .call import (
    DIFFERENTIABLE,
    INPUTS,
    KVCACHE_INPUTS,
    KVCACHE_TENSORS,
    TANGENTS,
    TENSORS,
    AttentionCall,
    KVCacheCall,
    Tangents,
)
from .derivatives import Ops, differentiable

# ---- layout: results lie in memory as the tensors that they belong to -------------------------------------------------------


def is_transposed(tensor: Tensor) -> bool:
    """Tell whether a tensor (B, H, L, D) lies in memory as the transpose of a (B, L, H, D), as models have it."""
    _, heads, rows, _ = tensor.shape
    return heads > 1 and rows > 1 and tensor.stride(1) < tensor.stride(2)


def empty_like(tensor: Tensor, columns: int, make: Callable) -> Tensor:
    """Make (B, H, L, columns) by ``make(tensor, shape)``; if ``tensor`` is transposed from (B, L, H, D), so is the result."""
    batch, heads, rows, _ = tensor.shape
    if is_transposed(tensor):
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


def sink_weights(sinks: Tensor, statistics: Tensor, unit: float, lse: Tensor) -> Tensor:
    """Return the weights (B, Hq, Lq) of the sinks (Hq,).

    ``unit`` times a row's maximum is a natural score. Beside a huge maximum, the LSE has no room for the sum of the weights;
    far from the maximum, a sink has all of its row's weight, or none.
    """
    logits, maximum = sinks.float()[:, None], statistics[..., 0] * unit
    by_lse = logits - lse.masked_fill(lse == -math.inf, math.inf)
    by_total = logits - maximum - statistics[..., 1] * math.log(2.0)
    return torch.exp(torch.where((logits - maximum).abs() < 64.0, by_total, by_lse))


def sink_gradient(sinks: Tensor, weights: Tensor, by_weight: Tensor) -> Tensor:
    """Return the gradient of the sinks (Hq,): the sum of their weights times ``by_weight``, both (B, Hq, Lq).

    In a backward that is -delta, because a sink has no value.
    """
    return sum_to(weights * by_weight, sinks[:, None]).reshape(sinks.shape)


# ---- vmap: if the op can batch them, entries become one batch; otherwise each is a call of its own --------------------------

# What a backward takes before the call: grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks; and the backward of
# the tangents: two more tensors, out_tangent and lse_tangent, before the last two.
_SAVED, _SAVED_TANGENTS = 7, 9
_CALL = len(AttentionCall._fields)


def _is_one_batch(in_dims: tuple, call: AttentionCall) -> bool:
    """Tell whether vmapped calls can be one batch. Dropout counts heads by batch, and masks, slopes and sinks may not fit."""
    shared = call.mask is None or call.mask.dim() < 4 or call.mask.shape[0] == 1
    shared &= call.alibi_slopes is None or call.alibi_slopes.dim() == 1
    shared &= call.seed is None and call.cu_seqlens_q is None and call.places is None
    return shared and in_dims[3:TENSORS] == (None,) * (TENSORS - 3)


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Fold the vmapped dimension into the batch: (entries * batch, ...)."""
    tensor = batch_first(tensor, dim, size)
    return None if tensor is None else tensor.flatten(0, 1)


def one_by_one(op, size: int, in_dims: tuple, args: tuple) -> tuple:
    """Call the op for each entry, and return the stacked results."""
    calls = (op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(size))
    return tuple(map(torch.stack, zip(*calls)))


def vmap_rule(first: int, results: int, gradients: bool, op, info, in_dims, *args) -> tuple[tuple, tuple]:
    """Run an op with ``results`` results on vmapped arguments, of which a call begins at place ``first``.

    What comes before the call has a batch like the query, and so have the first three of the tangents behind it. ``gradients``
    says that the results are those of query, key, value, mask and sinks, and the arguments before the call end with flags that
    ask for the last two.
    """
    size, call, behind = info.batch_size, AttentionCall._make(args[first : first + _CALL]), first + _CALL
    one_batch = _is_one_batch(in_dims[first:behind], call) and in_dims[behind + 3 :] in ((), (None, None))
    if not one_batch or (gradients and any(args[first - 2 : first])):
        return one_by_one(op, size, in_dims, args), (0,) * results
    with_batch = {*range(first + 3), *range(behind, min(behind + 3, len(args)))}
    folded = [
        _folded(a, d, size) if i in with_batch and isinstance(a, Tensor) else a for i, (a, d) in enumerate(zip(args, in_dims))
    ]
    outputs = op(*folded)
    count = 3 if gradients else results  # unwanted gradients are empty
    batched = tuple(output.unflatten(0, (size, -1)) for output in outputs[:count])
    return (*batched, *outputs[count:]), (0,) * count + (None,) * (results - count)


# ---- a backend's ops --------------------------------------------------------------------------------------------------------


class Passes(NamedTuple):
    """Hold a backend's functions of an AttentionCall.

    Attributes:
        forward: ``forward(call)`` returns (out, lse, statistics).
        stats_forward: ``stats_forward(call, want_rows, want_mass)`` returns what the op of statistics does (stats.py).
        backward: ``backward(grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks, call)`` returns the gradients of
            query, key, value, mask and sinks.
        jvp: ``jvp(call, tangents)`` returns (out, lse, statistics, out_tangent, lse_tangent).
        jvp_backward: ``jvp_backward(grad_out, grad_lse, out, lse, statistics, out_tangent, lse_tangent, need_mask, need_sinks,
            call, tangents)`` returns the gradients that <grad_out, out_tangent> + <grad_lse, lse_tangent> has for the inputs.
    """

    forward: Callable
    stats_forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


class Attend(NamedTuple):
    """Hold a backend's public way to run a call.

    Attributes:
        attend: ``attend(call)`` returns (out, lse), with their derivatives.
        attend_watched: ``attend_watched(call, want_mass)`` returns also entropy, max_logit and key_mass, which have none, of a
            call that may bypass the dispatcher.
    """

    attend: Callable
    attend_watched: Callable


def attention_op(name: str, passes: Passes, devices: tuple[str, ...], infer: Callable | None = None) -> Attend:
    """Make a backend's `Attend` by its torch ops.

    ``infer(call)`` returns (out, lse) of a call without gradients, for a backend that can omit the statistics.
    """
    infer = infer or passes.forward

    def run_forward(*args):
        return passes.forward(AttentionCall._make(args))

    def run_watched(want_mass, *args):
        return passes.stats_forward(AttentionCall._make(args), True, want_mass)

    def run_backward(*args):
        return passes.backward(*args[:_SAVED], AttentionCall._make(args[_SAVED:]))

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
        partial(vmap_rule, 0, 3, False),
    )
    backward_op = define_op(
        f"{name}_backward",
        "(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor statistics, bool need_mask, bool need_sinks, "
        f"{INPUTS}) -> {_GRADIENTS}",
        run_backward,
        fake_backward,
        devices,
        partial(vmap_rule, _SAVED, DIFFERENTIABLE, True),
        differentiated=False,
    )
    ops = Ops(run_forward, run_watched, run_backward, forward_op, backward_op, *_tangent_ops(name, passes, devices))
    derived = differentiable(ops)

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
        if forward_ad._current_level >= 0:
            return derived.run_dual(call)
        leave_gradients_to_eager()
        direct = may_bypass_dispatcher(*call[:TENSORS])
        if torch.is_grad_enabled() and call.requires_grad():
            return (derived.run_direct if direct else derived.run_dispatched)(*call)[:2]
        return infer(call)[:2] if direct else forward_op(*call)[:2]

    def attend_watched(call: AttentionCall, want_mass: bool) -> tuple[Tensor, ...]:
        is_recorded = torch.is_grad_enabled() and call.requires_grad()
        run = derived.run_watched[want_mass] if is_recorded else partial(run_watched, want_mass)
        out, lse, _, entropy, max_logit, _, key_mass = run(*call)
        return out, lse, entropy, max_logit, key_mass

    return Attend(attend, attend_watched)


_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)"


def _tangent_ops(name: str, passes: Passes, devices: tuple[str, ...]) -> tuple[Callable, Callable]:
    """Define a backend's ops of forward mode and of its backward."""

    def run_jvp(*args):
        return passes.jvp(AttentionCall._make(args[:_CALL]), Tangents._make(args[_CALL:]))

    def run_backward(*args):
        saved, (call, tangents) = args[:_SAVED_TANGENTS], (args[_SAVED_TANGENTS:][:_CALL], args[_SAVED_TANGENTS + _CALL :])
        return passes.jvp_backward(*saved, AttentionCall._make(call), Tangents._make(tangents))

    def fake_jvp(query, key, value, *_):
        return *empty_results(query, value), empty_statistics(query), *empty_results(query, value)

    def fake_backward(*args):
        call = AttentionCall._make(args[_SAVED_TANGENTS:][:_CALL])
        return empty_gradients(call, *args[_SAVED_TANGENTS - 2 : _SAVED_TANGENTS])

    jvp_op = define_op(
        f"{name}_jvp",
        f"({INPUTS}, {TANGENTS}) -> (Tensor out, Tensor lse, Tensor statistics, Tensor out_tangent, Tensor lse_tangent)",
        run_jvp,
        fake_jvp,
        devices,
        partial(vmap_rule, 0, 5, False),
        differentiated=False,
    )
    backward_op = define_op(
        f"{name}_jvp_backward",
        "(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor statistics, Tensor out_tangent, "
        f"Tensor lse_tangent, bool need_mask, bool need_sinks, {INPUTS}, {TANGENTS}) -> {_GRADIENTS}",
        run_backward,
        fake_backward,
        devices,
        partial(vmap_rule, _SAVED_TANGENTS, DIFFERENTIABLE, True),
        differentiated=False,
    )
    return jvp_op, backward_op


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
