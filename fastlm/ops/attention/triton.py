"""Run attention on GPUs: implement the torch ops of the Triton kernels."""

import torch
from torch import Tensor

from ...backend import triton as triton_kernels
from .call import TENSORS, AttentionCall, KVCacheCall, kernel_options
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
    delta, wanted = torch.empty_like(lse), (*grads, grad_mask if need_mask else None)
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_backward(kernel_call, out, statistics, grad_out, grad_lse, wanted, delta))
    if need_sinks:
        unit = call.scale if kernels.is_scale_only(kernel_call) else 1.0
        grad_sinks = sink_gradient(call.sinks, sink_weights(call.sinks, statistics, unit, lse), -delta)
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


attend = attention_op("triton_attention", Passes(forward, backward), ("CPU", "CUDA"))
kvcache_attend = kvcache_op("triton_kvcache_attention", kvcache_forward, ("CPU", "CUDA"))
