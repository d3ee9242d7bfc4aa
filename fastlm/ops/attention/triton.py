"""Attention on GPUs: the functions behind the torch ops of the Triton kernels."""

import torch
from torch import Tensor

from ...backend import triton as triton_kernels
from .checks import no_columns
from .op import attention_fake, attention_op, backward_fake, given_gradients, numbers, rows_of, sink_gradient

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_why_not(query: Tensor, value: Tensor) -> str | None:
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
    """Whether torch's own matrix products may round float32 to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _call(query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, *options):
    tensors = (*map(rows_of, (query, key, value)), mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    return triton_kernels.attention().Call(*tensors, *numbers(*options), allow_tf32())


def _forward(query, key, value, *rest):
    results = attention_fake(query, key, value)
    kernels = triton_kernels.attention()
    with torch.cuda.device_of(query):
        kernels.run(kernels.plan_forward(_call(query, key, value, *rest), *results))
    return results


def _backward(grad_out, grad_lse, out, lse, statistics, query, key, value, mask, sinks, *rest):
    need_mask, need_sinks, options = *rest[4:6], rest[6:]
    call = _call(query, key, value, mask, sinks, *rest[:4], *options)
    tensors = (out, lse, statistics, query, key, value, mask, sinks)
    *grads, grad_mask, grad_sinks = backward_fake(grad_out, grad_lse, *tensors, *rest)
    grad_out, grad_lse = given_gradients(out, grad_out, grad_lse)
    delta, wanted = torch.empty_like(lse), (*grads, grad_mask if need_mask else None)
    kernels = triton_kernels.attention()
    with torch.cuda.device_of(query):
        kernels.run(kernels.plan_backward(call, out, statistics, grad_out, grad_lse, wanted, delta))
    if need_sinks:
        unit = call.scale if kernels.is_scale_only(call) else 1.0
        grad_sinks = sink_gradient(sinks, statistics, unit, lse, delta)
    return *grads, grad_mask, grad_sinks


attend = attention_op("triton_attention", _forward, _backward, ("CPU", "CUDA"))
