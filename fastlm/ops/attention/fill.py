"""Finish attention in a compiled graph whose hidden scores are a finite number, as ``masked_fill(hidden, -1e9)`` makes them.

Attention leaves hidden scores out, which is exact as long as their weights beside the others are zero in float32. Whether they
are is known only when numbers are, and so one op decides it: fastlm::fill returns attention's output, or what torch would
compute.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_op import define_op, with_gradient
from .dropout import drop


class FillCall(NamedTuple):
    """Hold attention's output, its inputs and the fill."""

    out: Tensor  # (B, Hq, Lq, Dv)
    query: Tensor  # (B, Hq, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D)
    value: Tensor  # (B, Hkv, Lk, Dv)
    mask: Tensor | None  # floating, added to the scores; or None
    attended: Tensor  # bool, broadcastable to (B, Hq, Lq, Lk)
    lse: Tensor  # float32 (B, Hq, Lq)
    seed: Tensor | None
    scale: float
    fill: float
    dropout_p: float
    zero_hidden: bool  # whether zeros have been written over the weights of hidden scores


_INPUTS = (
    "Tensor out, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor attended, Tensor lse, Tensor? seed, "
    "float scale, float fill, float dropout_p, bool zero_hidden"
)
_DIFFERENTIABLE, _TENSORS = 5, 8


def _filled(call: FillCall) -> Tensor:
    """Return the output with the fill; e^-104 is 0 in float32."""
    keys = call.key.shape[2]
    alone = call.lse > call.fill + 104.0 + math.log(keys)
    if bool(alone.all()):
        return call.out.clone(memory_format=torch.contiguous_format)
    whole = call.attended.any(-1).logical_not()  # (B or 1, Hq or 1, Lq or 1), rows that are hidden whole
    if not bool((alone | whole).all()) or (call.dropout_p and not call.zero_hidden):
        return _by_torch(call)
    if call.zero_hidden:
        return call.out.clone(memory_format=torch.contiguous_format)
    mean = call.value.mean(-2, keepdim=True)  # (B, Hkv, 1, Dv): equal scores weigh all values alike
    return torch.where(whole.unsqueeze(-1), _for_each_query_head(mean, call).to(call.out.dtype), call.out)


def _by_torch(call: FillCall) -> Tensor:
    key, value = _for_each_query_head(call.key.float(), call), _for_each_query_head(call.value.float(), call)
    scores = call.query.float() @ key.transpose(-2, -1) * call.scale
    if call.mask is not None:
        scores = scores + call.mask
    weights = torch.where(call.attended, scores, call.fill).softmax(-1)
    if call.zero_hidden:
        weights = torch.where(call.attended, weights, 0.0)
    if call.dropout_p:
        weights = drop(weights, call.seed, call.dropout_p)
    return (weights @ value).to(call.out.dtype)


def _for_each_query_head(tensor: Tensor, call: FillCall) -> Tensor:
    return tensor.repeat_interleave(call.query.shape[1] // tensor.shape[1], dim=1)


def _run(*args) -> Tensor:
    return _filled(FillCall._make(args)).contiguous()


def _fake(out: Tensor, *_) -> Tensor:
    return out.new_empty(out.shape)


def _run_backward(grad: Tensor, *args) -> tuple[Tensor, ...]:
    """Return the gradients of the differentiable tensors; an absent mask's is empty."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in args[:_DIFFERENTIABLE]]
    with torch.enable_grad():
        out = _filled(FillCall._make((*leaves, *args[_DIFFERENTIABLE:])))
    given = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(out, given, grad, allow_unused=True, materialize_grads=True))
    return tuple(grad.new_empty(0) if leaf is None else next(grads).contiguous() for leaf in leaves)


def _fake_backward(grad: Tensor, *args) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:_DIFFERENTIABLE])


_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in FillCall._fields[:_DIFFERENTIABLE])
_op = define_op("fill", f"({_INPUTS}) -> Tensor", _run, _fake)
_backward_op = define_op("fill_backward", f"(Tensor grad, {_INPUTS}) -> ({_GRADIENTS})", _run_backward, _fake_backward)


def _save(ctx, args: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*args[:_TENSORS])
    ctx.options = args[_TENSORS:]


def _backward(ctx, grad: Tensor) -> tuple:
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))
    return *wanted, *(None,) * (len(FillCall._fields) - _DIFFERENTIABLE)


_, _with_gradient = with_gradient(_run, _op, _save, _backward)


def fill(call: FillCall) -> Tensor:
    """Return attention's output as torch's would be where hidden scores count, contiguous."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:_DIFFERENTIABLE])
    return (_with_gradient if wanted else _op)(*call)
