"""Attention on GPUs: the functions behind the torch ops of the Triton kernels."""

import torch
from torch import Tensor

from .. import triton_kernels
from ..reference.attention import drop_below
from .attention_op import attention_fake, attention_op, backward_fake, sink_gradient

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_why_not(query: Tensor, value: Tensor) -> str | None:
    """Why the Triton kernels cannot take a call."""
    if reason := triton_kernels.why_not(query):
        return reason
    if query.dtype not in _DTYPES:
        return f"query has dtype {query.dtype}; float32, bfloat16 and float16 have kernels"
    head_dim = max(query.shape[-1], value.shape[-1])
    return f"a head_dim is {head_dim}; up to {_MAX_HEAD_DIM} have kernels" if head_dim > _MAX_HEAD_DIM else None


def allow_tf32() -> bool:
    """Whether torch's own matrix products may round float32 to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _call(query, key, value, mask, sinks, alibi_slopes, seed, cu_q, cu_k, left, right, scale, softcap, dropout_p):
    below = drop_below(dropout_p) if dropout_p else 0
    tensors = (query, key, value, mask, sinks, alibi_slopes, seed, cu_q, cu_k)
    kernels = triton_kernels.attention()
    return kernels.Call(*tensors, left, right, scale, softcap, below, 1.0 / (1.0 - dropout_p), allow_tf32())


def _forward(query, key, value, *rest):
    out, lse = attention_fake(query, key, value)
    kernels = triton_kernels.attention()
    with torch.cuda.device_of(query):
        kernels.run(kernels.plan_forward(_call(query, key, value, *rest), out, lse))
    return out, lse


def _backward(grad_out, grad_lse, out, lse, query, key, value, mask, sinks, *rest):
    need_mask, need_sinks, options = *rest[4:6], rest[6:]
    call = _call(query, key, value, mask, sinks, *rest[:4], *options)
    *grads, grad_mask, grad_sinks = backward_fake(grad_out, grad_lse, out, lse, query, key, value, mask, sinks, *rest)
    kernels = triton_kernels.attention()
    grad_out = torch.zeros_like(out) if grad_out is None else kernels.rows_of(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(query):
        wanted = (*grads, grad_mask if need_mask else None)
        kernels.run(kernels.plan_backward(call, out, lse, grad_out, grad_lse, wanted, delta))
    return *grads, grad_mask, sink_gradient(sinks, lse, delta) if need_sinks else grad_sinks


attend = attention_op("triton_attention", _forward, _backward, ("CPU", "CUDA"))
