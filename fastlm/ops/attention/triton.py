"""Run attention on GPUs: implement the torch ops of the Triton kernels."""

import torch
from torch import Tensor

from ...backend import triton as triton_kernels
from .call import TENSORS, AttentionCall, KVCacheCall, Tangents, kernel_options
from .checks import no_columns
from .op import (
    Passes,
    attention_op,
    check_cache_strides,
    empty_gradients,
    empty_results,
    empty_statistics,
    kvcache_op,
    output_gradients,
    rows_of,
    sink_gradient,
    sink_weights,
)

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Return why the Triton kernels cannot take a call, or None."""
    if reason := triton_kernels.why_not(query):
        return reason
    if query.dtype not in _DTYPES:
        return f"query has dtype {query.dtype}; float32, bfloat16 and float16 have kernels"
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > _MAX_HEAD_DIM:
        return f"a head_dim is {head_dim}; up to {_MAX_HEAD_DIM} have kernels"
    return no_columns(query, value)


def allow_tf32() -> bool:
    """Tell whether torch's own matrix products may round float32 to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _kernel_call(call: AttentionCall):
    """Convert a call for the kernels' launchers: the same tensors, and the options by `kernel_options`."""
    tensors = (*map(rows_of, call[:3]), *call[3:TENSORS])
    return triton_kernels.attention().Call(*tensors, *kernel_options(call), allow_tf32())


def _unit(call: AttentionCall, kernel_call) -> float:
    """Return the factor from the kernels' scores to natural ones."""
    return call.scale if triton_kernels.attention().is_scale_only(kernel_call) else 1.0


def _kernel_tangents(tangents: Tangents):
    """Convert tangents for the kernels' launchers."""
    rows = (None if tensor is None else rows_of(tensor) for tensor in tangents[:3])
    return triton_kernels.attention().TangentTensors(*rows, *tangents[3:])


def forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, statistics)."""
    results = *empty_results(call.query, call.value), empty_statistics(call.query)
    kernels = triton_kernels.attention()
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_forward(_kernel_call(call), *results))
    return results


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
    kernels, kernel_call = triton_kernels.attention(), _kernel_call(call)
    *grads, grad_mask, grad_sinks = empty_gradients(call, need_mask, need_sinks)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    delta, statistics = torch.empty_like(lse, memory_format=torch.contiguous_format), statistics.contiguous()
    wanted = *grads, grad_mask if need_mask else None
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_backward(kernel_call, out, statistics, grad_out, grad_lse, wanted, delta))
    if need_sinks:
        grad_sinks = sink_gradient(call.sinks, sink_weights(call.sinks, statistics, _unit(call, kernel_call), lse), -delta)
    return *grads, grad_mask, grad_sinks


def jvp(call: AttentionCall, tangents: Tangents) -> tuple[Tensor, ...]:
    """Return (out, lse, statistics, out_tangent, lse_tangent)."""
    results = *empty_results(call.query, call.value), empty_statistics(call.query), *empty_results(call.query, call.value)
    kernels = triton_kernels.attention()
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_jvp(_kernel_call(call), _kernel_tangents(tangents), kernels.JvpResults(*results)))
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
    kernels, kernel_call = triton_kernels.attention(), _kernel_call(call)
    *grads, grad_mask, grad_sinks = empty_gradients(call, need_mask, need_sinks)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    lse_tangent = lse_tangent.contiguous()
    results = kernels.JvpResults(rows_of(out), lse, statistics.contiguous(), rows_of(out_tangent), lse_tangent)
    deltas, wanted = (torch.empty_like(lse_tangent), torch.empty_like(lse_tangent)), (*grads, grad_mask if need_mask else None)
    launches = kernels.plan_jvp_backward(kernel_call, _kernel_tangents(tangents), results, grad_out, grad_lse, wanted, deltas)
    with torch.cuda.device_of(call.query):
        kernels.run(launches)
    if need_sinks:
        own = 0.0 if tangents.sinks is None else tangents.sinks.float()[:, None]
        by_weight = (lse_tangent - own) * deltas[0] - deltas[1]
        grad_sinks = sink_gradient(call.sinks, sink_weights(call.sinks, statistics, _unit(call, kernel_call), lse), by_weight)
    return *grads, grad_mask, grad_sinks


def kvcache_forward(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """Append to the caches, and return (out, lse)."""
    check_cache_strides(call)
    out, lse = empty_results(call.query, call.value_cache)
    kernels = triton_kernels.attention()
    query, key, value = (None if t is None else rows_of(t) for t in (call.query, call.key, call.value))
    with torch.cuda.device_of(query):
        kernels.run(kernels.plan_kvcache(*call._replace(query=query, key=key, value=value), allow_tf32(), out, lse))
    return out, lse


attend = attention_op("triton_attention", Passes(forward, backward, jvp, jvp_backward), ("CPU", "CUDA"))
kvcache_attend = kvcache_op("triton_kvcache_attention", kvcache_forward, ("CPU", "CUDA"))
